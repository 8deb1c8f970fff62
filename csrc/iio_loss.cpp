// Inpainting and the IIO loss on a CPU. iio_loss.h says how the stages are called.
//
// Two layouts of memory alternate. The filter works on lanes of planes: a vector holds one pixel of kLanes planes, so
// that rows and columns are filtered alike, whatever their length, and without a shuffle. All else works on lanes of
// pixels: a vector holds kLanes neighbouring pixels of one plane. A tile is kLanes pixels of kLanes planes; transposed
// where it lies, it goes from one layout to the other.
//
// An image's scratch memory holds the planes X_0 m_0, X_1 m_0, .., m_0, X_0 m_1, .., then what the stages make of them.
// kLanes planes are a group; zeros fill up the last group and the last tile. Sums over pixels are added up in lanes of
// T over a chunk of tiles and then in double over the chunks, always in the same order.
#include "iio_loss.h"

#include "simd.h"
#include "subsets.h"

namespace iio::IIO_ISA {
namespace {

constexpr int kMasks = 16;             // at most, where all their subsets are visited
constexpr int kListedMasks = 32;       // at most, where these are listed
constexpr int kChunk = 4;              // tiles in a unit of work
constexpr double kNegligible = 1e-20;  // mask values below this count as 0, see reference.py

// a b, rounded: kept out of a fused multiply-add, so that what is equal on paper cancels.
template <class V>
IIO_INLINE V rounded_product(V a, V b) {
  V product = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// ---- An image, its scratch memory and its tiles ---------------------------------------------------------------------

// Sizes, and where in the scratch memory things lie.
template <class T>
struct Layout {
  static constexpr int L = kLanes<T>;

  const int64_t K, C, H, W;
  const int64_t pixels = H * W, tiles = (pixels + L - 1) / L, chunks = (tiles + kChunk - 1) / kChunk;
  const int64_t groups = (K * (C + 1) + L - 1) / L;

  // A group's pixels follow one another. Rows that are whole tiles have room for one pixel more: were they a multiple
  // of 4 KB apart, a column's pixels would compete for a few lines of the cache.
  const bool spaced = W % L == 0;
  const int64_t row_stride = (W + spaced) * L;
  const int64_t group_stride = spaced ? H * row_stride : tiles * L * L;

  int64_t size = 0;
  const int64_t squares = part(groups * group_stride);  // (groups, tiles, L, L)
  const int64_t sums = part(chunks * groups * L);       // (chunks, groups * L): of each plane, over a chunk
  const int64_t totals = part(groups * L);              // (groups * L): eps times that over all pixels, of products
  const int64_t gradient_totals = part(groups * L);     // (groups * L): the same of dr and dd
  const int64_t inverse_norms = part(K);                // (K,): 1 / ||m_i||, or 0
  const int64_t dots = part(chunks * kListedMasks);     // (chunks, kListedMasks): <g_i, T_i> over a chunk
  const int64_t mean_errors = part(K);                  // (K,): that over all pixels

  explicit Layout(const Inpainting<T>& args) : K(args.K), C(args.C), H(args.H), W(args.W) {}

 private:
  int64_t part(int64_t length) {
    const int64_t start = size;
    size += (length + L - 1) / L * L;
    return start;
  }
};

// Passed by value: for all the compiler knows, a store through a pointer may change what is not local.
template <class T>
struct Image : Layout<T> {
  using Layout<T>::L;

  const Inpainting<T> args;
  const int64_t b;
  T* const scratch;

  Image(const Inpainting<T>& args, int64_t b, T* scratch) : Layout<T>(args), args(args), b(b), scratch(scratch) {}

  IIO_INLINE T* pixel(int64_t group, int64_t p) const {
    return scratch + this->squares + group * this->group_stride + p * L + (this->spaced ? p / this->W * L : 0);
  }

  IIO_INLINE T* square(int64_t group, int64_t tile) const { return pixel(group, tile * L); }
};

// kLanes pixels of all planes.
template <class T>
struct Tile {
  static constexpr int L = kLanes<T>;

  const Image<T>& image;
  const int64_t tile, first = tile * L;
  const int count = int(image.pixels - first < L ? image.pixels - first : L);
  T* const squares = image.square(0, tile);

  // From a plane outside of scratch memory; zeros beyond its end.
  IIO_INLINE Vec<T> read(const T* plane) const {
    return count == L ? load(plane + first) : load_first(plane + first, count);
  }

  IIO_INLINE void write(T* plane, Vec<T> x) const {
    if (count == L) {
      store(plane + first, x);
    } else {
      store_first(plane + first, x, count);
    }
  }

  IIO_INLINE Vec<T> X(int64_t c) const {
    const Planes<T>& p = image.args.image;
    return read(p.data + image.b * p.image_stride + c * p.plane_stride);
  }

  IIO_INLINE Vec<T> m(int64_t i) const {
    const Planes<T>& p = image.args.masks;
    const Vec<T> x = read(p.data + image.b * p.image_stride + i * p.plane_stride);
    return absolute(x) < T(kNegligible) ? Vec<T>{} : x;
  }

  // In scratch memory, in lanes of pixels: mask i's plane of channel c, or with c = C its own.
  IIO_INLINE T* at(int64_t i, int64_t c) const {
    const uint64_t p = plane(i, c);
    return squares + p / L * image.group_stride + p % L * L;
  }

  // The same after filtering, with the eps term.
  IIO_INLINE Vec<T> filtered(int64_t i, int64_t c) const {
    return load(at(i, c)) + image.scratch[image.totals + plane(i, c)];
  }
  IIO_INLINE Vec<T> filtered_gradient(int64_t i, int64_t c) const {
    return load(at(i, c)) + image.scratch[image.gradient_totals + plane(i, c)];
  }

  IIO_INLINE int64_t plane(int64_t i, int64_t c) const { return i * (image.C + 1) + c; }

  // A plane of a result, or of an incoming gradient, that has `planes` planes an image.
  template <class U>
  IIO_INLINE U* result(U* data, int64_t planes, int64_t plane) const {
    return data + (image.b * planes + plane) * image.pixels;
  }
};

// One step of `transpose`: the odd runs of `size` lanes in a and the even ones in b change places.
template <class T, int size, size_t... lane>
IIO_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<lane...>) {
  constexpr size_t L = kLanes<T>;
  const Vec<T> even = pick<T, (lane & size ? L + lane - size : lane)...>(a, b);
  b = pick<T, (lane & size ? L + lane : lane + size)...>(a, b);
  a = even;
}

template <class T, int size = kLanes<T> / 2>
IIO_INLINE void transpose(Vec<T>* x) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (!(i & size)) exchange<T, size>(x[i], x[i + size], std::make_index_sequence<kLanes<T>>());
  }
  if constexpr (size > 1) transpose<T, size / 2>(x);
}

