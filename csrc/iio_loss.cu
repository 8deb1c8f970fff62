// Inpainting and the IIO loss on a GPU. A call queues a few kernels, each for all images:
//
//     products   planes <- X_c m_i and m_i, filtered; the sums of the products over each tile
//     subsets    planes <- dr and dd, dmasks <- T, dimage <- sum_i d_i dr_i; sums over each chunk of pixels
//     finish     dmasks and dimage, from the planes filtered again; the loss
//
// Where no gradient is asked for `subsets` makes T alone, and `losses` follows. `listed`, of a list of sets, `entropies`,
// `predictions` and `prediction_gradients` stand in the place of `subsets`; after `listed` comes what follows `subsets`,
// after the last of them `finish`.
//
// `products` and `finish` filter tiles in shared memory, with as much around a tile as reaches its pixels. A filter too
// wide for that goes through global memory, a kernel `pass` for each pass along an axis.
//
// Sums over an image's pixels are added up in T within a block, then in double over the blocks by whoever needs them,
// always in the same order. Names are those of subsets.h; the planes are (B, K, C + 1, H * W), in scratch memory.
#include "iio_loss_cuda.h"

#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <utility>

#include "subsets.h"

extern __shared__ double dynamic_shared[];

namespace iio::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kTileThreads = 256;      // of a block that has a tile
constexpr int kChunk = 128;            // pixels, and threads, of a block that has a thread for each pixel
constexpr int kMostShared = 96 << 10;  // bytes for a block: from compute capability 8.0 on a GPU has 99 KB or more
constexpr int kRun = 8;                // outputs of the filter that a thread makes at a time
constexpr int kMostMasks = 16;         // whose subsets are visited
constexpr int kUnrolled = 2;           // levels of their tree that are unrolled
constexpr int kPairs = 4;              // of a list, in registers at a time
constexpr int kEntropiesLow = 2;       // masks whose subsets a block of `entropies` visits
constexpr double kNegligible = 1e-20;  // mask values below this count as 0, see reference.py

// ---- What a kernel is given -----------------------------------------------------------------------------------------

// How images are cut into tiles. A tile is filtered in shared memory, `passes` times along each axis: as often as is
// asked for, or not at all. Around it is what reaches it, which at the image's border is zeros, `radius` wide, and at the
// far ends room for a run of outputs that is not full.
struct Tiling {
  int rows, columns;  // of a tile
  int down, across;   // tiles of an image
  int passes;
  int lines, pitch;  // in shared memory

  Tiling(int H, int W, int radius, int passes, int most) : passes(passes) {
    const auto parts = [](int n, int length) { return (n + length - 1) / length; };
    rows = parts(H, parts(H, most));  // alike in size
    columns = parts(W, parts(W, most));
    down = parts(H, rows);
    across = parts(W, columns);
    const auto room = [=](int own, int n, int tiles) {
      const int reach = passes * radius, outer = tiles > 2 || reach < radius ? reach : radius;
      const int wanted = own + outer + reach, there = n + 2 * radius;
      return (wanted < there ? wanted : there) + kRun - 1;
    };
    lines = room(rows, H, down);
    pitch = room(columns, W, across) | 1;  // odd: neighbouring rows begin in neighbouring banks
  }
};

template <class T>
struct Work {
  const Inpainting<T> args;
  const int64_t B;
  const int K = int(args.K), C = int(args.C), H = int(args.H), W = int(args.W), pixels = H * W, planes = K * (C + 1);
  const int radius = int(args.radius), repeats = int(args.repeats);
  const double sum_of_taps = add_taps();
  const Tiling tiling = best_tiling();
  const int tiles = tiling.down * tiling.across, chunks = (pixels + kChunk - 1) / kChunk;

  T* const scratch;
  int64_t size = 0;                                                            // of scratch memory
  T* const filtered = part(B * planes * pixels);                               // (B, K, C + 1, H * W): the planes
  T* const half_filtered = part(tiling.passes > 0 ? 0 : B * planes * pixels);  // the same, for `pass`
  T* const sums = part(B * planes * tiles);                                    // (B, K, C + 1, tiles): of the products
  T* const gradient_sums = part(B * planes * chunks);                          // (B, K, C + 1, chunks): of dr and dd
  T* const dots = part(B * K * chunks);                                        // (B, K, chunks): <g_i, T_i>
  T* const listed_sums = part(args.pairs ? B * K * (C + 2) * pixels : 0);      // (B, K, C + 2, H * W): dr, dd and T

  Work(const Inpainting<T>& args, int64_t B, T* scratch) : args(args), B(B), scratch(scratch) {}

  // Mask i's plane of channel c, or with c = C its own, among all planes.
  __device__ int64_t index(int b, int i, int c) const { return (int64_t(b) * K + i) * (C + 1) + c; }
  __device__ T* plane(int b, int i, int c) const { return filtered + index(b, i, c) * pixels; }

  // Inputs and results at pixel p.
  __device__ T X(int b, int c, int p) const {
    return args.image.data[b * args.image.image_stride + c * args.image.plane_stride + p];
  }
  __device__ T m(int b, int i, int p) const {
    const T x = args.masks.data[b * args.masks.image_stride + i * args.masks.plane_stride + p];
    return absolute(x) < T(kNegligible) ? 0 : x;
  }
  __device__ T& dX(int b, int c, int p) const { return args.dimage[(int64_t(b) * C + c) * pixels + p]; }
  __device__ T& dm(int b, int i, int p) const { return args.dmasks[(int64_t(b) * K + i) * pixels + p]; }
  __device__ int64_t psi(int b, int i, int c, int p) const { return ((int64_t(b) * K + i) * C + c) * pixels + p; }

