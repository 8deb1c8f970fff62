// The iterations of Slot Attention: what a call consists of, and the stages that each instruction set's kernels offer.
//
// Each of T iterations takes the slots s to s'; x̂ is x normalised over its features:
//
//     p       = Wp ŝ + bp
//     A[n, :] = softmax over the slots s of <x[n], p[s]>
//     S[s]    = sum_n (A[n, s] + eps)
//     M[s]    = sum_n (A[n, s] + eps) x[n] / S[s]
//     i, j    = Wi M + bi,  Wj s + bj                    each of three parts: r, z, n
//     r, z    = sigmoid(i_r + j_r),  sigmoid(i_z + j_z)
//     n       = tanh(i_n + r j_n)
//     h       = (1 - z) n + z s
//     y       = relu(W1 ĥ + b1)
//     s'      = h + W2 y + b2
//
// and backwards from the last iteration to the first, with the gradients of what is not linear from the tape:
//
//     dy       = W2^T ds'  where y > 0, else 0
//     dh       = ds' + through ĥ of W1^T dy
//     dn       = (1 - n^2) (1 - z) dh
//     dz       = z (1 - z) (s - n) dh
//     dr       = r (1 - r) j_n dn
//     di, dj   = (dr, dz, dn),  (dr, dz, r dn)
//     dM       = Wi^T di
//     dA[n, s] = <dM[s], x[n] - M[s]> / S[s]   (+ what comes to the last A itself)
//     dL[n, s] = A[n, s] (dA[n, s] - sum_t A[n, t] dA[n, t])
//     dp[s]    = sum_n dL[n, s] x[n]
//     dx[n]   += sum_s dL[n, s] p[s] + (A[n, s] + eps) / S[s] dM[s]
//     ds       = z dh + Wj^T dj + through ŝ of Wp^T dp
//
// A task is an image, with all of its iterations: its inputs stay in the cache. Tasks are independent of each other, so
// any division of them over threads gives bitwise the same results. Gradients to the maps are products over all images,
// which the caller makes of the tape and of the gradients to what the maps make.
#pragma once

#include "products.h"
#include "storage.h"

namespace iio {

// "Arithmetic" below is float for float32 and bfloat16 storage of x, double for float64; all but x and dx are of it.
struct Iterations {
  Storage storage;
  int64_t B, T, K, N, D, Dx, H;
  double eps, norm_eps;

  const void* x;           // (B, N, Dx) storage, rows contiguous
  int64_t x_image, x_row;  // strides in elements

  // The maps Wp, Wi, Wj, W1, W2 as the products read them, with rows padded: forward (in, out), backward (out, in).
  const void* weights[5];
  const void* biases[5];  // padded alike; for forward alone
  void* tape;             // (B, T, K, tape_width()): ŝ, M, s, ĥ, y, p, r, z, n, j_n, S, 1 / deviations of s and h

  // For forward alone.
  const void* slots;  // (B, K, D)
  void* last_slots;   // (B, K, D)
  void* A;            // (B, K, N), or null

  // For backward alone.
  const void* d_last_slots;  // (B, K, D)
  const void* dA;            // (B, K, N) with any strides, or null
  int64_t dA_stride[3];
  void* dx;       // (B, N, Dx) storage
  bool stream;    // dx is too large for the caches, so leave these for what is read
  void* d_slots;  // (B, K, D)
  void* made;     // (B, T, K, made_width()): gradients to p, i, j, y before its relu, and s'

  IIO_INLINE int64_t tape_width() const { return 7 * D + 2 * Dx + H + 3; }
  IIO_INLINE int64_t made_width() const { return 7 * D + Dx + H; }
  // Rows in the workspace and of the maps end on a cache line. Gates are three rows.
  IIO_INLINE int64_t padded(int64_t width) const {
    const int64_t line = storage == Storage::float64 ? 8 : 16;
    return (width + line - 1) / line * line;
  }
  IIO_INLINE int64_t blocks() const { return (N + kBlock - 1) / kBlock; }
};

// `workspace` is uninitialised memory that no other thread uses meanwhile, `workspace_size` bytes, any alignment.
struct IterationsKernels {
  int64_t (*workspace_size)(const Iterations&, bool backward);
  void (*forward)(const Iterations&, int64_t begin, int64_t end, char* workspace);
  void (*backward)(const Iterations&, int64_t begin, int64_t end, char* workspace);
};

namespace baseline {
IterationsKernels iterations_kernels(Storage storage);
}
#if defined(__x86_64__)
namespace avx2 {
IterationsKernels iterations_kernels(Storage storage);
}
namespace avx512 {
IterationsKernels iterations_kernels(Storage storage);
}
#endif

}  // namespace iio