template <int count, class V>
IIO_INLINE V add_up(const V* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    return add_up<count / 2>(x) + add_up<count / 2>(x + count / 2);
  }
}

// From one layout to the other; returns the sums of what were its columns.
template <class T>
__attribute__((noinline)) Vec<T> transpose_square(T* square) {
  constexpr int L = kLanes<T>;
  Vec<T> x[L];
  for (int i = 0; i < L; ++i) x[i] = load(square + i * L);
  transpose<T>(x);
  for (int i = 0; i < L; ++i) store(square + i * L, x[i]);
  return add_up<L>(x);
}

template <class T>
struct Chunk {
  const Image<T>& image;
  const int64_t chunk, first = chunk * kChunk, last = first + kChunk < image.tiles ? first + kChunk : image.tiles;

  IIO_INLINE void to_lanes_of_pixels() const {
    for (int64_t group = 0; group < image.groups; ++group) {
      for (int64_t tile = first; tile < last; ++tile) transpose_square(image.square(group, tile));
    }
  }

  // and the sums over the pixels
  IIO_INLINE void to_lanes_of_planes() const {
    for (int64_t group = 0; group < image.groups; ++group) {
      Vec<T> sum{};
      for (int64_t tile = first; tile < last; ++tile) sum += transpose_square(image.square(group, tile));
      store(image.scratch + image.sums + (chunk * image.groups + group) * kLanes<T>, sum);
    }
  }
};