  // Shared memory of the kernels that have a tile, in T: see TileMemory.
  int64_t tile_shared(const Tiling& tiling) const {
    const int64_t taps = tiling.passes > 0 ? radius + 1 : 0, sums = kTileThreads / kWarp + C + 3;
    return taps + 2 * int64_t(tiling.lines) * tiling.pitch + tiling.rows * tiling.columns + sums;
  }

 private:
  T* part(int64_t length) {
    T* const start = scratch ? scratch + size : nullptr;
    size += length;
    return start;
  }

  // The largest tiles whose filter fits, or such as are filtered elsewhere.
  Tiling best_tiling() const {
    for (const int most : {64, 32, 16}) {
      const Tiling tiling(H, W, radius, repeats, most);
      if (tile_shared(tiling) * int64_t(sizeof(T)) <= kMostShared) return tiling;
    }
    return Tiling(H, W, radius, 0, 32);  // 64 by 64 and their surroundings do not fit in double
  }

  double add_taps() const {
    double sum = 1;
    for (int t = 1; t <= radius; ++t) sum += 2 * std::exp(-0.5 * (t / args.sigma) * (t / args.sigma));
    return sum;
  }
};

// ---- Sums over threads ----------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warps() { return blockDim.x / kWarp; }

template <class T>
__device__ T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared);
}

template <class T>
__device__ __forceinline__ T exchange(T x, int with) {
  return __shfl_xor_sync(0xffffffff, x, with);
}

// Lane k returns the sum of x[k] over the warp, for n <= 32 values at once: at each step two lanes share out what both
// hold, one taking over the first half, the other one the second.
template <int n, int half = kWarp / 2, class T>
__device__ __forceinline__ T warp_sums(T* x) {
  if constexpr (half == 0) {
    return x[0];
  } else {
    constexpr int kept = n < half ? n : half;
    const bool second = threadIdx.x & half;
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      const T far = k + half < n ? x[k + half] : 0;
      const T received = exchange(second ? x[k] : far, half);
      x[k] = (second ? far : x[k]) + received;
    }
    return warp_sums<kept, half / 2>(x);
  }
}

// take(k, the sum of x[k] over the block), by one thread for each k < n. `shared` has room for n values a warp.
template <int n, int first = 0, class T, class Take>
__device__ __forceinline__ void block_sums(T* x, T* shared, const Take& take) {
  constexpr int count = n - first < kWarp ? n - first : kWarp;
  const T sum = warp_sums<count>(x + first);
  if (lane() < count) shared[warp() * n + first + lane()] = sum;
  if constexpr (first + count < n) {
    block_sums<n, first + count>(x, shared, take);
  } else {
    __syncthreads();
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
      T all = 0;
      for (int w = 0; w < warps(); ++w) all += shared[w * n + k];
      take(k, all);
    }
    __syncthreads();  // `shared` may be used again
  }
}

// The sum of what blocks have left in global memory, by kLanes lanes of a warp together. All lanes have to come.
template <int kLanes = kWarp, class T>
__device__ double add_parts(const T* parts, int count) {
  double sum = 0;
  for (int k = threadIdx.x % kLanes; k < count; k += kLanes) sum += parts[k];
  for (int half = kLanes / 2; half > 0; half /= 2) sum += exchange(sum, half);
  return sum;
}

// ---- The filter -----------------------------------------------------------------------------------------------------

struct Range {
  int first, last;

  __device__ int size() const { return last - first; }
  __device__ bool holds(int j) const { return j >= first && j < last; }
};

// One axis of a tile and what lies around it. Positions count from the first in shared memory, `origin` in the image.
struct Axis {
  int origin, size;
  Range own, image;

  __device__ Axis(int first, int last, int n, int reach, int radius)
      : origin(max(first - reach, -radius)),
        size(min(last + reach, n + radius) - origin),
        own{first - origin, last - origin},
        image{-origin, n - origin} {}

  // Pixels of the image up to a distance from its own.
  __device__ Range within(int distance) const {
    return {max(own.first - distance, image.first), min(own.last + distance, image.last)};
  }
};

struct Tile {
  Axis down, across;

  template <class T>
  __device__ Tile(const Work<T>& work, int tile)
      : down(axis(work, tile / work.tiling.across, work.tiling.rows, work.H)),
        across(axis(work, tile % work.tiling.across, work.tiling.columns, work.W)) {}

 private:
  template <class T>
  static __device__ Axis axis(const Work<T>& work, int part, int length, int n) {
    const int first = part * length, last = min(first + length, n);
    return {first, last, n, work.tiling.passes * work.radius, work.radius};
  }
};

// The filter from its middle outwards.
template <class T>
__device__ void make_taps(const Work<T>& work, T* taps) {
  for (int t = threadIdx.x; t <= work.radius; t += blockDim.x) {
    const double distance = t / work.args.sigma;
    taps[t] = T(exp(-0.5 * distance * distance) / work.sum_of_taps);
  }
}

// A block's shared memory.
template <class T>
struct TileMemory {
  T *taps, *from, *to;  // (radius + 1,), (lines, pitch), (lines, pitch): before and after a pass
  T* own;               // (rows, columns): of the tile alone
  T* sums;              // (warps + C + 3,)

