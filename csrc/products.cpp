// The products of products.h. Each keeps a tile of its results in registers while it goes over what it sums.
#include "products.h"

namespace iio::IIO_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// c[s][n] = <x[n], w[s]> for `slots` slots and all inputs of the block.
template <class T, int slots>
IIO_INLINE void dots_of_slots(const T* const* x, const T* w, int64_t D, T* c, uintptr_t next) {
  constexpr int kInputs = slots == 1 ? kRegisters / 2 : slots == 2 ? kRegisters / 4 : 4;
  constexpr int kSums = slots * kInputs;
  constexpr int kPadded = (kSums + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int n = 0; n < kBlock; n += kInputs) {
    Vec<T> products[kPadded]{};
    for (int64_t d = 0; d < D; d += kLanes<T>) {
      Vec<T> xs[kInputs];
      for (int i = 0; i < kInputs; ++i) xs[i] = load(x[n + i] + d);
      prefetch<kInputs * kVectorBytes>(next);
      next += kInputs * kVectorBytes;
      for (int s = 0; s < slots; ++s) {
        Vec<T> ws = load(w + s * D + d);
        for (int i = 0; i < kInputs; ++i) products[s * kInputs + i] += xs[i] * ws;
      }
    }
    T totals[kPadded];
    for (int i = 0; i < kPadded; i += kLanes<T>) store(totals + i, sums<T>(products + i));
    for (int s = 0; s < slots; ++s) std::memcpy(c + s * kBlock + n, totals + s * kInputs, kInputs * sizeof(T));
  }
}

// out[n] = sum_s c[s][n] w[s], of which `vectors` vectors from column d on.
template <class T, int vectors>
IIO_INLINE void combine_columns(const T* c, const T* w, int64_t M, int64_t D, int64_t d, T* const* out, bool streams) {
  constexpr int kInputs = 4;
  for (int n = 0; n < kBlock; n += kInputs) {
    Vec<T> totals[kInputs][vectors]{};
    for (int64_t s = 0; s < M; ++s) {
      Vec<T> ws[vectors];
      for (int j = 0; j < vectors; ++j) ws[j] = load(w + s * D + d + j * kLanes<T>);
      for (int i = 0; i < kInputs; ++i) {
        for (int j = 0; j < vectors; ++j) totals[i][j] += ws[j] * c[s * kBlock + n + i];
      }
    }
    for (int i = 0; i < kInputs; ++i) {
      T* to = out[n + i] + d;
      for (int j = 0; j < vectors; ++j) {
        streams ? stream(to + j * kLanes<T>, totals[i][j]) : store(to + j * kLanes<T>, totals[i][j]);
      }
    }
  }
}

// total[s] += sum_n c[s][n] x[n] for `slots` slots, of which `vectors` vectors from column d on. The block is summed by
// itself before it meets the total, which keeps the rounding errors of a long sum small.
template <class T, int slots, int vectors>
IIO_INLINE void accumulate_tile(const T* c, const T* const* x, int64_t D, int64_t d, T* total, uintptr_t next) {
  Vec<T> sums[slots][vectors]{};
  for (int n = 0; n < kBlock; ++n) {
    Vec<T> xs[vectors];
    for (int j = 0; j < vectors; ++j) xs[j] = load(x[n] + d + j * kLanes<T>);
    prefetch<vectors * kVectorBytes>(next);
    next += vectors * kVectorBytes;
    for (int s = 0; s < slots; ++s) {
      for (int j = 0; j < vectors; ++j) sums[s][j] += xs[j] * c[s * kBlock + n];
    }
  }
  for (int s = 0; s < slots; ++s) {
    for (int j = 0; j < vectors; ++j) {
      T* at = total + s * D + d + j * kLanes<T>;
      store(at, load(at) + sums[s][j]);
    }
  }
}

template <class T, int vectors>
IIO_INLINE void accumulate_columns(const T* c, const T* const* x, int64_t M, int64_t D, int64_t d, T* total,
                                   uintptr_t next) {
  next += d * kBlock * sizeof(T);
  while (M > 0) {
    const int64_t slots = M < 4 ? M : 4;
    if (slots == 4) accumulate_tile<T, 4, vectors>(c, x, D, d, total, next);
    if (slots == 3) accumulate_tile<T, 3, vectors>(c, x, D, d, total, next);
    if (slots == 2) accumulate_tile<T, 2, vectors>(c, x, D, d, total, next);
    if (slots == 1) accumulate_tile<T, 1, vectors>(c, x, D, d, total, next);
    M -= slots, c += slots * kBlock, total += slots * D;
    next = reinterpret_cast<uintptr_t>(x[0]);
  }
}