// sum_k parts[k * stride], in order
template <class T>
double add_parts(const T* parts, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += parts[k * stride];
  return sum;
}

// ---- The filter -----------------------------------------------------------------------------------------------------

// Outputs made at a time: each input loaded serves as many of them as there are. The widest vectors wait for arithmetic
// anyway; with narrower ones, and half the registers, asking for each input whether it is there takes longer.
constexpr bool kWidest = kVectorBytes == 64;
constexpr int kOutputs = kWidest ? 6 : 5;

// Outputs j .. j + kOutputs - 1, but none from n on, of one pass along a line of n vectors; zeros surround x.
template <int kRadius, bool kInside, class T>
IIO_INLINE void filter_outputs(int64_t j, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n,
                               const T* taps, int64_t any_radius) {
  const int64_t radius = kRadius ? kRadius : any_radius;
  const auto at = [=](int64_t i) { return kInside || uint64_t(i) < uint64_t(n) ? load(x + i * x_stride) : Vec<T>{}; };
  Vec<T> left[kOutputs], right[kOutputs], out[kOutputs];  // left[k] = x[j + k - t], right[k] = x[j + k + t]
  for (int k = 0; k < kOutputs; ++k) {
    left[k] = right[k] = at(j + k);
    out[k] = taps[0] * left[k];
  }
  for (int64_t t = 1; t <= radius; ++t) {
    for (int k = kOutputs - 1; k > 0; --k) left[k] = left[k - 1];
    for (int k = 0; k < kOutputs - 1; ++k) right[k] = right[k + 1];
    left[0] = at(j - t);
    right[kOutputs - 1] = at(j + kOutputs - 1 + t);
    for (int k = 0; k < kOutputs; ++k) out[k] += taps[t] * (left[k] + right[k]);
  }
  for (int k = 0; k < kOutputs; ++k) {
    if (kInside || j + k < n) store(y + (j + k) * y_stride, out[k]);
  }
}

template <int kRadius, class T>
IIO_INLINE void filter_once(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, const T* taps,
                            int64_t radius) {
  for (int64_t j = 0; j < n; j += kOutputs) {
    if (!kWidest && j >= radius && j + kOutputs + radius <= n) {
      filter_outputs<kRadius, true>(j, x, x_stride, y, y_stride, n, taps, radius);
    } else {
      filter_outputs<kRadius, false>(j, x, x_stride, y, y_stride, n, taps, radius);
    }
  }
}

// All passes along a line, in place. `scratch` has room for two lines.
template <class T>
void filter_line(T* line, int64_t stride, int64_t n, const Inpainting<T>& args, T* scratch) {
  const T* from = line;
  int64_t from_stride = stride;
  for (int64_t pass = 1; pass <= args.repeats; ++pass) {
    const bool last = pass == args.repeats && pass > 1;  // never from a line to itself
    T* const to = last ? line : scratch + pass % 2 * n * kLanes<T>;
    const int64_t to_stride = last ? stride : kLanes<T>;
    if (args.radius == 5) {
      filter_once<5>(from, from_stride, to, to_stride, n, args.taps, 5);
    } else {
      filter_once<0>(from, from_stride, to, to_stride, n, args.taps, args.radius);
    }
    from = to;
    from_stride = to_stride;
  }
  if (args.repeats == 1) {
    for (int64_t j = 0; j < n; ++j) store(line + j * stride, load(from + j * from_stride));
  }
}

// ---- Stages ---------------------------------------------------------------------------------------------------------

template <class T>
void products(Image<T> image, int64_t chunk) {
  const Chunk<T> tiles{image, chunk};
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    for (int64_t i = 0; i < image.K; ++i) {
      const Vec<T> m = tile.m(i);
      for (int64_t c = 0; c < image.C; ++c) store(tile.at(i, c), tile.X(c) * m);
      store(tile.at(i, image.C), m);
    }
    for (int64_t plane = image.K * (image.C + 1); plane % kLanes<T>; ++plane) store(tile.at(0, plane), Vec<T>{});
  }
  tiles.to_lanes_of_planes();
}

