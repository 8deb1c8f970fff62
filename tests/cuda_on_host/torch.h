// Included before csrc/iio_loss_cuda_bindings.cpp, this makes of it operators on CPU tensors, in a library of their
// own: torch.ops.iio_kernels_on_host.
#pragma once

#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#undef USE_CUDA

inline AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

struct NoGuard {
  explicit NoGuard(int32_t) {}
};
namespace torch::stable::accelerator {
using ::NoGuard;
}

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(iio_kernels_on_host, CPU, m, 0)
#define aoti_torch_get_current_cuda_stream no_stream
#define DeviceGuard NoGuard
#define is_cuda is_cpu
