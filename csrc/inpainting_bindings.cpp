// The operators of the inpainting kernels: arguments checked, memory allocated, stages spread over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "inpainting.h"
#include "isa.h"

namespace iio {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostMasks = 16;  // whose subsets are visited

struct Inpainter {
  double sigma;
  int64_t kernel_size, repeats;
  double eps;
};

void check(const Tensor& image, const Tensor& masks, const Inpainter& inpainter) {
  STD_TORCH_CHECK(image.dim() == 4 && masks.dim() == 4, "image and masks must have 4 dimensions");
  for (int64_t dimension : {0, 2, 3}) {
    STD_TORCH_CHECK(image.size(dimension) == masks.size(dimension), "image and masks differ in dimension ", dimension);
  }
  const int64_t H = image.size(2), W = image.size(3);
  STD_TORCH_CHECK(image.size(1) >= 1 && masks.size(1) >= 1, "expected at least one channel and one mask");
  STD_TORCH_CHECK(image.is_cpu() && masks.is_cpu(), "image and masks must be on the CPU");
  STD_TORCH_CHECK(image.scalar_type() == ScalarType::Float || image.scalar_type() == ScalarType::Double,
                  "image must be float32 or float64");
  STD_TORCH_CHECK(image.scalar_type() == masks.scalar_type(), "image and masks must have one dtype");
  STD_TORCH_CHECK(inpainter.sigma > 0, "sigma must be positive");
  STD_TORCH_CHECK(inpainter.kernel_size % 2 == 1 && inpainter.kernel_size >= 1 && inpainter.kernel_size <= H &&
                      inpainter.kernel_size <= W,
                  "kernel_size must be odd and at most the image's smaller side");
  STD_TORCH_CHECK(inpainter.repeats >= 1, "repeats must be at least 1");
}

void check_subsets(const Tensor& masks) {
  STD_TORCH_CHECK(masks.size(1) >= 2 && masks.size(1) <= kMostMasks, "expected 2 to ", kMostMasks, " masks, got ",
                  masks.size(1));
}

void check_gradient(const Tensor& gradient, const Tensor& image, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(gradient.is_cpu() && gradient.scalar_type() == image.scalar_type(),
                  "the gradient must have image's device and dtype");
  STD_TORCH_CHECK(gradient.dim() == int64_t(shape.size()), "the gradient has the wrong shape");
  for (size_t i = 0; i < shape.size(); ++i) {
    STD_TORCH_CHECK(gradient.size(i) == shape[i], "the gradient has the wrong shape");
  }
}

// The tensor itself where each of its planes is contiguous, a copy otherwise.
Tensor with_dense_planes(const Tensor& x) {
  const bool dense = (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3));
  return dense ? x : torch::stable::contiguous(x);
}

const InpaintingKernels<float>& kernels(float) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::inpainting_float;
  if (isa() == Isa::avx2) return avx2::inpainting_float;
#endif
  return baseline::inpainting_float;
}

const InpaintingKernels<double>& kernels(double) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::inpainting_double;
  if (isa() == Isa::avx2) return avx2::inpainting_double;
#endif
  return baseline::inpainting_double;
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

  // Each thread takes images of its own through all stages, while their planes stay in its cache. Those left over,
  // fewer than there are threads, go through each stage together, its units spread over all threads.
  void run(const std::vector<Stage>& stages) const {
    if (B == 0) return;
    const InpaintingKernels<T>& kernels = iio::kernels(T{});
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t own = B / threads, left_over = B % threads;

    const int64_t images = own > 0 ? threads : left_over;  // at once
    const int64_t image_size = aligned(kernels.image_scratch(args));
    const int64_t thread_size = aligned(kernels.thread_scratch(args));
    const Tensor memory = empty({images * image_size + threads * thread_size + kAlignment});
    T* const start = data(memory);
    T* const image_scratch = start + (aligned(address(start)) - address(start));
    T* const thread_scratch = image_scratch + images * image_size;

    const auto on_each_thread = [&](const auto& work) {
      torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t thread = first; thread < last; ++thread) work(thread);
      });
    };
    if (own > 0) {
      on_each_thread([&](int64_t thread) {
        for (int64_t b = thread * own; b < (thread + 1) * own; ++b) {
          for (Stage stage : stages) {
            kernels.run(args, stage, b, 0, kernels.units(args, stage), image_scratch + thread * image_size,
                        thread_scratch + thread * thread_size);
          }
        }
      });
    }
    if (left_over == 0) return;
    for (Stage stage : stages) {
      const int64_t units = kernels.units(args, stage), all = left_over * units;
      on_each_thread([&](int64_t thread) {
        const int64_t first = all * thread / threads, last = all * (thread + 1) / threads;
        for (int64_t k = first / units; k * units < last; ++k) {
          kernels.run(args, stage, threads * own + k, std::max<int64_t>(first - k * units, 0),
                      std::min(last - k * units, units), image_scratch + k * image_size,
                      thread_scratch + thread * thread_size);
        }
      });
    }
  }

 private:
  // Scratch memory begins on a cache line; all counted in T.
  static constexpr int64_t kAlignment = 64 / sizeof(T);
  static int64_t aligned(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }
  static int64_t address(const T* p) { return int64_t(reinterpret_cast<uintptr_t>(p) / sizeof(T)); }
};