template <class T>
void totals(Image<T> image) {
  const int64_t stride = image.groups * kLanes<T>;
  for (int64_t plane = 0; plane < stride; ++plane) {
    const double sum = add_parts(image.scratch + image.sums + plane, image.chunks, stride);
    image.scratch[image.totals + plane] = T(image.args.eps * sum);
    if (plane < image.K * (image.C + 1) && plane % (image.C + 1) == image.C) {
      // 1 / infinity would pass for an empty mask: it is to be NaN.
      image.scratch[image.inverse_norms + plane / (image.C + 1)] = sum == 0 ? 0 : T(1 / sum + (sum - sum));
    }
  }
}

// Planes (K, C + 1) <- (r, d), in lanes of pixels.
template <class T>
void residuals(Image<T> image, int64_t chunk) {
  const Chunk<T> tiles{image, chunk};
  tiles.to_lanes_of_pixels();
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    for (int64_t i = 0; i < image.K; ++i) {
      const Vec<T> d = tile.filtered(i, image.C);
      for (int64_t c = 0; c < image.C; ++c) store(tile.at(i, c), rounded_product(tile.X(c), d) - tile.filtered(i, c));
      store(tile.at(i, image.C), d);
    }
  }
}

// float has long unrolled code, double short.
template <class Visitor, class V, int kC>
IIO_INLINE void visit_all(Visitor& visitor, const Pixel<V, kC, kMasks>& pixel, int K) {
  if (sizeof(V{}[0]) == sizeof(float) && K >= 4) {
    walk_all<4>(visitor, pixel, K);
  } else {
    walk_all<2>(visitor, pixel, K);
  }
}

// A list of sets. Its masks are taken in groups: a table holds what each part of a group, that is each of its subsets,
// adds to a node, so that a set costs an addition for each group. On the way back sums go into the same places, and from
// there through the group's tree to its masks.
constexpr int kGroup = 3, kParts = 1 << kGroup, kGroups = (kListedMasks + kGroup - 1) / kGroup;

template <class V, int kC>
struct FillTable {
  struct Sums {};
  Node<V, kC>* table;

  IIO_INLINE Sums visit(const Node<V, kC>& node, unsigned part) const {
    table[part] = node;
    return {};
  }
  IIO_INLINE Sums join(int, Sums, Sums) const { return {}; }
};

template <class Visitor>
struct ReadTable {
  using Sums = typename Visitor::Sums;
  Visitor& visitor;
  const Sums* table;
  int first;

  template <class Node>
  IIO_INLINE Sums visit(const Node&, unsigned part) const {
    return table[part];
  }
  IIO_INLINE Sums join(int i, const Sums& without, const Sums& with) const {
    return visitor.join(first + i, without, with);
  }
};

template <class V>
IIO_INLINE V& error_of(V& e) {
  return e;
}
template <class V, int kC>
IIO_INLINE V& error_of(GradientSums<V, kC>& sums) {
  return sums.e;
}

template <class Visitor, class V, int kC, int kMost, class T>
IIO_INLINE void visit_listed(Visitor& visitor, const Pixel<V, kC, kMost>& pixel, int groups, const int64_t* pairs,
                             const T* weights, int64_t P) {
  using Sums = typename Visitor::Sums;
  Node<V, kC> nodes[kGroups][kParts];
  Sums sums[kGroups][kParts];
  Pixel<V, kC, kGroup> members[kGroups];
  IIO_OVER_MASKS
  for (int k = 0; k < groups; ++k) {
    members[k].d = pixel.d + k * kGroup;
    members[k].g = pixel.g + k * kGroup;
    std::memcpy(members[k].r, pixel.r[k * kGroup], sizeof members[k].r);
    FillTable<V, kC> fill{nodes[k]};
    walk<kGroup>(fill, members[k], Node<V, kC>{}, 0);
    for (Sums& x : sums[k]) x = Sums{};
  }
  for (int64_t j = 0; j < 2 * P; ++j) {
    const uint64_t set = j & 1 ? ~uint64_t(pairs[j / 2]) : uint64_t(pairs[j / 2]);
    Node<V, kC> node{};
    IIO_OVER_MASKS
    for (int k = 0; k < groups; ++k) node += nodes[k][set >> (k * kGroup) & (kParts - 1)];
    node.w *= weights[j / 2];
    Sums found = visitor.visit(node, 0);
    error_of(found) *= weights[j / 2];
    IIO_OVER_MASKS
    for (int k = 0; k < groups; ++k) sums[k][set >> (k * kGroup) & (kParts - 1)] += found;
  }
  IIO_OVER_MASKS
  for (int k = 0; k < groups; ++k) {
    ReadTable<Visitor> read{visitor, sums[k], k * kGroup};
    walk<kGroup>(read, members[k], Node<V, kC>{}, 0);
  }
}

