// The operators of inpainting, alike on every device: arguments checked, memory allocated, a call run.
//
// A device says which tensors are its own, and makes of a call's inputs the results that it has memory for. Its `stage`
// is what it is all about (errors, gradients, weighted_gradients, listed_errors, listed_gradients, entropies, predictions
// or prediction_gradients):
//
//     struct Device {
//       static constexpr const char* kName;
//       static bool holds(const Tensor& x);
//       template <class T>
//       static void run(const Call<T>& call, Stage stage);
//     };
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "iio_loss.h"

namespace iio {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostMasks = 16;        // whose subsets are all visited
constexpr int64_t kMostListedMasks = 32;  // of which some are

struct Inpainter {
  double sigma;
  int64_t kernel_size, repeats;
  double eps;
};

// The tensor itself where each of its planes is contiguous, a copy otherwise.
inline Tensor with_dense_planes(const Tensor& x) {
  const bool dense = (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3));
  return dense ? x : torch::stable::contiguous(x);
}

// A call of an operator: its tensors, and the kernels' arguments, to which the operator adds what it wants.
template <class Real>
struct Call {
  using T = Real;
  const Tensor image, masks;
  const int64_t B = image.size(0);
  std::vector<T> taps;
  Inpainting<T> args;

  Call(const Tensor& any_image, const Tensor& any_masks, const Inpainter& inpainter)
      : image(with_dense_planes(any_image)), masks(with_dense_planes(any_masks)) {
    const int64_t radius = inpainter.kernel_size / 2;
    const auto gaussian = [&](int64_t t) { return std::exp(-0.5 * std::pow(t / inpainter.sigma, 2)); };
    double total = 0;
    for (int64_t t = -radius; t <= radius; ++t) total += gaussian(t);
    for (int64_t t = 0; t <= radius; ++t) taps.push_back(T(gaussian(t) / total));
    args.image = {data(image), image.stride(0), image.stride(1)};
    args.masks = {data(masks), masks.stride(0), masks.stride(1)};
    args.K = masks.size(1);
    args.C = image.size(1);
    args.H = image.size(2);
    args.W = image.size(3);
    args.sigma = inpainter.sigma;
    args.taps = taps.data();
    args.radius = radius;
    args.repeats = inpainter.repeats;
    args.eps = T(inpainter.eps);
  }
  Call(const Call&) = delete;

  static T* data(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }

  Tensor empty(const std::vector<int64_t>& size) const { return torch::stable::new_empty(image, size); }

  // Memory for dimage or dmasks, or an empty tensor where it is not wanted.
  Tensor gradient(const Tensor& like, bool wanted, T*& pointer) const {
    const Tensor result = wanted ? empty({B, like.size(1), args.H, args.W}) : empty({0});
    if (wanted) pointer = data(result);
    return result;
  }
};

template <class Device>
struct Operators {
  static void check(const Tensor& image, const Tensor& masks, const Inpainter& inpainter) {
    STD_TORCH_CHECK(image.dim() == 4 && masks.dim() == 4, "image and masks must have 4 dimensions");
    for (int64_t dimension : {0, 2, 3}) {
      STD_TORCH_CHECK(image.size(dimension) == masks.size(dimension), "image and masks differ in dimension ",
                      dimension);
    }
    const int64_t H = image.size(2), W = image.size(3);
    STD_TORCH_CHECK(image.size(1) >= 1 && masks.size(1) >= 1, "expected at least one channel and one mask");
    STD_TORCH_CHECK(
        Device::holds(image) && Device::holds(masks) && image.get_device_index() == masks.get_device_index(),
        "image and masks must be on ", Device::kName);
    STD_TORCH_CHECK(image.scalar_type() == ScalarType::Float || image.scalar_type() == ScalarType::Double,
                    "image must be float32 or float64");
    STD_TORCH_CHECK(image.scalar_type() == masks.scalar_type(), "image and masks must have one dtype");
    STD_TORCH_CHECK(inpainter.sigma > 0, "sigma must be positive");
    STD_TORCH_CHECK(inpainter.kernel_size % 2 == 1 && inpainter.kernel_size >= 1 && inpainter.kernel_size <= H &&
                        inpainter.kernel_size <= W,
                    "kernel_size must be odd and at most the image's smaller side");
    STD_TORCH_CHECK(inpainter.repeats >= 1, "repeats must be at least 1");
  }

  static void check_subsets(const Tensor& masks) {
    STD_TORCH_CHECK(masks.size(1) >= 2 && masks.size(1) <= kMostMasks, "expected 2 to ", kMostMasks, " masks, got ",
                    masks.size(1));
  }

  static void check_list(const Tensor& masks, const Tensor& pairs, const Tensor& weights) {
    STD_TORCH_CHECK(masks.size(1) >= 2 && masks.size(1) <= kMostListedMasks, "expected 2 to ", kMostListedMasks,
                    " masks, got ", masks.size(1));
    for (const Tensor* x : {&pairs, &weights}) {
      STD_TORCH_CHECK(Device::holds(*x) && x->get_device_index() == masks.get_device_index(),
                      "pairs and weights must be on ", Device::kName);
    }
    STD_TORCH_CHECK(pairs.scalar_type() == ScalarType::Long, "pairs must be int64");
    STD_TORCH_CHECK(weights.scalar_type() == masks.scalar_type(), "weights must have the dtype of masks");
    STD_TORCH_CHECK(
        pairs.dim() == 2 && weights.dim() == 1 && pairs.size(0) == masks.size(0) && pairs.size(1) == weights.size(0),
        "expected pairs (B, P) and weights (P,) for masks of B images");
  }

