// The spatial mixture: what a call consists of, and the stages that each instruction set's kernels offer.
//
//     m_k        = softmax over the slots k of l_k
//     log p_k    = sum_c log N(x_c; mu_{k,c}, sigma^2)
//     log p      = log sum_k m_k p_k
//     q_k        = p_k / sum_j p_j,     r_k = m_k p_k / sum_j m_j p_j
//     log p_{-k} = log (sum_{j != k} m_j p_j / sum_{j != k} m_j)
//
// with the gradients of -log p
//
//     d_mu_{k,c} = r_k (mu_{k,c} - x_c) / sigma^2,     d_l_k = m_k - r_k
//
// and backwards, from the gradients to log p (g), to m and to q:
//
//     d_log_p_k  = g r_k + q_k (dq_k - sum_j q_j dq_j)
//     d_mu_{k,c} = d_log_p_k (x_c - mu_{k,c}) / sigma^2,     d_x_c = -sum_k d_mu_{k,c}
//     d_l_k      = g (r_k - m_k) + m_k (dm_k - sum_j m_j dm_j)
//
// Where forward returned m, q and the gradients of -log p, backward is given these: the terms of g are -g times those
// gradients, and no exponential is computed again. Where it returned log p alone there is only g.
#pragma once

#include "pixels.h"

namespace iio {

// Of the results d_decoded alone is streamed, and where its channels are last: in a plain layout it is as many rows as
// the others, and writing them past the caches gains nothing.
struct Mixture : Pictures {
  double precision;  // 1 / sigma^2
  double log_peak;   // sum_c log N(x_c; x_c, sigma^2)

  // The results of forward, arithmetic; all but the first none where not asked for.
  Pixels log_p;                // (B, 1, 1, N)
  Pixels m, q, leave_one_out;  // (B, K, 1, N)

  // For backward alone: gradients that come in, arithmetic, or none; and the result.
  Pixels g;       // (B, 1, 1, N)
  Pixels dm, dq;  // (B, K, 1, N)
  Pixels d_nll;   // (B, K, C + 1, N) arithmetic: forward's d_decoded, or none; with it its m and q
  Pixels d_x;     // (B, 1, C, N) arithmetic, or none

  // Of forward that of -log p, arithmetic, or none; of backward the gradient to decoded, stored as that is.
  Pixels d_decoded;  // (B, K, C + 1, N)
};

// `workspace` is uninitialised memory that no other thread uses meanwhile, `workspace_size` bytes, any alignment.
struct MixtureKernels {
  int64_t (*workspace_size)(const Mixture&);
  void (*forward)(const Mixture&, int64_t begin, int64_t end, char* workspace);
  void (*backward)(const Mixture&, int64_t begin, int64_t end, char* workspace);
};

namespace baseline {
MixtureKernels mixture_kernels(Storage storage);
}
#if defined(__x86_64__)
namespace avx2 {
MixtureKernels mixture_kernels(Storage storage);
}
namespace avx512 {
MixtureKernels mixture_kernels(Storage storage);
}
#endif

}  // namespace iio