  __device__ explicit TileMemory(const Work<T>& work) {
    const Tiling& tiling = work.tiling;
    taps = shared_memory<T>();
    from = taps + (tiling.passes > 0 ? work.radius + 1 : 0);
    to = from + tiling.lines * tiling.pitch;
    own = to + tiling.lines * tiling.pitch;
    sums = own + tiling.rows * tiling.columns;
    if (tiling.passes > 0) make_taps(work, taps);
  }
};

// kRun outputs of a pass, the first at x[0]. The radius is known when compiled, or 0.
template <int kRadius, class T>
__device__ __forceinline__ void filter_run(const T* x, int stride, const T* taps, int any_radius, T* out) {
  const int radius = kRadius ? kRadius : any_radius;
  T left[kRun], right[kRun];  // left[k] = x[k - t], right[k] = x[k + t]
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    left[k] = right[k] = x[k * stride];
    out[k] = taps[0] * left[k];
  }
#pragma unroll
  for (int t = 1; t <= radius; ++t) {
#pragma unroll
    for (int k = kRun - 1; k > 0; --k) left[k] = left[k - 1];
#pragma unroll
    for (int k = 0; k < kRun - 1; ++k) right[k] = right[k + 1];
    left[0] = x[-t * stride];
    right[kRun - 1] = x[(kRun - 1 + t) * stride];
#pragma unroll
    for (int k = 0; k < kRun; ++k) out[k] += taps[t] * (left[k] + right[k]);
  }
}

// A pass along lines: store(line, j, output), where x[line * line_stride + j * stride] is a line's j-th pixel. Threads
// that are neighbours have neighbouring lines.
template <int kRadius, class T, class Store>
__device__ __forceinline__ void filter_lines(Range lines, int line_stride, Range outputs, int stride, const T* x,
                                             const T* taps, int radius, const Store& store) {
  const int runs = (outputs.size() + kRun - 1) / kRun;
  for (int item = threadIdx.x; item < runs * lines.size(); item += blockDim.x) {
    const int run = item / lines.size();
    const int line = lines.first + item - run * lines.size(), j = outputs.first + run * kRun;
    T out[kRun];
    filter_run<kRadius>(x + line * line_stride + j * stride, stride, taps, radius, out);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (j + k < outputs.last) store(line, j + k, out[k]);
    }
  }
}

// Filters a tile: take(y, x, output) for its pixels, from load(y, x) for these and those that reach them. Whatever the
// plane, a pixel is taken by the same thread.
template <int kRadius, class T, class Load, class Take>
__device__ void filter(const Work<T>& work, const Tile& tile, const TileMemory<T>& memory, const Load& load,
                       const Take& take) {
  const Axis &down = tile.down, &across = tile.across;
  const int pitch = work.tiling.pitch, radius = work.radius, passes = work.tiling.passes;
  T *from = memory.from, *to = memory.to;
  for (int k = threadIdx.x; k < down.size * across.size; k += blockDim.x) {
    const int y = k / across.size, x = k - y * across.size;
    if (down.image.holds(y) && across.image.holds(x)) {
      from[y * pitch + x] = load(down.origin + y, across.origin + x);
    } else {
      from[y * pitch + x] = to[y * pitch + x] = 0;
    }
  }
  __syncthreads();
  const auto done = [&] {
    __syncthreads();
    T* const before = from;
    from = to;
    to = before;
  };
  // Each pass is made as far out as those after it look.
  for (int left = passes - 1; left >= 0; --left) {
    filter_lines<kRadius>(down.within(passes * radius), pitch, across.within(left * radius), 1, from, memory.taps,
                          radius, [=](int y, int x, T out) { to[y * pitch + x] = out; });
    done();
  }
  for (int left = passes - 1; left > 0; --left) {
    filter_lines<kRadius>(across.own, 1, down.within(left * radius), pitch, from, memory.taps, radius,
                          [=](int x, int y, T out) { to[y * pitch + x] = out; });
    done();
  }
  if (passes > 0) {
    filter_lines<kRadius>(across.own, 1, down.own, pitch, from, memory.taps, radius,
                          [&](int x, int y, T out) { take(down.origin + y, across.origin + x, out); });
  } else {
    for (int k = threadIdx.x; k < down.size * across.size; k += blockDim.x) {
      const int y = k / across.size, x = k - y * across.size;
      take(down.origin + y, across.origin + x, from[y * pitch + x]);
    }
  }
  __syncthreads();  // shared memory may be used again
}

// A block for each tile of each plane.
template <int kRadius, class T>
__global__ void __launch_bounds__(kTileThreads, 2) products(const __grid_constant__ Work<T> work) {
  const int plane = blockIdx.x / work.tiles, t = blockIdx.x - plane * work.tiles;
  const int c = plane % (work.C + 1), i = plane / (work.C + 1) % work.K, b = plane / work.planes;
  const TileMemory<T> memory(work);
  const Tile tile(work, t);
  T sum = 0;
  const auto load = [&](int y, int x) {
    const int p = y * work.W + x;
    const T m = work.m(b, i, p), product = c < work.C ? work.X(b, c, p) * m : m;
    if (tile.down.own.holds(y - tile.down.origin) && tile.across.own.holds(x - tile.across.origin)) sum += product;
    return product;
  };
  T* const filtered = work.plane(b, i, c);
  filter<kRadius>(work, tile, memory, load, [&](int y, int x, T out) { filtered[y * work.W + x] = out; });
  block_sums<1>(&sum, memory.sums, [&](int, T all) { work.sums[work.index(b, i, c) * work.tiles + t] = all; });
}