  static void check_gradient(const Tensor& gradient, const Tensor& image, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(Device::holds(gradient) && gradient.get_device_index() == image.get_device_index() &&
                        gradient.scalar_type() == image.scalar_type(),
                    "the gradient must have image's device and dtype");
    STD_TORCH_CHECK(gradient.dim() == int64_t(shape.size()), "the gradient has the wrong shape");
    for (size_t i = 0; i < shape.size(); ++i) {
      STD_TORCH_CHECK(gradient.size(i) == shape[i], "the gradient has the wrong shape");
    }
  }

  // What the operation returns, which is called with a Call<float> or a Call<double>.
  template <class Operation>
  static auto with_call(const Tensor& image, const Tensor& masks, const Inpainter& inpainter,
                        const Operation& operation) {
    check(image, masks, inpainter);
    if (image.scalar_type() == ScalarType::Double) {
      Call<double> call(image, masks, inpainter);
      return operation(call);
    }
    Call<float> call(image, masks, inpainter);
    return operation(call);
  }

  static std::tuple<Tensor, Tensor, Tensor> iio_loss(const Tensor& image, const Tensor& masks, double sigma,
                                                     int64_t kernel_size, int64_t repeats, double eps,
                                                     bool image_gradient, bool masks_gradient) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      check_subsets(masks);
      const Tensor losses = call.empty({call.B});
      call.args.losses = call.data(losses);
      const Tensor dimage = call.gradient(image, image_gradient, call.args.dimage);
      const Tensor dmasks = call.gradient(masks, masks_gradient, call.args.dmasks);
      Device::run(call, image_gradient || masks_gradient ? Stage::gradients : Stage::errors);
      return std::make_tuple(losses, dimage, dmasks);
    });
  }

  static std::tuple<Tensor, Tensor, Tensor> sampled_iio_loss(const Tensor& image, const Tensor& masks,
                                                             const Tensor& any_pairs, const Tensor& any_weights,
                                                             double sigma, int64_t kernel_size, int64_t repeats,
                                                             double eps, bool image_gradient, bool masks_gradient) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      check_list(masks, any_pairs, any_weights);
      const Tensor pairs = torch::stable::contiguous(any_pairs), weights = torch::stable::contiguous(any_weights);
      call.args.pairs = static_cast<const int64_t*>(pairs.data_ptr());
      call.args.pair_weights = call.data(weights);
      call.args.P = pairs.size(1);
      const Tensor losses = call.empty({call.B});
      call.args.losses = call.data(losses);
      const Tensor dimage = call.gradient(image, image_gradient, call.args.dimage);
      const Tensor dmasks = call.gradient(masks, masks_gradient, call.args.dmasks);
      Device::run(call, image_gradient || masks_gradient ? Stage::listed_gradients : Stage::listed_errors);
      return std::make_tuple(losses, dimage, dmasks);
    });
  }

  static int64_t terms(const Tensor& masks) { return (int64_t(1) << (masks.size(1) - 1)) - 1; }

  static Tensor conditional_entropies(const Tensor& image, const Tensor& masks, double sigma, int64_t kernel_size,
                                      int64_t repeats, double eps) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      check_subsets(masks);
      const Tensor entropies = call.empty({call.B, masks.size(1), terms(masks)});
      call.args.entropies = call.data(entropies);
      Device::run(call, Stage::entropies);
      return entropies;
    });
  }

  static std::tuple<Tensor, Tensor> conditional_entropies_backward(const Tensor& gradient, const Tensor& image,
                                                                   const Tensor& masks, double sigma,
                                                                   int64_t kernel_size, int64_t repeats, double eps,
                                                                   bool image_gradient) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      check_subsets(masks);
      check_gradient(gradient, image, {call.B, masks.size(1), terms(masks)});
      const Tensor weights = torch::stable::contiguous(gradient);
      call.args.weights = call.data(weights);
      const Tensor dimage = call.gradient(image, image_gradient, call.args.dimage);
      const Tensor dmasks = call.gradient(masks, true, call.args.dmasks);
      Device::run(call, Stage::weighted_gradients);
      return std::make_tuple(dimage, dmasks);
    });
  }

  static Tensor inpaint(const Tensor& image, const Tensor& masks, double sigma, int64_t kernel_size, int64_t repeats,
                        double eps) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      const Tensor psi = call.empty({call.B, masks.size(1), image.size(1), image.size(2), image.size(3)});
      call.args.psi = call.data(psi);
      Device::run(call, Stage::predictions);
      return psi;
    });
  }

  static std::tuple<Tensor, Tensor> inpaint_backward(const Tensor& gradient, const Tensor& image, const Tensor& masks,
                                                     double sigma, int64_t kernel_size, int64_t repeats, double eps) {
    return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
      check_gradient(gradient, image, {call.B, masks.size(1), image.size(1), image.size(2), image.size(3)});
      const Tensor psi_gradient = torch::stable::contiguous(gradient);
      call.args.psi_gradient = call.data(psi_gradient);
      const Tensor dimage = call.gradient(image, true, call.args.dimage);
      const Tensor dmasks = call.gradient(masks, true, call.args.dmasks);
      Device::run(call, Stage::prediction_gradients);
      return std::make_tuple(dimage, dmasks);
    });
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("iio_loss", TORCH_BOX(&Operators::iio_loss));
    library.impl("sampled_iio_loss", TORCH_BOX(&Operators::sampled_iio_loss));
    library.impl("conditional_entropies", TORCH_BOX(&Operators::conditional_entropies));
    library.impl("conditional_entropies_backward", TORCH_BOX(&Operators::conditional_entropies_backward));
    library.impl("inpaint", TORCH_BOX(&Operators::inpaint));
    library.impl("inpaint_backward", TORCH_BOX(&Operators::inpaint_backward));
  }
};

}  // namespace iio
