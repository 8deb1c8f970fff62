// Slot composition on the CPU, for one instruction set. composition.h has the formulas and the division into tasks.
//
// A chunk of pixels is worked through in blocks of kBlock. A block's numbers are rows, one for each slot and channel, so
// that a vector holds neighbouring pixels. Rows are used in place where they lie in memory as such (a plain layout); what
// is stored otherwise is turned into rows, and back, in a workspace that fits the first cache or two. Either way decoded
// is read from memory once, and its gradient is written once.
#include "composition.h"

namespace iio::IIO_ISA {
namespace {

constexpr int kBlock = Composition::kBlock;

// A row of kBlock numbers for each slot and channel.
template <class T>
struct Rows {
  T* data;
  int64_t slot, channel;  // strides

  IIO_INLINE T* operator()(int64_t k, int64_t c) const { return data + k * slot + c * channel; }
};

template <class T>
IIO_INLINE void put(T* p, Vec<T> x, bool streams) {
  streams ? stream(p, x) : store(p, x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Four channels in turn, as decoders of RGB and alpha leave them in channels-last memory.

// Every other lane of a and b one behind the other, from lane `first` on.
template <class T, int first, size_t... lane>
IIO_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  return pick<T, (2 * lane + first)...>(a, b);
}

// The lanes of a and b in turn, from lane `first` on.
template <class T, int first, size_t... lane>
IIO_INLINE Vec<T> in_turn(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  return pick<T, (first + lane / 2 + lane % 2 * kLanes<T>)...>(a, b);
}

// rows(k, c)[n] = x[4 n + c]
template <class T>
void separate(const T* x, Rows<T> rows, int64_t k) {
  constexpr int L = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<L>();
  for (int n = 0; n < kBlock; n += L) {
    Vec<T> even[2], odd[2];
    for (int i = 0; i < 2; ++i) {
      const Vec<T> one = load(x + 4 * n + 2 * i * L), other = load(x + 4 * n + (2 * i + 1) * L);
      even[i] = every_other<T, 0>(one, other, lanes);
      odd[i] = every_other<T, 1>(one, other, lanes);
    }
    store(rows(k, 0) + n, every_other<T, 0>(even[0], even[1], lanes));
    store(rows(k, 1) + n, every_other<T, 0>(odd[0], odd[1], lanes));
    store(rows(k, 2) + n, every_other<T, 1>(even[0], even[1], lanes));
    store(rows(k, 3) + n, every_other<T, 1>(odd[0], odd[1], lanes));
  }
}

// x[4 n + c] = rows(k, c)[n]
template <class T>
void join(Rows<T> rows, int64_t k, T* x, bool streams) {
  constexpr int L = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<L>();
  for (int n = 0; n < kBlock; n += L) {
    const Vec<T> x0 = load(rows(k, 0) + n), x1 = load(rows(k, 1) + n);
    const Vec<T> x2 = load(rows(k, 2) + n), x3 = load(rows(k, 3) + n);
    const Vec<T> even[] = {in_turn<T, 0>(x0, x2, lanes), in_turn<T, L / 2>(x0, x2, lanes)};
    const Vec<T> odd[] = {in_turn<T, 0>(x1, x3, lanes), in_turn<T, L / 2>(x1, x3, lanes)};
    for (int i = 0; i < 2; ++i) {
      const Vec<T> one = in_turn<T, 0>(even[i], odd[i], lanes), other = in_turn<T, L / 2>(even[i], odd[i], lanes);
      put(x + 4 * n + 2 * i * L, one, streams);
      put(x + 4 * n + (2 * i + 1) * L, other, streams);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The work on a chunk of an image.

template <class T>
class Chunk {
 public:
  // Without a workspace it is good for nothing but the size of one.
  Chunk(const Composition& call, char* workspace) : call(call), K(call.K), C(call.C), workspace(workspace) {
    workspace_size = workspace == nullptr ? 63 : -reinterpret_cast<uintptr_t>(workspace) & 63;
    for (T** room : {&rgba_room, &d_rgba_room}) take(room, K * (C + 1));
    for (T** room : {&a_room, &da_room}) take(room, K);
    for (T** room : {&x_room, &x_hat_room, &d_x_room, &d_x_hat_room}) take(room, C);
    take(&in_turn_room, 4);
  }

  // The results asked for; the sum of squares to `partials`.
  void forward(int64_t task) {
    open(task);
    Vec<T> squares{};
    for (; first < last; first += kBlock) {
      fetch_ahead(call.decoded);
      const Rows<T> rgba = read_rows(call.decoded, rgba_room);
      const Rows<T> a = result_rows(call.a, a_room), x_hat = result_rows(call.x_hat, x_hat_room);
      softmax(rgba, a);
      blend(rgba, a, x_hat);
      write_rows(a, call.a);
      write_rows(x_hat, call.x_hat);
      if (call.x.data != nullptr) squares += squared_error(x_hat, read_rows(call.x, x_room));
    }
    if (call.x.data != nullptr) static_cast<T*>(call.partials)[task] = sum<T>(squares);
  }

  void backward(int64_t task) {
    open(task);
    const Rows<T> a = rows_in(a_room, 1), da = rows_in(da_room, 1), x_hat = rows_in(x_hat_room, C);
    for (; first < last; first += kBlock) {
      fetch_ahead(call.decoded);
      if (!call.stream) fetch_ahead(call.d_decoded);
      const Rows<T> rgba = read_rows(call.decoded, rgba_room);
      softmax(rgba, a);
      Rows<T> d_x_hat = read_rows(call.d_x_hat, d_x_hat_room);
      if (call.g != nullptr) {
        const Rows<T> through_x_hat = d_x_hat, d_x = result_rows(call.d_x, d_x_room);
        d_x_hat = rows_in(d_x_hat_room, C);
        blend(rgba, a, x_hat);
        differentiate_error(x_hat, read_rows(call.x, x_room), through_x_hat, d_x_hat, d_x);
        write_rows(d_x, call.d_x);
      }
      const Rows<T> d_rgba = result_rows(call.d_decoded, d_rgba_room);
      differentiate(rgba, a, d_x_hat, read_rows(call.da, da_room), da, d_rgba);
      write_rows(d_rgba, call.d_decoded);
    }
  }

  int64_t workspace_size;  // bytes

 private:
  static constexpr int L = kLanes<T>;

  void take(T** room, int64_t rows) {
    *room = workspace == nullptr ? nullptr : reinterpret_cast<T*>(workspace + workspace_size);
    workspace_size += rows * kBlock * sizeof(T);
  }

  void open(int64_t task) {
    const int64_t chunks = call.chunks(), size = call.chunk_size();
    image = task / chunks;
    first = task % chunks * size;
    last = first + size < call.N ? first + size : call.N;
  }

  // ---- The formulas -------------------------------------------------------------------------------------------------

  // a_k = softmax over the slots k of alpha_k
  void softmax(Rows<T> rgba, Rows<T> a) {
    for (int n = 0; n < kBlock; n += L) {
      Vec<T> most = load(rgba(0, C) + n), total{};
      for (int64_t k = 1; k < K; ++k) {
        const Vec<T> alpha = load(rgba(k, C) + n);
        most = alpha > most ? alpha : most;
      }
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> e = exp<T>(load(rgba(k, C) + n) - most);
        store(a(k, 0) + n, e);
        total += e;
      }
      const Vec<T> inverse = T(1) / total;
      for (int64_t k = 0; k < K; ++k) store(a(k, 0) + n, load(a(k, 0) + n) * inverse);
    }
  }

  // x_hat_c = sum_k a_k rgb_{k,c}
  void blend(Rows<T> rgba, Rows<T> a, Rows<T> x_hat) {
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        Vec<T> total{};
        for (int64_t k = 0; k < K; ++k) total += load(a(k, 0) + n) * load(rgba(k, c) + n);
        store(x_hat(0, c) + n, total);
      }
    }
  }

  // sum_c (x_hat_c - x_c)^2
  Vec<T> squared_error(Rows<T> x_hat, Rows<T> x) {
    Vec<T> total{};
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        const Vec<T> difference = load(x_hat(0, c) + n) - load(x(0, c) + n);
        total += difference * difference;
      }
    }
    return total;
  }

