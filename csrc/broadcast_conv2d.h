// The spatial-broadcast decoder's first layer: what a call consists of, and the stages that each instruction set's
// kernels offer.
//
//     out[m, y, x]        = relu(constant[m, class of y, class of x] + map[y, x])
//
// vectors of O channels, and backwards, with d_sum = d_out where that sum is above 0 (or a NaN) and 0 elsewhere:
//
//     d_constant[m, r, c] = sum over the rows y of class r and the columns x of class c of d_sum[m, y, x]
//     d_map               = sum_m d_sum[m]
//
// The M images are cut in chunks, tasks that are independent of each other, so any division of them over threads gives
// bitwise the same results. d_map is two stages: each chunk's sum, then their sum in the order of the chunks.
#pragma once

#include "storage.h"

namespace iio {

// How rows (or columns) belong to classes: `head` first and `tail` last ones each to their own, and those between them
// to `period` classes in turn. Classes are numbered in this order.
struct Axis {
  int64_t size, head, period, tail;

  IIO_INLINE int64_t classes() const { return head + period + tail; }
  IIO_INLINE int64_t class_of(int64_t y) const {
    if (y < head) return y;
    return y < size - tail ? head + (y - head) % period : y - size + classes();
  }
  // The rows of class c are `first(c)`, and every `period` further one below `last(c)`.
  IIO_INLINE int64_t first(int64_t c) const { return c < head + period ? c : c + size - classes(); }
  IIO_INLINE int64_t last(int64_t c) const { return c < head || c >= head + period ? first(c) + 1 : size - tail; }
};

// "Arithmetic" below is float or double.
struct Broadcast {
  int64_t M, O;
  Axis rows, columns;
  bool relu;

  const void* constant;  // (M, row classes, column classes, O) arithmetic
  const void* map;       // (H, W, O) arithmetic
  Storage storage;       // of `out` and `d_out`: bfloat16 where arithmetic is float, or arithmetic
  void* out;             // (M, H, W, O), the result of forward
  bool stream;           // out is too large for the caches, so leave these for what is read

  // For backward alone: what comes in, and the results.
  const void* d_out;  // (M, H, W, O)
  void* d_constant;   // (M, row classes, column classes, O) arithmetic
  void* d_map;        // (H, W, O) arithmetic

  void* partials;  // (chunks(), H, W, O) arithmetic: sums over the images of a chunk

  // Chunks of images, their size a function of M alone. For each there is a map to write, and to read again.
  static constexpr int64_t kLeastImages = 8, kMostChunks = 32;

  IIO_INLINE int64_t chunk_size() const {
    const int64_t equal = (M + kMostChunks - 1) / kMostChunks;
    return equal < kLeastImages ? kLeastImages : equal;
  }
  IIO_INLINE int64_t chunks() const { return (M + chunk_size() - 1) / chunk_size(); }
};

// `workspace` is uninitialised memory that no other thread uses meanwhile, `workspace_size` bytes, any alignment.
struct BroadcastKernels {
  int64_t (*workspace_size)(const Broadcast&);
  void (*forward)(const Broadcast&, int64_t begin, int64_t end, char* workspace);   // of chunks
  void (*backward)(const Broadcast&, int64_t begin, int64_t end, char* workspace);  // of chunks
  void (*sum_maps)(const Broadcast&, int64_t begin, int64_t end);                   // of rows
};

namespace baseline {
BroadcastKernels broadcast_kernels(bool is_double);
}
#if defined(__x86_64__)
namespace avx2 {
BroadcastKernels broadcast_kernels(bool is_double);
}
namespace avx512 {
BroadcastKernels broadcast_kernels(bool is_double);
}
#endif

}  // namespace iio
