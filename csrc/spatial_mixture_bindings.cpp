// The operators mixture_forward and mixture_backward: what they are given is checked, results are allocated, and the
// stages of spatial_mixture.h run on torch's own threads.
#include <cmath>
#include <optional>
#include <tuple>

#include "isa.h"
#include "pixels_bindings.h"
#include "spatial_mixture.h"

namespace iio {
namespace {

MixtureKernels choose_kernels(Storage storage) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::mixture_kernels(storage);
  if (isa() == Isa::avx2) return avx2::mixture_kernels(storage);
#endif
  return baseline::mixture_kernels(storage);
}

// A call whose inputs are checked.
class Call : public Mixture, public PictureTensors {
 public:
  Call(const Tensor& image, const Tensor& decoded, double sigma) : Mixture{}, PictureTensors(*this, decoded) {
    STD_TORCH_CHECK(sigma > 0, "sigma: expected a number > 0, got ", sigma);
    precision = 1 / (sigma * sigma);
    log_peak = -double(C) * std::log(sigma * std::sqrt(2 * M_PI));
    x = of_channels(image, "image");
    // Until they are given:
    log_p = g = none(1, 1);
    m = q = leave_one_out = dm = dq = none(K, 1);
    d_x = none(1, C);
    d_decoded = d_nll = none(K, C + 1);
    kernels = choose_kernels(storage_of(arithmetic));
  }

  MixtureKernels kernels;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_forward(Tensor image, Tensor decoded, double sigma,
                                                                   bool everything) {
  Call call(image, decoded, sigma);
  Tensor log_likelihood = new_result(decoded, {call.B, call.H, call.W}, call.arithmetic);
  Tensor masks = call.new_planes(decoded, call.K, everything);
  Tensor posterior = call.new_planes(decoded, call.K, everything);
  Tensor leave_one_out = call.new_planes(decoded, call.K, everything);
  Tensor d_decoded = everything ? call.new_decoded(decoded, call.arithmetic) : call.new_planes(decoded, 0, false);
  call.log_p = call.of_pixels(log_likelihood, "log_likelihood");
  if (everything) {
    call.m = call.of_slots(masks, "masks");
    call.q = call.of_slots(posterior, "posterior");
    call.leave_one_out = call.of_slots(leave_one_out, "leave_one_out");
    call.d_decoded = call.pixels(d_decoded, call.K, call.C + 1);
    const size_t numbers = 3 * masks.numel() + d_decoded.numel();
    call.stream = call.channels_last && call.should_stream(call.d_decoded, call.arithmetic, numbers);
  }
  run(call, call.kernels, call.kernels.forward);
  return {log_likelihood, masks, posterior, leave_one_out, d_decoded};
}

std::tuple<Tensor, Tensor> mixture_backward(std::optional<Tensor> d_log_likelihood, std::optional<Tensor> d_masks,
                                            std::optional<Tensor> d_posterior, Tensor image, Tensor decoded,
                                            double sigma, bool image_gradient, std::optional<Tensor> masks,
                                            std::optional<Tensor> posterior, std::optional<Tensor> d_nll) {
  Call call(image, decoded, sigma);
  if (d_log_likelihood) call.g = call.of_pixels(*d_log_likelihood, "d_log_likelihood");
  if (d_masks) call.dm = call.of_slots(*d_masks, "d_masks");
  if (d_posterior) call.dq = call.of_slots(*d_posterior, "d_posterior");
  STD_TORCH_CHECK(masks.has_value() == d_nll.has_value() && posterior.has_value() == d_nll.has_value(),
                  "masks, posterior and d_nll: expected all of them or none");
  STD_TORCH_CHECK(d_nll.has_value() || !(d_masks || d_posterior),
                  "d_nll: expected a tensor beside d_masks and d_posterior, got none");
  if (d_nll) {
    check(*d_nll, "d_nll", {call.B, call.K, call.C + 1, call.H, call.W}, call.arithmetic);
    call.m = call.of_slots(*masks, "masks");
    call.q = call.of_slots(*posterior, "posterior");
    call.d_nll = call.pixels(*d_nll, call.K, call.C + 1);
  }
  Tensor d_image = call.new_planes(decoded, call.C, image_gradient);
  Tensor d_decoded = call.new_decoded(decoded, call.stored);
  if (image_gradient) call.d_x = call.of_channels(d_image, "d_image");
  call.d_decoded = call.pixels(d_decoded, call.K, call.C + 1);
  call.stream = call.channels_last && call.should_stream(call.d_decoded, call.stored, d_decoded.numel());
  run(call, call.kernels, call.kernels.backward);
  return {d_image, d_decoded};
}

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("mixture_forward", TORCH_BOX(&mixture_forward));
  m.impl("mixture_backward", TORCH_BOX(&mixture_backward));
}

}  // namespace
}  // namespace iio
