// The kernels of iio_loss.cu and what they are given, for bindings that know torch and nothing of CUDA.
#pragma once

#include "iio_loss.h"

namespace iio::cuda {

// `stage` says what is made of the filtered planes: errors, gradients, weighted_gradients, listed_errors,
// listed_gradients, entropies, predictions or prediction_gradients. All other stages follow from it.
template <class T>
struct InpaintingKernels {
  // How many T of scratch memory a call for B images takes.
  int64_t (*scratch)(const Inpainting<T>&, int64_t B);

  // Queues all kernels of a call on a stream (a cudaStream_t) of the current device. Null, or what went wrong.
  const char* (*run)(const Inpainting<T>&, int64_t B, Stage stage, T* scratch, void* stream);

  // Null where the kernels run on the current device, or why they do not: a driver too old, say.
  const char* (*trouble)();
};

template <class T>
InpaintingKernels<T> kernels();

}  // namespace iio::cuda