// One pass over all planes, along rows or columns: a thread for each pixel.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    pass(const __grid_constant__ Work<T> work, const T* from, T* to, bool along_rows) {
  T* const taps = shared_memory<T>();
  make_taps(work, taps);
  __syncthreads();
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= work.B * work.planes * work.pixels) return;
  const int p = int(k % work.pixels), y = p / work.W, x = p - y * work.W;
  const int j = along_rows ? x : y, n = along_rows ? work.W : work.H, stride = along_rows ? 1 : work.W;
  T out = taps[0] * from[k];
  for (int t = 1; t <= work.radius; ++t) {
    const int64_t distance = int64_t(t) * stride;
    out += taps[t] * ((j - t >= 0 ? from[k - distance] : 0) + (j + t < n ? from[k + distance] : 0));
  }
  to[k] = out;
}

// ---- Subsets --------------------------------------------------------------------------------------------------------

// a b, rounded: kept out of a fused multiply-add, so that what is equal on paper cancels.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 0 for an empty mask. For an infinite one not 1 / infinity = 0, which would pass for that, but NaN.
template <class T>
__device__ T inverse(double norm) {
  return norm == 0 ? 0 : T(1 / norm + (norm - norm));
}

// What a block of `subsets` or `entropies` knows of its image, in shared memory.
template <class T>
struct Totals {
  T* const totals = shared_memory<T>();  // (K, C + 1): the eps term of each plane
  T* const inverse_norms;                // (K,): 1 / ||m_i||, or 0
  T* const free;                         // what is left

  __device__ Totals(const Work<T>& work, int b) : inverse_norms(totals + work.planes), free(inverse_norms + work.K) {
    constexpr int kLanes = 8;
    for (int first = 0; first < work.planes; first += blockDim.x / kLanes) {
      const int plane = first + threadIdx.x / kLanes, i = plane / (work.C + 1);
      const T* const parts = work.sums + (int64_t(b) * work.planes + plane) * work.tiles;
      const double sum = add_parts<kLanes>(parts, plane < work.planes ? work.tiles : 0);
      if (plane >= work.planes || threadIdx.x % kLanes > 0) continue;
      totals[plane] = T(work.args.eps * sum);
      if (plane == i * (work.C + 1) + work.C) inverse_norms[i] = inverse<T>(sum);
    }
    __syncthreads();
  }

  // In T, where also n values are added up over a block.
  static int64_t shared(const Work<T>& work, int n, int threads) {
    return work.planes + work.K + n * (threads / kWarp);
  }
};

// A pixel of an image, or with p < 0 none: then all is 0.
template <class T>
struct At {
  const Work<T>& work;
  const Totals<T>& image;
  const int b, p;

  __device__ T X(int c) const { return p < 0 ? 0 : work.X(b, c, p); }
  __device__ T m(int i) const { return p < 0 ? 0 : work.m(b, i, p); }
  __device__ T filtered(int i, int c) const {
    return p < 0 ? 0 : work.plane(b, i, c)[p] + image.totals[i * (work.C + 1) + c];
  }
};

template <Stage stage, int K, int kC, class T>
struct Visitor;
template <int K, int kC, class T>
struct Visitor<Stage::errors, K, kC, T> : Errors<T, K> {
  __device__ Visitor(const Work<T>&, int, const Pixel<T, kC, K>&) : Errors<T, K>(K) {}
};
template <int K, int kC, class T>
struct Visitor<Stage::gradients, K, kC, T> : Gradients<T, kC, K> {
  __device__ Visitor(const Work<T>&, int, const Pixel<T, kC, K>& pixel) : Gradients<T, kC, K>(pixel, K) {}
};
template <int K, int kC, class T>
struct Visitor<Stage::weighted_gradients, K, kC, T> : WeightedGradients<T, kC, K, T> {
  __device__ Visitor(const Work<T>& work, int b, const Pixel<T, kC, K>& pixel)
      : WeightedGradients<T, kC, K, T>(pixel, K, work.args.weights + int64_t(b) * K * ((1 << (K - 1)) - 1)) {}
};

