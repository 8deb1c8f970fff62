// Slot attention: what a call consists of, and the stages that each instruction set's kernels offer.
//
//     L[n, s] = scale * <k[n], q[s]> + logit_bias[s]
//     A[n, :] = softmax over the slots s of L[n, :]
//     W[n, s] = A[n, s] + eps_weights,    S[s] = sum_n W[n, s] + eps_denominator
//     U[s]    = sum_n W[n, s] v[n] / S[s]
//
// Each of forward and backward is two stages: `chunks` of inputs, whose sums over their inputs go to `partials`, then
// `slots`, which add the partial sums of a slot in the order of its chunks. The tasks of a stage, numbered from 0, are
// independent of each other, so any division of them over threads gives bitwise the same results.
#pragma once

#include "products.h"
#include "storage.h"

namespace iio {

// A tensor that is read through its strides (in elements) in its first three dimensions; a last one has stride 1.
template <class T>
struct Strided {
  const T* data;  // null where there is none
  int64_t stride[3];
};

// "Arithmetic" below is float for float32 and bfloat16 storage, double for float64. Contiguous unless Strided.
struct SlotAttention {
  Storage storage;
  int64_t B, H, K, N, Dk, Dv;  // Dv = Dk where the values are the keys
  bool values_are_keys;        // then there is no v
  bool joint_heads;            // one softmax over the slots of all H heads together
  bool normalize;              // U is divided by S
  double scale, eps_weights, eps_denominator;

  const void* q;             // (B, H, K, Dk) arithmetic
  Strided<void> k;           // (B, H, N, Dk) storage
  Strided<void> v;           // (B, H, N, Dv) storage
  const void* logit_bias;    // (B, H, K) arithmetic, or null
  Strided<bool> slot_mask;   // (B, H, K), or null
  Strided<bool> input_mask;  // (B, H, N), or null

  // The results of forward, of which backward reads the first two.
  void* U;  // (B, H, K, Dv) arithmetic
  void* S;  // (B, H, K) arithmetic
  void* A;  // (B, H, K, N) storage, or null

  // For backward alone.
  const void* dU;     // (B, H, K, Dv) arithmetic
  const void* dS;     // (B, H, K) arithmetic, or null
  Strided<void> dA;   // (B, H, K, N) arithmetic, or null
  int64_t dA_stride;  // that of the last dimension
  void* dq;           // (B, H, K, Dk) arithmetic
  void* dk;           // (B, H, N, Dk) storage; the gradient to the values is in it where they are the keys
  void* dv;           // (B, H, N, Dv) storage; not written where the values are the keys
  bool stream;        // dk and dv are too large for the caches, so leave these for what is read
  void* dlogit_bias;  // (B, H, K) arithmetic, or null

  void* partials;  // (chunk_tasks(), partial_size(Dv)) arithmetic forward, (chunk_tasks(), partial_size(Dk)) backward

  // Inputs are cut in equal chunks of at most 1024: few enough that their sums cost nothing, and a function of N
  // alone, so that an image's results do not depend on what else is in the batch.
  static constexpr int64_t kMostInputs = 1024;

  IIO_INLINE int64_t heads() const { return joint_heads ? H : 1; }  // in a group, which shares a softmax
  IIO_INLINE int64_t groups() const { return joint_heads ? B : B * H; }
  IIO_INLINE int64_t chunks() const { return (N + kMostInputs - 1) / kMostInputs; }
  IIO_INLINE int64_t chunk_size() const { return N == 0 ? 0 : round_up((N + chunks() - 1) / chunks(), kBlock); }
  IIO_INLINE int64_t chunk_tasks() const { return groups() * chunks(); }
  IIO_INLINE int64_t slot_tasks() const { return B * H * K; }

  // Rows in the workspace and in `partials` end on a cache line.
  IIO_INLINE int64_t padded(int64_t D) const { return round_up(D, storage == Storage::float64 ? 8 : 16); }
  // The sums of a group's slots over one chunk: heads() * K rows of padded(D), then one more number for each.
  IIO_INLINE int64_t partial_size(int64_t D) const { return heads() * K * (padded(D) + 1); }

  static IIO_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
};

// `workspace` is uninitialised memory that no other thread uses meanwhile, `workspace_size` bytes, any alignment.
struct SlotAttentionKernels {
  int64_t (*workspace_size)(const SlotAttention&);
  void (*forward_chunks)(const SlotAttention&, int64_t begin, int64_t end, char* workspace);
  void (*forward_slots)(const SlotAttention&, int64_t begin, int64_t end);
  void (*backward_chunks)(const SlotAttention&, int64_t begin, int64_t end, char* workspace);
  void (*backward_slots)(const SlotAttention&, int64_t begin, int64_t end);
};

namespace baseline {
SlotAttentionKernels slot_attention_kernels(Storage storage);
}
#if defined(__x86_64__)
namespace avx2 {
SlotAttentionKernels slot_attention_kernels(Storage storage);
}
namespace avx512 {
SlotAttentionKernels slot_attention_kernels(Storage storage);
}
#endif

}  // namespace iio