// What the operation returns, which is called with a Call<float> or a Call<double>.
template <class Operation>
auto with_call(const Tensor& image, const Tensor& masks, const Inpainter& inpainter, const Operation& operation) {
  check(image, masks, inpainter);
  if (image.scalar_type() == ScalarType::Double) {
    Call<double> call(image, masks, inpainter);
    return operation(call);
  }
  Call<float> call(image, masks, inpainter);
  return operation(call);
}

// The filter, the stages given, and with `gradients` the filter again for what they made of its planes.
std::vector<Stage> stages(std::initializer_list<Stage> between, bool gradients) {
  std::vector<Stage> all = {Stage::products, Stage::totals, Stage::rows, Stage::columns};
  all.insert(all.end(), between);
  if (gradients) {
    for (Stage stage : {Stage::gradient_totals, Stage::columns, Stage::rows, Stage::finish}) all.push_back(stage);
  }
  return all;
}

// ---- The operators --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> iio_loss(const Tensor& image, const Tensor& masks, double sigma, int64_t kernel_size,
                                            int64_t repeats, double eps, bool image_gradient, bool masks_gradient) {
  return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
    check_subsets(masks);
    const Tensor losses = call.empty({call.B});
    call.args.losses = call.data(losses);
    const Tensor dimage = call.gradient(image, image_gradient, call.args.dimage);
    const Tensor dmasks = call.gradient(masks, masks_gradient, call.args.dmasks);
    if (image_gradient || masks_gradient) {
      call.run(stages({Stage::gradients, Stage::losses}, true));
    } else {
      call.run(stages({Stage::errors, Stage::losses}, false));
    }
    return std::make_tuple(losses, dimage, dmasks);
  });
}

int64_t terms(const Tensor& masks) { return (int64_t(1) << (masks.size(1) - 1)) - 1; }

Tensor conditional_entropies(const Tensor& image, const Tensor& masks, double sigma, int64_t kernel_size,
                             int64_t repeats, double eps) {
  return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
    check_subsets(masks);
    const Tensor entropies = call.empty({call.B, masks.size(1), terms(masks)});
    call.args.entropies = call.data(entropies);
    call.run(stages({Stage::residuals, Stage::entropies}, false));
    return entropies;
  });
}

std::tuple<Tensor, Tensor> conditional_entropies_backward(const Tensor& gradient, const Tensor& image,
                                                          const Tensor& masks, double sigma, int64_t kernel_size,
                                                          int64_t repeats, double eps, bool image_gradient) {
  return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
    check_subsets(masks);
    check_gradient(gradient, image, {call.B, masks.size(1), terms(masks)});
    const Tensor weights = torch::stable::contiguous(gradient);
    call.args.weights = call.data(weights);
    const Tensor dimage = call.gradient(image, image_gradient, call.args.dimage);
    const Tensor dmasks = call.gradient(masks, true, call.args.dmasks);
    call.run(stages({Stage::weighted_gradients, Stage::losses}, true));
    return std::make_tuple(dimage, dmasks);
  });
}

Tensor inpaint(const Tensor& image, const Tensor& masks, double sigma, int64_t kernel_size, int64_t repeats,
               double eps) {
  return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
    const Tensor psi = call.empty({call.B, masks.size(1), image.size(1), image.size(2), image.size(3)});
    call.args.psi = call.data(psi);
    call.run(stages({Stage::predictions}, false));
    return psi;
  });
}

std::tuple<Tensor, Tensor> inpaint_backward(const Tensor& gradient, const Tensor& image, const Tensor& masks,
                                            double sigma, int64_t kernel_size, int64_t repeats, double eps) {
  return with_call(image, masks, {sigma, kernel_size, repeats, eps}, [&](auto& call) {
    check_gradient(gradient, image, {call.B, masks.size(1), image.size(1), image.size(2), image.size(3)});
    const Tensor psi_gradient = torch::stable::contiguous(gradient);
    call.args.psi_gradient = call.data(psi_gradient);
    const Tensor dimage = call.gradient(image, true, call.args.dimage);
    const Tensor dmasks = call.gradient(masks, true, call.args.dmasks);
    call.run(stages({Stage::prediction_gradients}, true));
    return std::make_tuple(dimage, dmasks);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("iio_loss", TORCH_BOX(&iio_loss));
  m.impl("conditional_entropies", TORCH_BOX(&conditional_entropies));
  m.impl("conditional_entropies_backward", TORCH_BOX(&conditional_entropies_backward));
  m.impl("inpaint", TORCH_BOX(&inpaint));
  m.impl("inpaint_backward", TORCH_BOX(&inpaint_backward));
}

}  // namespace iio