// A block for each chunk of each image. C is a multiple of kC.
template <Stage stage, int K, int kC, class T>
__global__ void __launch_bounds__(kChunk, 2) subsets(const __grid_constant__ Work<T> work) {
  constexpr bool gradients = stage != Stage::errors;
  const int b = blockIdx.x / work.chunks, chunk = blockIdx.x - b * work.chunks, C = work.C;
  const int p = chunk * kChunk + threadIdx.x;
  const bool inside = p < work.pixels;
  const Totals<T> image(work, b);
  const At<T> at{work, image, b, inside ? p : -1};
  T d[K], g[K], sum_T[K], dd[K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    d[i] = at.filtered(i, C);
    g[i] = at.m(i) * image.inverse_norms[i];
    sum_T[i] = dd[i] = 0;
  }
  for (int first = 0; first < C; first += kC) {
    T X[kC];
    Pixel<T, kC, K> pixel;
    pixel.d = d;
    pixel.g = g;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      X[c] = at.X(first + c);
#pragma unroll
      for (int i = 0; i < K; ++i) pixel.r[i][c] = rounded_product(X[c], d[i]) - at.filtered(i, first + c);
    }
    Visitor<stage, K, kC, T> visitor(work, b, pixel);
#pragma unroll
    for (int i = 0; i < K; ++i) {  // it goes on from the channels before: fewer numbers to keep
      visitor.T[i] = sum_T[i];
      if constexpr (gradients) visitor.dd[i] = dd[i];
    }
    walk_in_turns<K, kUnrolled>(visitor, pixel, Node<T, kC>{}, 0);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      sum_T[i] = visitor.T[i];
      if constexpr (gradients) dd[i] = visitor.dd[i];
    }
    if constexpr (gradients) {
      T dr[K * kC];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        T dX = 0;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const T x = dr[i * kC + c] = visitor.dr[i][c];
          dd[i] += X[c] * x;
          dX += d[i] * x;
          if (inside) work.plane(b, i, first + c)[p] = x;
        }
        if (inside && work.args.dimage) work.dX(b, first + c, p) = dX;
      }
      block_sums<K * kC>(dr, image.free, [&](int k, T sum) {
        work.gradient_sums[work.index(b, k / kC, first + k % kC) * work.chunks + chunk] = sum;
      });
    }
  }
  T sums[2 * K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    sums[i] = g[i] * sum_T[i];
    sums[K + i] = dd[i];
    if (gradients && inside) {
      work.plane(b, i, C)[p] = dd[i];
      if (work.args.dmasks) work.dm(b, i, p) = sum_T[i];
    }
  }
  block_sums<gradients ? 2 * K : K>(sums, image.free, [&](int k, T sum) {
    if (k < K) {
      work.dots[(int64_t(b) * K + k) * work.chunks + chunk] = sum;
    } else {
      work.gradient_sums[work.index(b, k - K, C) * work.chunks + chunk] = sum;
    }
  });
}

// Some pairs of complements, in registers, while the masks pass by: once to make the pairs' nodes, once to get what is
// theirs. The branches are the same for all of a block's threads.
template <int kC, class T>
struct Pairs {
  int64_t words[kPairs];
  T weights[kPairs];
  Node<T, kC> nodes[kPairs][2] = {};
  GradientSums<T, kC> found[kPairs][2];

  __device__ Pairs(const Inpainting<T>& args, int b, int64_t first) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const bool exists = first + j < args.P;
      words[j] = exists ? args.pairs[b * args.P + first + j] : 0;
      weights[j] = exists ? args.pair_weights[first + j] : 0;
    }
  }

  __device__ void add(int i, const Pixel<T, kC, 1>& mask) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      Node<T, kC>* const node = nodes[j];
      if (words[j] >> i & 1) {
        node[0] = node[0].with(mask, 0);
        node[1] = node[1].without(mask, 0);
      } else {
        node[0] = node[0].without(mask, 0);
        node[1] = node[1].with(mask, 0);
      }
    }
  }

  // Makes `found`; returns the sum of w e.
  __device__ T visit() {
    T sum = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Node<T, kC>& node = nodes[j][k];
        const T w = node.w * weights[j];
        found[j][k] = GradientSums<T, kC>(node, w);
        sum += w * found[j][k].e;
        found[j][k].e *= weights[j];
        // A residual that is NaN or infinite makes dr of its channel NaN, which no sum of signs would do.
        for (int c = 0; c < kC; ++c) found[j][k].toward_R[c] += 0 * (nodes[j][0].R[c] + nodes[j][1].R[c]);
      }
    }
    return sum;
  }

  // For mask i: the sums of its sets, with e from the sets without it.
  __device__ GradientSums<T, kC> of_mask(int i) const {
    GradientSums<T, kC> sums{};
    const auto take = [&](const GradientSums<T, kC>& own, const GradientSums<T, kC>& other) {
      const T e = sums.e + other.e;
      sums += own;
      sums.e = e;
    };
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (words[j] >> i & 1) {
        take(found[j][0], found[j][1]);
      } else {
        take(found[j][1], found[j][0]);
      }
    }
    return sums;
  }
};

