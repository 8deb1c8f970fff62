// The operators of inpainting on a GPU: memory from torch's allocator, kernels on torch's stream.
#define USE_CUDA  // asks torch's shim.h for the current stream
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "iio_loss_cuda.h"
#include "iio_loss_operators.h"

namespace iio {
namespace {

struct Cuda {
  static constexpr const char* kName = "one GPU";

  static bool holds(const Tensor& x) { return x.is_cuda(); }

  template <class T>
  static void run(const Call<T>& call, Stage stage) {
    STD_TORCH_CHECK(call.args.H * call.args.W <= INT_MAX, "expected images of fewer than 2^31 pixels");
    const int32_t device = call.image.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "iio_kernels: torch tells no CUDA stream");
    const Tensor scratch = call.empty({cuda::kernels<T>().scratch(call.args, call.B)});
    const char* const error = cuda::kernels<T>().run(call.args, call.B, stage, call.data(scratch), stream);
    STD_TORCH_CHECK(error == nullptr, "iio_kernels: a CUDA kernel could not be launched: ", error);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CUDA, m) { Operators<Cuda>::implement(m); }

}  // namespace iio

// What is asked once the library is loaded.
extern "C" __attribute__((visibility("default"))) const char* iio_kernels_cuda_trouble() {
  return iio::cuda::kernels<float>().trouble();
}
