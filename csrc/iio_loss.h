// The kernels of iio_loss.cpp and what they are given. Plain data: only the bindings know torch.
//
// An operation is a sequence of stages (iio_loss_bindings.cpp lists them), and a stage is a number of independent
// units of work for each image. Whoever runs all units of an image's stage before its next one may spread images and
// units over threads as they like: not a bit of the results changes.
#pragma once

#include <cstdint>

namespace iio {

// X, m, n, d, r, g, e, T, dr, dd: see subsets.h. "Planes" are those in an image's scratch memory, K (C + 1) of them.
enum class Stage {
  products,              // planes <- X_c m_i and m_i
  totals,                // their sums over all pixels
  rows,                  // planes <- filtered along rows
  columns,               // planes <- filtered along columns: then they are n and d, but for the eps term
  residuals,             // planes <- r and d
  entropies,             // the entropies, from these
  errors,                // <g_i, T_i>
  gradients,             // the same; planes <- dr and dd
  weighted_gradients,    // the same, with a weight for each term
  listed_errors,         // as errors, of a list of sets with weights
  listed_gradients,      // as gradients, of the same
  predictions,           // psi = n / d
  prediction_gradients,  // planes <- dr = - dn and dd
  losses,                // the loss
  gradient_totals,       // the sums of dr and dd over all pixels
  finish,                // dimage and dmasks, from the filtered dr and dd
};

// (B, planes, H * W): each plane is contiguous. Strides count elements and may be 0.
template <class T>
struct Planes {
  const T* data;
  int64_t image_stride, plane_stride;
};

template <class T>
struct Inpainting {
  Planes<T> image, masks;
  int64_t K, C, H, W;
  double sigma;
  const T* taps;  // (radius + 1,): the filter from its middle outwards
  int64_t radius, repeats;
  T eps;

  // Gradients that come in, contiguous; null where there are none.
  const T* weights = nullptr;       // (B, K, 2^(K-1) - 1): that to the entropies
  const T* psi_gradient = nullptr;  // (B, K, C, H, W)

  // A list of sets with weights, contiguous: of each pair a set, by its masks' bits, and its complement.
  const int64_t* pairs = nullptr;   // (B, P)
  const T* pair_weights = nullptr;  // (P,)
  int64_t P = 0;

  // Results, contiguous; null where not asked for.
  T* losses = nullptr;     // (B,)
  T* entropies = nullptr;  // (B, K, 2^(K-1) - 1)
  T* psi = nullptr;        // (B, K, C, H, W)
  T* dimage = nullptr;     // (B, C, H, W)
  T* dmasks = nullptr;     // (B, K, H, W)
};

template <class T>
struct InpaintingKernels {
  // How many T of scratch memory each image takes, and each thread besides. Both are aligned to 64 bytes.
  int64_t (*image_scratch)(const Inpainting<T>&);
  int64_t (*thread_scratch)(const Inpainting<T>&);

  int64_t (*units)(const Inpainting<T>&, Stage);
  void (*run)(const Inpainting<T>&, Stage, int64_t image, int64_t first_unit, int64_t last_unit, T* image_scratch,
              T* thread_scratch);
};

#define IIO_INPAINTING_KERNELS                            \
  extern const InpaintingKernels<float> inpainting_float; \
  extern const InpaintingKernels<double> inpainting_double;

namespace baseline {
IIO_INPAINTING_KERNELS
}
namespace avx2 {
IIO_INPAINTING_KERNELS
}
namespace avx512 {
IIO_INPAINTING_KERNELS
}

#undef IIO_INPAINTING_KERNELS

}  // namespace iio