// As `subsets`, of a list, and of any number of masks.
template <Stage stage, int kC, class T>
__global__ void __launch_bounds__(kChunk, 2) listed(const __grid_constant__ Work<T> work) {
  constexpr bool gradients = stage == Stage::listed_gradients;
  const int b = blockIdx.x / work.chunks, chunk = blockIdx.x - b * work.chunks, C = work.C, K = work.K;
  const int p = chunk * kChunk + threadIdx.x;
  const bool inside = p < work.pixels;
  const Totals<T> image(work, b);
  const At<T> at{work, image, b, inside ? p : -1};
  const auto sum = [&](int i, int c) -> T& {  // c: a channel, C for dd, C + 1 for T
    return work.listed_sums[((int64_t(b) * K + i) * (C + 2) + c) * work.pixels + p];
  };
  T loss = 0;
  for (int first = 0; first < C; first += kC) {
    T X[kC];
#pragma unroll
    for (int c = 0; c < kC; ++c) X[c] = at.X(first + c);
    for (int64_t pair = 0; pair < work.args.P; pair += kPairs) {
      Pairs<kC, T> pairs(work.args, b, pair);
      for (int i = 0; i < K; ++i) {
        const T d = at.filtered(i, C), g = at.m(i) * image.inverse_norms[i];
        Pixel<T, kC, 1> mask;
        mask.d = &d;
        mask.g = &g;
#pragma unroll
        for (int c = 0; c < kC; ++c) mask.r[0][c] = rounded_product(X[c], d) - at.filtered(i, first + c);
        pairs.add(i, mask);
      }
      loss += pairs.visit();
      if constexpr (gradients) {
        for (int i = 0; inside && i < K; ++i) {
          const GradientSums<T, kC> sums = pairs.of_mask(i);
          for (int c = 0; c < kC; ++c) sum(i, first + c) = (pair == 0 ? 0 : sum(i, first + c)) + sums.toward_R[c];
          const bool begins = pair == 0 && first == 0;
          sum(i, C) = (begins ? 0 : sum(i, C)) - sums.toward_D;
          sum(i, C + 1) = (begins ? 0 : sum(i, C + 1)) + sums.e;
        }
      }
    }
    if constexpr (gradients) {
      T dX[kC] = {};
      for (int i = 0; i < K; ++i) {
        const T d = at.filtered(i, C);
        T dr[kC] = {};
        for (int c = 0; inside && c < kC; ++c) {
          const T x = work.plane(b, i, first + c)[p] = dr[c] = sum(i, first + c);
          sum(i, C) += X[c] * x;
          dX[c] += d * x;
        }
        block_sums<kC>(dr, image.free, [&](int c, T all) {
          work.gradient_sums[work.index(b, i, first + c) * work.chunks + chunk] = all;
        });
      }
      for (int c = 0; inside && work.args.dimage && c < kC; ++c) work.dX(b, first + c, p) = dX[c];
    }
  }
  if constexpr (gradients) {
    for (int i = 0; i < K; ++i) {
      T sums[2] = {};  // of g T and dd
      if (inside) {
        const T error = sum(i, C + 1);
        work.plane(b, i, C)[p] = sums[1] = sum(i, C);
        sums[0] = at.m(i) * image.inverse_norms[i] * error;
        if (work.args.dmasks) work.dm(b, i, p) = error;
      }
      block_sums<2>(sums, image.free, [&](int k, T all) {
        if (k == 0) {
          work.dots[(int64_t(b) * K + i) * work.chunks + chunk] = all;
        } else {
          work.gradient_sums[work.index(b, i, C) * work.chunks + chunk] = all;
        }
      });
    }
  } else {
    block_sums<1>(&loss, image.free, [&](int, T all) {  // no mask's own, but their sum
      for (int i = 0; i < K; ++i) work.dots[(int64_t(b) * K + i) * work.chunks + chunk] = i == 0 ? all : 0;
    });
  }
}

// A block for each image and each set of masks kEntropiesLow .. K-1.
template <int K, int kC, class T>
__global__ void __launch_bounds__(kTileThreads, 1) entropies(const __grid_constant__ Work<T> work) {
  constexpr int kLow = kEntropiesLow, kSets = 1 << kLow, kTerms = (1 << (K - 1)) - 1;
  const int b = blockIdx.x >> (K - kLow), upper = blockIdx.x & ((1 << (K - kLow)) - 1), C = work.C;
  const Totals<T> image(work, b);
  Dots<T, K, kLow> visitor{};
  for (int p = threadIdx.x; p < work.pixels; p += kTileThreads) {
    const At<T> at{work, image, b, p};
    T d[K], g[K];
#pragma unroll
    for (int i = 0; i < K; ++i) {
      visitor.m[i] = at.m(i);
      d[i] = at.filtered(i, C);
      g[i] = 0;
    }
    for (int first = 0; first < C; first += kC) {
      Pixel<T, kC, K> pixel;
      pixel.d = d;
      pixel.g = g;
      Node<T, kC> node{};
#pragma unroll
      for (int i = K - 1; i >= 0; --i) {
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          pixel.r[i][c] = rounded_product(at.X(first + c), d[i]) - at.filtered(i, first + c);
        }
        if (i >= kLow && (upper >> (i - kLow) & 1)) node = node.with(pixel, i);
      }
      walk<kLow>(visitor, pixel, node, 0);
    }
  }
  block_sums<K * kSets>(&visitor.dots[0][0], image.free, [&](int k, T dot) {
    const int i = k / kSets, set = upper << kLow | k % kSets;
    if (set == 0 || (set >> i & 1)) return;
    const int others = (set >> (i + 1) << i) | (set & ((1 << i) - 1));
    const T by_norm = image.inverse_norms[i];
    work.args.entropies[(int64_t(b) * K + i) * kTerms + others - 1] = by_norm == 0 ? 0 : dot * by_norm / C;
  });
}

// ---- Predictions ----------------------------------------------------------------------------------------------------

// A pixel and a mask: in both kernels a block has a chunk of an image for one mask.
template <class T>
struct AtMask {
  const Work<T>& work;
  int chunk, i, b, p;
  bool inside;

  __device__ explicit AtMask(const Work<T>& work) : work(work) {
    const int mask = blockIdx.x / work.chunks;
    chunk = blockIdx.x - mask * work.chunks;
    i = mask % work.K;
    b = mask / work.K;
    p = chunk * kChunk + threadIdx.x;
    inside = p < work.pixels;
  }

  __device__ T filtered(int c) const {
    const T total = T(work.args.eps * add_parts(work.sums + work.index(b, i, c) * work.tiles, work.tiles));
    return inside ? work.plane(b, i, c)[p] + total : 0;
  }
};