// Stages that visit a list.
constexpr bool is_listed(Stage stage) { return stage == Stage::listed_errors || stage == Stage::listed_gradients; }
constexpr bool has_gradients(Stage stage) { return stage != Stage::errors && stage != Stage::listed_errors; }
template <Stage stage>
constexpr int kMostMasks = is_listed(stage) ? kGroups * kGroup : kMasks;

// Channels first .. first + kC - 1 of a tile: adds to T and dd, stores dr and sum_i d_i dr_i.
template <Stage stage, int kC, class T>
IIO_INLINE void visit_subsets(const Tile<T>& tile, int64_t first, const Vec<T>* d, const Vec<T>* g, Vec<T>* sum_T,
                              Vec<T>* dd) {
  const Inpainting<T>& args = tile.image.args;
  const int K = int(args.K);
  Vec<T> X[kC];
  for (int c = 0; c < kC; ++c) X[c] = tile.X(first + c);
  constexpr int kMost = kMostMasks<stage>;
  Pixel<Vec<T>, kC, kMost> pixel;
  pixel.d = d;
  pixel.g = g;
  IIO_OVER_MASKS
  for (int i = 0; i < K; ++i) {
    for (int c = 0; c < kC; ++c) pixel.r[i][c] = rounded_product(X[c], d[i]) - tile.filtered(i, first + c);
  }
  const auto take = [&](const auto& visitor) {
    IIO_OVER_MASKS
    for (int i = 0; i < K; ++i) {
      sum_T[i] += visitor.T[i];
      dd[i] += visitor.dd[i];
      for (int c = 0; c < kC; ++c) {
        dd[i] += X[c] * visitor.dr[i][c];
        store(tile.at(i, first + c), visitor.dr[i][c]);
      }
    }
    if (!args.dimage) return;
    for (int c = 0; c < kC; ++c) {
      Vec<T> dX{};
      IIO_OVER_MASKS
      for (int i = 0; i < K; ++i) dX += d[i] * visitor.dr[i][c];
      tile.write(tile.result(args.dimage, args.C, first + c), dX);
    }
  };
  const auto take_errors = [&](const auto& visitor) {
    IIO_OVER_MASKS
    for (int i = 0; i < K; ++i) sum_T[i] += visitor.T[i];
  };
  if constexpr (is_listed(stage)) {
    const int groups = (K + kGroup - 1) / kGroup, all = groups * kGroup;
    for (int i = K; i < all; ++i) {  // no masks at all
      for (int c = 0; c < kC; ++c) pixel.r[i][c] = Vec<T>{};
    }
    const int64_t* const pairs = args.pairs + tile.image.b * args.P;
    if constexpr (stage == Stage::listed_errors) {
      Errors<Vec<T>, kMost> visitor(all);
      visit_listed(visitor, pixel, groups, pairs, args.pair_weights, args.P);
      take_errors(visitor);
    } else {
      Gradients<Vec<T>, kC, kMost> visitor(pixel, all);
      visit_listed(visitor, pixel, groups, pairs, args.pair_weights, args.P);
      take(visitor);
    }
  } else if constexpr (stage == Stage::errors) {
    Errors<Vec<T>, kMasks> visitor(K);
    visit_all(visitor, pixel, K);
    take_errors(visitor);
  } else if constexpr (stage == Stage::gradients) {
    Gradients<Vec<T>, kC, kMasks> visitor(pixel, K);
    visit_all(visitor, pixel, K);
    take(visitor);
  } else {
    const T* const weights = args.weights + tile.image.b * K * ((int64_t(1) << (K - 1)) - 1);
    WeightedGradients<Vec<T>, kC, kMasks, T> visitor(pixel, K, weights);
    walk_all<2>(visitor, pixel, K);
    take(visitor);
  }
}

