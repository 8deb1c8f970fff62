// The products of a block of inputs with the slots, and of the slots with a weight, for one instruction set.
//
// Rows x[n] of a block's inputs come as pointers; those of the slots, w[s], lie D apart; D fills cache lines. c[s][n]
// is a coefficient for a slot and an input, (M, kBlock). While rows are read for the first time, as much memory is
// fetched from the address `next` on, for the next block: a processor foresees long runs of addresses, and the rows of
// one block are a short one. (Half of the time of large calls went by waiting for them.)
#pragma once

#include "simd.h"

namespace iio {

constexpr int kBlock = 32;  // inputs worked on at a time

namespace IIO_ISA {

// c[s][n] = <x[n], w[s]> for M slots and all inputs of the block.
template <class T>
void dots(const T* const* x, const T* w, int64_t M, int64_t D, T* c, uintptr_t next);

// out[n] = sum_s c[s][n] w[s], over M slots; with `streams` past the caches.
template <class T>
void combine(const T* c, const T* w, int64_t M, int64_t D, T* const* out, bool streams);

// total[s] += sum_n c[s][n] x[n], for M slots.
template <class T>
void accumulate(const T* c, const T* const* x, int64_t M, int64_t D, T* total, uintptr_t next);

// y[s] += sum_i x[s][i] w[i], for M slots; rows of x lie `stride` apart, those of w (I, O) and of y O apart, which
// fills cache lines.
template <class T>
void add_linear(const T* x, int64_t stride, int64_t M, const T* w, int64_t I, int64_t O, T* y);

template <class T>
IIO_INLINE void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// <x, y>, rounded as `dots` rounds it: of <dU, v - U> an input that is all of U then leaves exactly 0.
template <class T>
IIO_INLINE T dot(const T* x, const T* y, int64_t D) {
  Vec<T> products{};
  int64_t d = 0;
  for (; d + kLanes<T> <= D; d += kLanes<T>) products += load(x + d) * load(y + d);
  if (d < D) products += load_first(x + d, int(D - d)) * load_first(y + d, int(D - d));
  return sum<T>(products);
}

}  // namespace IIO_ISA
}  // namespace iio