template <class T>
__global__ void __launch_bounds__(kChunk) predictions(const __grid_constant__ Work<T> work) {
  const AtMask<T> at(work);
  const T d = at.filtered(work.C);
  for (int c = 0; c < work.C; ++c) {
    const T n = at.filtered(c);
    if (at.inside) work.args.psi[work.psi(at.b, at.i, c, at.p)] = d == 0 ? 0 : n / d;
  }
}

// planes <- dr = - dn and dd
template <class T>
__global__ void __launch_bounds__(kChunk) prediction_gradients(const __grid_constant__ Work<T> work) {
  const AtMask<T> at(work);
  const auto store = [&](int c, T x) {
    if (at.inside) work.plane(at.b, at.i, c)[at.p] = x;
    block_sums<1>(&x, shared_memory<T>(),
                  [&](int, T sum) { work.gradient_sums[work.index(at.b, at.i, c) * work.chunks + at.chunk] = sum; });
  };
  const T d = at.filtered(work.C);
  T dd = 0;
  for (int c = 0; c < work.C; ++c) {
    const T n = at.filtered(c);
    const T gradient = at.inside ? work.args.psi_gradient[work.psi(at.b, at.i, c, at.p)] : 0;
    const T dr = d == 0 ? 0 : -gradient / d;
    dd += rounded_product(d == 0 ? 0 : n / d, dr);
    store(c, dr);
  }
  store(work.C, dd);
}

// ---- The end --------------------------------------------------------------------------------------------------------

// By a warp.
template <class T>
__device__ void write_loss(const Work<T>& work, int b) {
  const double sum = add_parts(work.dots + int64_t(b) * work.K * work.chunks, work.K * work.chunks);
  if (lane() == 0) work.args.losses[b] = T(-sum / work.C);
}

// A block for each image, of one warp.
template <class T>
__global__ void __launch_bounds__(kWarp) losses(const __grid_constant__ Work<T> work) {
  write_loss(work, blockIdx.x);
}