// The stages `errors` and `gradients`, those of a list, and `weighted_gradients`. `finish` finds T in dmasks and sum_i d_i dr_i in dimage.
template <Stage stage, class T>
void subsets(Image<T> image, int64_t chunk) {
  const Chunk<T> tiles{image, chunk};
  const int64_t K = image.K, C = image.C;
  tiles.to_lanes_of_pixels();
  constexpr int kMost = kMostMasks<stage>, kDots = is_listed(stage) ? kListedMasks : kMasks;
  Vec<T> dots[kDots] = {};
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    Vec<T> d[kMost], g[kMost], sum_T[kMost], dd[kMost];
    if constexpr (is_listed(stage)) {
      for (int64_t i = K; i < kMost; ++i) d[i] = g[i] = Vec<T>{};
    }
    IIO_OVER_MASKS
    for (int64_t i = 0; i < K; ++i) {
      d[i] = tile.filtered(i, C);
      g[i] = tile.m(i) * image.scratch[image.inverse_norms + i];
      sum_T[i] = dd[i] = Vec<T>{};
    }
    int64_t c = 0;
    for (; c + 3 <= C; c += 3) visit_subsets<stage, 3>(tile, c, d, g, sum_T, dd);
    for (; c < C; ++c) visit_subsets<stage, 1>(tile, c, d, g, sum_T, dd);
    IIO_OVER_MASKS
    for (int64_t i = 0; i < K; ++i) {
      dots[i] += g[i] * sum_T[i];
      if constexpr (has_gradients(stage)) {
        store(tile.at(i, C), dd[i]);
        if (image.args.dmasks) tile.write(tile.result(image.args.dmasks, K, i), sum_T[i]);
      }
    }
  }
  for (int i = 0; i < kDots; i += kLanes<T>) {
    store(image.scratch + image.dots + chunk * kListedMasks + i, sums<T>(dots + i));
  }
  if constexpr (has_gradients(stage)) tiles.to_lanes_of_planes();
}

template <int kC, int kLow, class T>
IIO_INLINE void add_dots(const Tile<T>& tile, int64_t first, unsigned upper, Dots<Vec<T>, kMasks, kLow>& visitor) {
  Vec<T> d[kMasks], g[kMasks] = {};
  Pixel<Vec<T>, kC, kMasks> pixel;
  pixel.d = d;
  pixel.g = g;
  Node<Vec<T>, kC> node{};
  IIO_OVER_MASKS
  for (int i = visitor.K - 1; i >= 0; --i) {
    for (int c = 0; c < kC; ++c) pixel.r[i][c] = load(tile.at(i, first + c));
    d[i] = load(tile.at(i, tile.image.C));
    if (i >= kLow && (upper >> (i - kLow) & 1)) node = node.with(pixel, i);
  }
  walk<kLow>(visitor, pixel, node, 0);
}

constexpr int kEntropiesLow = 2;