// y[s] += sum_i x[s][i] w[i] for `slots` slots, of which `vectors` vectors from column o on.
template <class T, int slots, int vectors>
IIO_INLINE void linear_tile(const T* x, int64_t stride, const T* w, int64_t I, int64_t O, int64_t o, T* y) {
  Vec<T> sums[slots][vectors];
  for (int s = 0; s < slots; ++s) {
    for (int j = 0; j < vectors; ++j) sums[s][j] = load(y + s * O + o + j * kLanes<T>);
  }
  for (int64_t i = 0; i < I; ++i) {
    for (int j = 0; j < vectors; ++j) {
      const Vec<T> w_i = load(w + i * O + o + j * kLanes<T>);
      for (int s = 0; s < slots; ++s) sums[s][j] += w_i * x[s * stride + i];
    }
  }
  for (int s = 0; s < slots; ++s) {
    for (int j = 0; j < vectors; ++j) store(y + s * O + o + j * kLanes<T>, sums[s][j]);
  }
}

template <class T, int slots>
IIO_INLINE void linear_of_slots(const T* x, int64_t stride, const T* w, int64_t I, int64_t O, T* y) {
  constexpr int kVectors = kRegisters / 8;
  int64_t o = 0;
  for (; o + kVectors * kLanes<T> <= O; o += kVectors * kLanes<T>) {
    linear_tile<T, slots, kVectors>(x, stride, w, I, O, o, y);
  }
  for (; o < O; o += kLanes<T>) linear_tile<T, slots, 1>(x, stride, w, I, O, o, y);
}

}  // namespace

template <class T>
void dots(const T* const* x, const T* w, int64_t M, int64_t D, T* c, uintptr_t next) {
  constexpr int kSlots = kRegisters / 8;
  while (M > 0) {
    const int64_t slots = M < kSlots ? M : kSlots;
    if (slots == kSlots) dots_of_slots<T, kSlots>(x, w, D, c, next);
    if constexpr (kSlots > 3) {
      if (slots == 3) dots_of_slots<T, 3>(x, w, D, c, next);
      if (slots == 2) dots_of_slots<T, 2>(x, w, D, c, next);
    }
    if (slots == 1) dots_of_slots<T, 1>(x, w, D, c, next);
    M -= slots, w += slots * D, c += slots * kBlock;
    next = reinterpret_cast<uintptr_t>(x[0]);  // from now on, what is in the cache already
  }
}

template <class T>
void combine(const T* c, const T* w, int64_t M, int64_t D, T* const* out, bool streams) {
  constexpr int kLane = kLanes<T>;
  int64_t d = 0;
  if constexpr (kRegisters >= 32) {
    for (; d + 4 * kLane <= D; d += 4 * kLane) combine_columns<T, 4>(c, w, M, D, d, out, streams);
  }
  for (; d + 2 * kLane <= D; d += 2 * kLane) combine_columns<T, 2>(c, w, M, D, d, out, streams);
  for (; d < D; d += kLane) combine_columns<T, 1>(c, w, M, D, d, out, streams);
}

template <class T>
void accumulate(const T* c, const T* const* x, int64_t M, int64_t D, T* total, uintptr_t next) {
  constexpr int kLane = kLanes<T>;
  int64_t d = 0;
  if constexpr (kRegisters >= 32) {
    for (; d + 4 * kLane <= D; d += 4 * kLane) accumulate_columns<T, 4>(c, x, M, D, d, total, next);
  }
  for (; d + 2 * kLane <= D; d += 2 * kLane) accumulate_columns<T, 2>(c, x, M, D, d, total, next);
  for (; d < D; d += kLane) accumulate_columns<T, 1>(c, x, M, D, d, total, next);
}

template <class T>
void add_linear(const T* x, int64_t stride, int64_t M, const T* w, int64_t I, int64_t O, T* y) {
  while (M > 0) {
    const int64_t slots = M < 4 ? M : 4;
    if (slots == 4) linear_of_slots<T, 4>(x, stride, w, I, O, y);
    if (slots == 3) linear_of_slots<T, 3>(x, stride, w, I, O, y);
    if (slots == 2) linear_of_slots<T, 2>(x, stride, w, I, O, y);
    if (slots == 1) linear_of_slots<T, 1>(x, stride, w, I, O, y);
    M -= slots, x += slots * stride, y += slots * O;
  }
}

#define IIO_INSTANTIATE(T)                                                              \
  template void dots(const T* const*, const T*, int64_t, int64_t, T*, uintptr_t);       \
  template void combine(const T*, const T*, int64_t, int64_t, T* const*, bool);         \
  template void accumulate(const T*, const T* const*, int64_t, int64_t, T*, uintptr_t); \
  template void add_linear(const T*, int64_t, int64_t, const T*, int64_t, int64_t, T*);
IIO_INSTANTIATE(float)
IIO_INSTANTIATE(double)
#undef IIO_INSTANTIATE

}  // namespace iio::IIO_ISA