// A block for each tile of each mask; where dimage is asked for it has all masks, one after the other. With F for the
// filter, and T, dr and dd times their common factor, the loss's sign and 1 / C:
//
//     dm_i = F(dd_i) - sum_c X_c F(dr_{i,c}) + (T_i - <g_i, T_i>) / ||m_i||
//     dX_c = sum_i (d_i dr_{i,c} - m_i F(dr_{i,c}))
template <int kRadius, class T>
__global__ void __launch_bounds__(kTileThreads, 2) finish(const __grid_constant__ Work<T> work) {
  const Inpainting<T>& args = work.args;
  const int C = work.C, K = work.K, masks = args.dimage ? K : 1;
  const int block = blockIdx.x / work.tiles, t = blockIdx.x - block * work.tiles;
  const int b = block * masks / K, first = block * masks - b * K;
  const bool predictions = args.psi_gradient;
  const T factor = predictions ? T(1) : (args.weights ? 1 : -1) / T(C);
  const TileMemory<T> memory(work);
  const Tile tile(work, t);
  T *const totals = memory.sums, &mean_error = totals[C + 1], &by_norm = totals[C + 2];
  for (int i = first; i < first + masks; ++i) {
    for (int k = warp(); k < C + 3; k += warps()) {
      const T* const parts = k <= C       ? work.gradient_sums + work.index(b, i, k) * work.chunks
                             : k == C + 1 ? work.dots + (int64_t(b) * K + i) * work.chunks
                                          : work.sums + work.index(b, i, C) * work.tiles;
      const double sum = add_parts(parts, k == C + 2 ? work.tiles : work.chunks);
      if (lane() == 0) totals[k] = k <= C ? T(args.eps * sum) : k == C + 1 ? T(sum) : inverse<T>(sum);
    }
    for (int c = 0; c < (args.dmasks ? C + 1 : C); ++c) {
      const T* const plane = work.plane(b, i, c);
      const auto load = [&](int y, int x) { return plane[y * work.W + x]; };
      const auto take = [&](int y, int x, T out) {
        const int p = y * work.W + x;
        const T gradient = out + totals[c];
        T& sum = memory.own[(y - tile.down.origin - tile.down.own.first) * work.tiling.columns + x -
                            tile.across.origin - tile.across.own.first];
        if (c == C) {
          T& dm = work.dm(b, i, p);
          const T error = predictions ? 0 : (dm - mean_error) * by_norm;
          dm = factor * (gradient - sum + error);
          return;
        }
        sum = (c == 0 ? 0 : sum) + rounded_product(work.X(b, c, p), gradient);
        if (!args.dimage) return;
        T& dX = work.dX(b, c, p);
        const T before = i == 0 && predictions ? 0 : dX;
        dX = (before - work.m(b, i, p) * gradient) * (i == K - 1 ? factor : 1);
      };
      filter<kRadius>(work, tile, memory, load, take);  // whose first barrier is that for the totals, too
    }
  }
  if (args.losses && t == 0 && first == 0 && warp() == 0) write_loss(work, b);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Queues kernels, until one is refused.
struct Queue {
  const cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  const char* refused = nullptr;

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) {
    if (blocks > INT_MAX) refused = "more than 2^31 blocks: divide the batch";
    if (shared > kMostShared) refused = "so many channels and masks do not fit into shared memory: Triton takes them";
    if (refused || error != cudaSuccess) return;
    if (shared > 48 << 10) {  // has to be asked for; all that it may be, as other threads launch the same kernel
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
      if (error != cudaSuccess) return;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

template <class T>
using Kernel = void(Work<T>);

// Channels are taken three at a time where there are as many. But not everywhere: it would take long to compile.
template <Stage stage, class T>
constexpr int kMostChannels = sizeof(T) == sizeof(float) && stage != Stage::weighted_gradients ? 3 : 1;

template <Stage stage, class T, int... k>
Kernel<T>* kernel_of_subsets(const Work<T>& work, std::integer_sequence<int, k...>) {
  constexpr int most = kMostChannels<stage, T>;
  static constexpr Kernel<T>* kernels[][2] = {{subsets<stage, k + 2, 1, T>, subsets<stage, k + 2, most, T>}...};
  return kernels[work.K - 2][work.C % 3 == 0];
}

template <class T, int... k>
Kernel<T>* kernel_of_entropies(const Work<T>& work, std::integer_sequence<int, k...>) {
  constexpr int most = kMostChannels<Stage::entropies, T>;
  static constexpr Kernel<T>* kernels[][2] = {{entropies<k + 2, 1, T>, entropies<k + 2, most, T>}...};
  return kernels[work.K - 2][work.C % 3 == 0];
}

template <class T>
void queue_passes(const Work<T>& work, Queue& queue) {
  if (work.tiling.passes > 0) return;
  const int64_t blocks = (work.B * work.planes * work.pixels + kTileThreads - 1) / kTileThreads;
  T *from = work.filtered, *to = work.half_filtered;
  for (int k = 0; k < 2 * work.repeats; ++k) {
    queue.launch(pass<T>, blocks, kTileThreads, (work.radius + 1) * sizeof(T), work, from, to, k < work.repeats);
    std::swap(from, to);
  }
}

template <class T>
void queue_stage(const Work<T>& work, Stage stage, Queue& queue) {
  constexpr auto each_K = std::make_integer_sequence<int, kMostMasks - 1>();
  const int64_t chunks = work.B * work.chunks;
  const auto queue_subsets = [&](Kernel<T>* kernel) {
    queue.launch(kernel, chunks, kChunk, Totals<T>::shared(work, 3 * work.K, kChunk) * sizeof(T), work);
  };
  const auto queue_listed = [&](Kernel<T>* one, Kernel<T>* most) {
    const int64_t shared = Totals<T>::shared(work, 3, kChunk) * sizeof(T);
    queue.launch(work.C % 3 == 0 ? most : one, chunks, kChunk, shared, work);
  };
  switch (stage) {
    case Stage::listed_errors:
      queue_listed(listed<Stage::listed_errors, 1, T>,
                   listed<Stage::listed_errors, kMostChannels<Stage::listed_errors, T>, T>);
      queue.launch(losses<T>, work.B, kWarp, 0, work);
      break;
    case Stage::listed_gradients:
      queue_listed(listed<Stage::listed_gradients, 1, T>,
                   listed<Stage::listed_gradients, kMostChannels<Stage::listed_gradients, T>, T>);
      break;
    case Stage::errors:
      queue_subsets(kernel_of_subsets<Stage::errors>(work, each_K));
      queue.launch(losses<T>, work.B, kWarp, 0, work);
      break;
    case Stage::gradients: queue_subsets(kernel_of_subsets<Stage::gradients>(work, each_K)); break;
    case Stage::weighted_gradients: queue_subsets(kernel_of_subsets<Stage::weighted_gradients>(work, each_K)); break;
    case Stage::entropies:
      queue.launch(kernel_of_entropies(work, each_K), work.B << (work.K - kEntropiesLow), kTileThreads,
                   Totals<T>::shared(work, work.K << kEntropiesLow, kTileThreads) * sizeof(T), work);
      break;
    case Stage::predictions: queue.launch(predictions<T>, work.K * chunks, kChunk, 0, work); break;
    case Stage::prediction_gradients:
      queue.launch(prediction_gradients<T>, work.K * chunks, kChunk, kChunk / kWarp * sizeof(T), work);
      break;
    default: queue.error = cudaErrorInvalidValue;
  }
}

template <class T>
int64_t scratch(const Inpainting<T>& args, int64_t B) {
  return Work<T>(args, B, nullptr).size;
}

template <class T>
const char* run(const Inpainting<T>& args, int64_t B, Stage stage, T* scratch, void* stream) {
  if (B == 0) return nullptr;
  const Work<T> work(args, B, scratch);
  Queue queue{static_cast<cudaStream_t>(stream)};
  const int64_t shared = work.tile_shared(work.tiling) * sizeof(T);
  const bool five = work.radius == 5;
  queue.launch(five ? products<5, T> : products<0, T>, B * work.planes * work.tiles, kTileThreads, shared, work);
  queue_passes(work, queue);
  queue_stage(work, stage, queue);
  if (args.dimage || args.dmasks) {
    const int64_t blocks = B * (args.dimage ? 1 : work.K) * work.tiles;
    queue_passes(work, queue);
    queue.launch(five ? finish<5, T> : finish<0, T>, blocks, kTileThreads, shared, work);
  }
  if (queue.refused) return queue.refused;
  if (queue.error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here, it shall not be found elsewhere
  return cudaGetErrorString(queue.error);
}

const char* trouble() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, losses<IIO_REAL>);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// This file is compiled for each type by itself, so that two compilers can work at it.
template <>
InpaintingKernels<IIO_REAL> kernels<IIO_REAL>() {
  return {scratch<IIO_REAL>, run<IIO_REAL>, trouble};
}

}  // namespace iio::cuda