template <class T>
void entropies(Image<T> image, int64_t upper) {
  constexpr int kLow = kEntropiesLow, kSets = 1 << kLow;
  constexpr int64_t kTiles = 64;  // added up in T, beyond that in double
  const int64_t K = image.K, C = image.C;
  double dots[kMasks][kSets] = {};
  for (int64_t first = 0; first < image.tiles; first += kTiles) {
    Dots<Vec<T>, kMasks, kLow> visitor;
    visitor.K = int(K);
    IIO_OVER_MASKS
    for (int64_t i = 0; i < K; ++i) {
      for (int set = 0; set < kSets; ++set) visitor.dots[i][set] = Vec<T>{};
    }
    for (int64_t t = first; t < image.tiles && t < first + kTiles; ++t) {
      const Tile<T> tile{image, t};
      IIO_OVER_MASKS
      for (int64_t i = 0; i < K; ++i) visitor.m[i] = tile.m(i);
      int64_t c = 0;
      for (; c + 3 <= C; c += 3) add_dots<3>(tile, c, unsigned(upper), visitor);
      for (; c < C; ++c) add_dots<1>(tile, c, unsigned(upper), visitor);
    }
    IIO_OVER_MASKS
    for (int64_t i = 0; i < K; ++i) {
      for (int set = 0; set < kSets; ++set) dots[i][set] += sum<T>(visitor.dots[i][set]);
    }
  }
  const int64_t terms = (int64_t(1) << (K - 1)) - 1;
  for (int low = 0; low < kSets; ++low) {
    const int64_t set = upper << kLow | low;
    for (int64_t i = 0; i < K; ++i) {
      if (set == 0 || (set >> i & 1)) continue;
      const int64_t others = (set >> (i + 1) << i) | (set & ((int64_t(1) << i) - 1));
      const T inverse_norm = image.scratch[image.inverse_norms + i];
      image.args.entropies[(image.b * K + i) * terms + others - 1] =
          inverse_norm == 0 ? 0 : T(dots[i][low] * inverse_norm / C);
    }
  }
}

template <class T>
void predictions(Image<T> image, int64_t chunk) {
  const Chunk<T> tiles{image, chunk};
  const int64_t K = image.K, C = image.C;
  tiles.to_lanes_of_pixels();
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    for (int64_t i = 0; i < K; ++i) {
      const Vec<T> d = tile.filtered(i, C);
      for (int64_t c = 0; c < C; ++c) {
        const Vec<T> psi = d == 0 ? Vec<T>{} : tile.filtered(i, c) / d;
        tile.write(tile.result(image.args.psi, K * C, i * C + c), psi);
      }
    }
  }
}

template <class T>
void prediction_gradients(Image<T> image, int64_t chunk) {
  const Chunk<T> tiles{image, chunk};
  const int64_t K = image.K, C = image.C;
  tiles.to_lanes_of_pixels();
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    for (int64_t i = 0; i < K; ++i) {
      const Vec<T> d = tile.filtered(i, C);
      Vec<T> dd{};
      for (int64_t c = 0; c < C; ++c) {
        const Vec<T> gradient = tile.read(tile.result(image.args.psi_gradient, K * C, i * C + c));
        const Vec<T> dr = d == 0 ? Vec<T>{} : -gradient / d;
        dd += rounded_product(d == 0 ? Vec<T>{} : tile.filtered(i, c) / d, dr);
        store(tile.at(i, c), dr);
      }
      store(tile.at(i, C), dd);
    }
  }
  tiles.to_lanes_of_planes();
}

template <class T>
void gradient_totals(Image<T> image) {
  const int64_t stride = image.groups * kLanes<T>;
  for (int64_t plane = 0; plane < stride; ++plane) {
    const double sum = add_parts(image.scratch + image.sums + plane, image.chunks, stride);
    image.scratch[image.gradient_totals + plane] = T(image.args.eps * sum);
  }
}

template <class T>
void losses(Image<T> image) {
  double loss = 0;
  for (int64_t i = 0; i < image.K; ++i) {
    const double mean = add_parts(image.scratch + image.dots + i, image.chunks, kListedMasks);
    image.scratch[image.mean_errors + i] = T(mean);
    loss -= mean;
  }
  if (image.args.losses) image.args.losses[image.b] = T(loss / image.C);
}