  // d_x_hat_c = 2 g (x_hat_c - x_c) / (C N) + what comes through x_hat itself; d_x_c = minus the first of them
  void differentiate_error(Rows<T> x_hat, Rows<T> x, Rows<T> through_x_hat, Rows<T> d_x_hat, Rows<T> d_x) {
    const T factor = 2 * static_cast<const T*>(call.g)[image] / (T(C) * T(call.N));
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        const Vec<T> through_error = factor * (load(x_hat(0, c) + n) - load(x(0, c) + n));
        store(d_x_hat(0, c) + n, load(through_x_hat(0, c) + n) + through_error);
        store(d_x(0, c) + n, -through_error);
      }
    }
  }

  // da_k        = sum_c d_x_hat_c rgb_{k,c} + what comes through a itself
  // d_rgb_{k,c} = a_k d_x_hat_c
  // d_alpha_k   = a_k (da_k - sum_j a_j da_j)
  void differentiate(Rows<T> rgba, Rows<T> a, Rows<T> d_x_hat, Rows<T> through_a, Rows<T> da, Rows<T> d_rgba) {
    const bool streams = call.stream && d_rgba.data != d_rgba_room;  // then what is put there stays there
    for (int n = 0; n < kBlock; n += L) {
      Vec<T> mean{};
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> a_k = load(a(k, 0) + n);
        Vec<T> da_k = load(through_a(k, 0) + n);
        for (int64_t c = 0; c < C; ++c) {
          const Vec<T> d_x_hat_c = load(d_x_hat(0, c) + n);
          da_k += d_x_hat_c * load(rgba(k, c) + n);
          put(d_rgba(k, c) + n, a_k * d_x_hat_c, streams);
        }
        store(da(k, 0) + n, da_k);
        mean += a_k * da_k;
      }
      for (int64_t k = 0; k < K; ++k) {
        put(d_rgba(k, C) + n, load(a(k, 0) + n) * (load(da(k, 0) + n) - mean), streams);
      }
    }
  }

  // ---- From memory to rows and back ---------------------------------------------------------------------------------

  int64_t count() const { return last - first < kBlock ? last - first : kBlock; }

  static int64_t stored(const Pixels& x) { return x.storage == Storage::bfloat16 ? 2 : sizeof(T); }

  // Where the block's numbers of slot k and channel c begin.
  char* address(const Pixels& x, int64_t k, int64_t c) const {
    const int64_t element = image * x.image + k * x.slot + c * x.channel + first * x.pixel;
    return static_cast<char*>(x.data) + element * stored(x);
  }

  // Whether a block of numbers one behind the other, from there on, is a block of T.
  bool usable(const Pixels& x) const { return stored(x) == sizeof(T) && count() == kBlock; }
  bool are_rows(const Pixels& x) const { return x.data != nullptr && x.pixel == 1 && usable(x); }
  static bool are_in_turn(const Pixels& x) { return x.channels == 4 && x.channel == 1 && x.pixel == 4; }

  static Rows<T> rows_in(T* room, int64_t channels) { return {room, channels * kBlock, kBlock}; }
  Rows<T> rows_at(const Pixels& x) const { return {reinterpret_cast<T*>(address(x, 0, 0)), x.slot, x.channel}; }

  // Start to fetch the block after the next: a processor foresees long runs of addresses, and these are many short ones.
  void fetch_ahead(const Pixels& x) const {
    const bool mixed = x.channel == 1 && x.pixel == x.channels;  // one run for all channels
    if (x.pixel != 1 && !mixed) return;
    const int64_t bytes = kBlock * x.pixel * stored(x);
    for (int64_t k = 0; k < x.slots; ++k) {
      for (int64_t c = 0; c < (mixed ? 1 : x.channels); ++c) {
        const uintptr_t from = reinterpret_cast<uintptr_t>(address(x, k, c)) + 2 * bytes;
        for (int64_t at = 0; at < bytes; at += 64) prefetch<64>(from + at);
      }
    }
  }

  // The block's numbers: in place, or copied to `room`. What there is not, and what lies beyond the last pixel, is 0.
  Rows<T> read_rows(const Pixels& x, T* room) {
    if (are_rows(x)) return rows_at(x);
    const Rows<T> rows = rows_in(room, x.channels);
    if (x.data == nullptr) std::memset(room, 0, x.slots * x.channels * kBlock * sizeof(T));
    for (int64_t k = 0; k < x.slots && x.data != nullptr; ++k) {
      if (are_in_turn(x)) {
        if (!usable(x)) gather(x, address(x, k, 0), 1, 4 * count(), in_turn_room, 4 * kBlock);
        separate(usable(x) ? reinterpret_cast<const T*>(address(x, k, 0)) : in_turn_room, rows, k);
      } else {
        for (int64_t c = 0; c < x.channels; ++c) gather(x, address(x, k, c), x.pixel, count(), rows(k, c), kBlock);
      }
    }
    return rows;
  }

  // Where to put the block's results, which `write_rows` then brings to memory if they are not there already.
  Rows<T> result_rows(const Pixels& x, T* room) const { return are_rows(x) ? rows_at(x) : rows_in(room, x.channels); }

  void write_rows(Rows<T> rows, const Pixels& x) {
    if (x.data == nullptr || are_rows(x)) return;
    for (int64_t k = 0; k < x.slots; ++k) {
      if (are_in_turn(x)) {
        join(rows, k, usable(x) ? reinterpret_cast<T*>(address(x, k, 0)) : in_turn_room, call.stream && usable(x));
        if (!usable(x)) scatter(x, in_turn_room, address(x, k, 0), 1, 4 * count());
      } else {
        for (int64_t c = 0; c < x.channels; ++c) scatter(x, rows(k, c), address(x, k, c), x.pixel, count());
      }
    }
  }

  // `count` stored numbers, `stride` apart, then zeros up to `size`.
  static void gather(const Pixels& x, const char* from, int64_t stride, int64_t count, T* to, int64_t size) {
    if (stride == 1) {
      read(x.storage, from, count, to);
    } else {
      for (int64_t n = 0; n < count; ++n) read(x.storage, from + n * stride * stored(x), 1, to + n);
    }
    std::memset(to + count, 0, (size - count) * sizeof(T));
  }

  static void scatter(const Pixels& x, const T* from, char* to, int64_t stride, int64_t count) {
    if (stride == 1) {
      write(x.storage, from, count, to);
    } else {
      for (int64_t n = 0; n < count; ++n) write(x.storage, from + n, 1, to + n * stride * stored(x));
    }
  }

  const Composition& call;
  const int64_t K, C;
  char* workspace;

  int64_t image = 0, first = 0, last = 0;  // the block's image and first pixel; where the chunk's pixels end

  T *rgba_room, *d_rgba_room;                         // (K, C + 1, kBlock)
  T *a_room, *da_room;                                // (K, kBlock)
  T *x_room, *x_hat_room, *d_x_room, *d_x_hat_room;  // (C, kBlock)
  T* in_turn_room;                                    // (kBlock, 4)
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
int64_t workspace_size(const Composition& call) {
  return Chunk<T>(call, nullptr).workspace_size;
}

template <class T>
void forward(const Composition& call, int64_t begin, int64_t end, char* workspace) {
  Chunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.forward(task);
}

template <class T>
void errors(const Composition& call, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    double total = 0;
    for (int64_t i = 0; i < call.chunks(); ++i) {
      total += static_cast<const T*>(call.partials)[image * call.chunks() + i];
    }
    static_cast<T*>(call.errors)[image] = T(total / (double(call.C) * double(call.N)));
  }
}

template <class T>
void backward(const Composition& call, int64_t begin, int64_t end, char* workspace) {
  Chunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.backward(task);
  finish_streams();
}

template <class T>
CompositionKernels kernels() {
  return {workspace_size<T>, forward<T>, errors<T>, backward<T>};
}

}  // namespace

CompositionKernels composition_kernels(Storage storage) {
  return storage == Storage::float64 ? kernels<double>() : kernels<float>();
}

}  // namespace iio::IIO_ISA
