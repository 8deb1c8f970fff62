// The operators of inpainting on the CPU: a call's stages, spread over torch's threads.
#include "iio_loss_operators.h"
#include "isa.h"

#include <algorithm>

namespace iio {
namespace {

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

// What a call consists of: the filter, `stage`, and with gradients the filter again for what was made of its planes.
std::vector<Stage> stages(Stage stage) {
  std::vector<Stage> all = {Stage::products, Stage::totals, Stage::rows, Stage::columns};
  const auto then = [&](std::initializer_list<Stage> more) { all.insert(all.end(), more); };
  if (stage == Stage::entropies) then({Stage::residuals});
  then({stage});
  if (stage == Stage::entropies || stage == Stage::predictions) return all;
  if (stage != Stage::prediction_gradients) then({Stage::losses});
  if (stage != Stage::errors && stage != Stage::listed_errors)
    then({Stage::gradient_totals, Stage::columns, Stage::rows, Stage::finish});
  return all;
}

// Scratch memory begins on a cache line; all counted in T.
template <class T>
constexpr int64_t kAlignment = 64 / sizeof(T);

template <class T>
int64_t aligned(int64_t size) {
  return (size + kAlignment<T> - 1) / kAlignment<T> * kAlignment<T>;
}

template <class T>
T* aligned(T* p) {
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(p) / sizeof(T));
  return p + (aligned<T>(address) - address);
}

struct Cpu {
  static constexpr const char* kName = "the CPU";

  static bool holds(const Tensor& x) { return x.is_cpu(); }

  // Each thread takes images of its own through all stages, while their planes stay in its cache. Those left over,
  // fewer than there are threads, go through each stage together, its units spread over all threads.
  template <class T>
  static void run(const Call<T>& call, Stage stage) {
    const Inpainting<T>& args = call.args;
    const int64_t B = call.B;
    if (B == 0) return;
    const std::vector<Stage> stages = iio::stages(stage);
    const InpaintingKernels<T>& kernels = iio::kernels(T{});
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t own = B / threads, left_over = B % threads;

    const int64_t images = own > 0 ? threads : left_over;  // at once
    const int64_t image_size = aligned<T>(kernels.image_scratch(args));
    const int64_t thread_size = aligned<T>(kernels.thread_scratch(args));
    const Tensor memory = call.empty({images * image_size + threads * thread_size + kAlignment<T>});
    T* const image_scratch = aligned(call.data(memory));
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
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) { Operators<Cpu>::implement(m); }

}  // namespace iio