// With F for the filter, and T, dr and dd times their common factor, the loss's sign and 1 / C:
//
//     dm_i = F(dd_i) - sum_c X_c F(dr_{i,c}) + (T_i - <g_i, T_i>) / ||m_i||
//     dX_c = sum_i (d_i dr_{i,c} - m_i F(dr_{i,c}))
template <class T>
void finish(Image<T> image, int64_t chunk) {
  const Inpainting<T>& args = image.args;
  const Chunk<T> tiles{image, chunk};
  const int64_t K = image.K, C = image.C;
  const T factor = args.psi_gradient ? T(1) : (args.weights ? 1 : -1) / T(C);
  tiles.to_lanes_of_pixels();
  for (int64_t t = tiles.first; t < tiles.last; ++t) {
    const Tile<T> tile{image, t};
    if (args.dmasks) {
      for (int64_t i = 0; i < K; ++i) {
        T* const result = tile.result(args.dmasks, K, i);
        Vec<T> sum{};
        for (int64_t c = 0; c < C; ++c) sum += rounded_product(tile.X(c), tile.filtered_gradient(i, c));
        Vec<T> dm = tile.filtered_gradient(i, C) - sum;
        if (!args.psi_gradient) {
          const T mean_error = image.scratch[image.mean_errors + i];
          dm += (tile.read(result) - mean_error) * image.scratch[image.inverse_norms + i];
        }
        tile.write(result, factor * dm);
      }
    }
    if (args.dimage) {
      for (int64_t c = 0; c < C; ++c) {
        T* const result = tile.result(args.dimage, C, c);
        Vec<T> dX = args.psi_gradient ? Vec<T>{} : tile.read(result);
        for (int64_t i = 0; i < K; ++i) dX -= tile.m(i) * tile.filtered_gradient(i, c);
        tile.write(result, factor * dX);
      }
    }
  }
}

// ---- Entries --------------------------------------------------------------------------------------------------------

template <class T>
int64_t image_scratch(const Inpainting<T>& args) {
  return Layout<T>(args).size;
}

template <class T>
int64_t thread_scratch(const Inpainting<T>& args) {
  return 2 * (args.H > args.W ? args.H : args.W) * kLanes<T>;
}

template <class T>
int64_t units(const Inpainting<T>& args, Stage stage) {
  const Layout<T> layout(args);
  switch (stage) {
    case Stage::totals:
    case Stage::losses:
    case Stage::gradient_totals: return 1;
    case Stage::rows: return layout.groups * args.H;
    case Stage::columns: return layout.groups * args.W;
    case Stage::entropies: return int64_t(1) << (args.K - kEntropiesLow);
    default: return layout.chunks;
  }
}

template <class T>
void run(const Inpainting<T>& args, Stage stage, int64_t b, int64_t first, int64_t last, T* image_scratch,
         T* thread_scratch) {
  constexpr int L = kLanes<T>;
  const Image<T> image(args, b, image_scratch);
  for (int64_t unit = first; unit < last; ++unit) {
    switch (stage) {
      case Stage::products: products(image, unit); break;
      case Stage::totals: totals(image); break;
      case Stage::rows:
        filter_line(image.pixel(unit / args.H, unit % args.H * args.W), L, args.W, args, thread_scratch);
        break;
      case Stage::columns:
        filter_line(image.pixel(unit / args.W, unit % args.W), image.row_stride, args.H, args, thread_scratch);
        break;
      case Stage::residuals: residuals(image, unit); break;
      case Stage::entropies: entropies(image, unit); break;
      case Stage::errors: subsets<Stage::errors>(image, unit); break;
      case Stage::gradients: subsets<Stage::gradients>(image, unit); break;
      case Stage::weighted_gradients: subsets<Stage::weighted_gradients>(image, unit); break;
      case Stage::listed_errors: subsets<Stage::listed_errors>(image, unit); break;
      case Stage::listed_gradients: subsets<Stage::listed_gradients>(image, unit); break;
      case Stage::predictions: predictions(image, unit); break;
      case Stage::prediction_gradients: prediction_gradients(image, unit); break;
      case Stage::losses: losses(image); break;
      case Stage::gradient_totals: gradient_totals(image); break;
      case Stage::finish: finish(image, unit); break;
    }
  }
}

}  // namespace

const InpaintingKernels<float> inpainting_float = {image_scratch<float>, thread_scratch<float>, units<float>,
                                                   run<float>};
const InpaintingKernels<double> inpainting_double = {image_scratch<double>, thread_scratch<double>, units<double>,
                                                     run<double>};

}  // namespace iio::IIO_ISA
