// The operators composition_forward and composition_backward: what they are given is checked, results are allocated,
// and the stages of compose.h run on torch's own threads.
#include <optional>
#include <tuple>

#include "compose.h"
#include "isa.h"
#include "pixels_bindings.h"

namespace iio {
namespace {

CompositionKernels choose_kernels(Storage storage) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::composition_kernels(storage);
  if (isa() == Isa::avx2) return avx2::composition_kernels(storage);
#endif
  return baseline::composition_kernels(storage);
}

// A call whose inputs are checked.
class Call : public Composition, public PictureTensors {
 public:
  Call(const Tensor& decoded, const std::optional<Tensor>& image) : Composition{}, PictureTensors(*this, decoded) {
    // Until they are given:
    x = x_hat = d_x_hat = d_x = none(1, C);
    a = da = none(K, 1);
    if (image) x = of_channels(*image, "image");
    kernels = choose_kernels(storage_of(arithmetic));
  }

  CompositionKernels kernels;
};

std::tuple<Tensor, Tensor, Tensor> composition_forward(Tensor decoded, std::optional<Tensor> image,
                                                       bool return_reconstruction, bool return_masks) {
  Call call(decoded, image);
  Tensor reconstruction = call.new_planes(decoded, call.C, return_reconstruction);
  Tensor masks = call.new_planes(decoded, call.K, return_masks);
  Tensor errors = torch::stable::new_empty(decoded, {image ? call.B : 0}, call.arithmetic);
  Tensor partials = torch::stable::new_empty(decoded, {image ? call.tasks() : 0}, call.arithmetic);
  if (return_reconstruction) call.x_hat = call.of_channels(reconstruction, "reconstruction");
  if (return_masks) call.a = call.of_slots(masks, "masks");
  call.errors = errors.mutable_data_ptr();
  call.partials = partials.mutable_data_ptr();
  run(call, call.kernels, call.kernels.forward);
  if (image) call.kernels.errors(call, 0, call.B);
  return {reconstruction, masks, errors};
}

std::tuple<Tensor, Tensor> composition_backward(std::optional<Tensor> d_reconstruction, std::optional<Tensor> d_masks,
                                                std::optional<Tensor> d_errors, Tensor decoded,
                                                std::optional<Tensor> image, bool image_gradient) {
  Call call(decoded, image);
  if (d_reconstruction) call.d_x_hat = call.of_channels(*d_reconstruction, "d_reconstruction");
  if (d_masks) call.da = call.of_slots(*d_masks, "d_masks");
  if (d_errors) call.g = call.of_images(*d_errors, "d_errors");
  STD_TORCH_CHECK(image || !d_errors, "image: expected a tensor where there is d_errors");
  STD_TORCH_CHECK(d_errors || !image_gradient, "d_errors: expected a tensor where image has a gradient");

  Tensor d_decoded = call.new_decoded(decoded, call.stored);
  Tensor d_image = call.new_planes(decoded, call.C, image_gradient);
  call.d_decoded = call.pixels(d_decoded, call.K, call.C + 1);
  if (image_gradient) call.d_x = call.of_channels(d_image, "d_image");
  call.stream = call.should_stream(call.d_decoded, call.stored, d_decoded.numel());
  run(call, call.kernels, call.kernels.backward);
  return {d_decoded, d_image};
}

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("composition_forward", TORCH_BOX(&composition_forward));
  m.impl("composition_backward", TORCH_BOX(&composition_backward));
}

}  // namespace
}  // namespace iio
