// Slot composition: what a call consists of, and the stages that each instruction set's kernels offer.
//
//     a_k         = softmax over the slots k of alpha_k
//     x_hat_c     = sum_k a_k rgb_{k,c}
//     error       = mean over channels and pixels of (x_hat_c - x_c)^2
//
// and backwards, from the gradients to x_hat, to a and (g) to the error:
//
//     d_x_hat_c   += 2 g (x_hat_c - x_c) / (C N),     d_x_c = minus what is added
//     da_k        += sum_c d_x_hat_c rgb_{k,c}
//     d_rgb_{k,c} = a_k d_x_hat_c
//     d_alpha_k   = a_k (da_k - sum_j a_j da_j)
//
// Errors are two stages: each chunk's sum, then their sum in the order of the chunks.
#pragma once

#include "pixels.h"

namespace iio {

struct Composition : Pictures {
  // The results of forward, arithmetic; none where not asked for.
  Pixels x_hat;  // (B, 1, C, N)
  Pixels a;      // (B, K, 1, N)
  void* errors;  // (B,)

  // For backward alone: gradients that come in, arithmetic, or none; and the results.
  Pixels d_x_hat;    // (B, 1, C, N)
  Pixels da;         // (B, K, 1, N)
  const void* g;     // (B,)
  Pixels d_decoded;  // (B, K, C + 1, N), stored as decoded is
  Pixels d_x;        // (B, 1, C, N) arithmetic, or none

  void* partials;  // (tasks(),) arithmetic: sums of squares over a chunk
};

// `workspace` is uninitialised memory that no other thread uses meanwhile, `workspace_size` bytes, any alignment.
struct CompositionKernels {
  int64_t (*workspace_size)(const Composition&);
  void (*forward)(const Composition&, int64_t begin, int64_t end, char* workspace);
  void (*errors)(const Composition&, int64_t begin, int64_t end);  // of images
  void (*backward)(const Composition&, int64_t begin, int64_t end, char* workspace);
};

namespace baseline {
CompositionKernels composition_kernels(Storage storage);
}
#if defined(__x86_64__)
namespace avx2 {
CompositionKernels composition_kernels(Storage storage);
}
namespace avx512 {
CompositionKernels composition_kernels(Storage storage);
}
#endif

}  // namespace iio
