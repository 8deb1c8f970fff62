// What the bindings of operators on pictures share: the check of their tensors, where their pixels lie, and the
// threads.
#pragma once

#include "bindings.h"
#include "pixels.h"

#include <memory>

namespace iio {

// The tensors of a call: they are checked, and `pictures` is filled with the first of them. Those that are made on the
// way live as long as this.
class PictureTensors {
 public:
  PictureTensors(Pictures& pictures, const Tensor& decoded) : pictures(pictures) {
    STD_TORCH_CHECK(decoded.is_cpu(), "decoded: expected a tensor on the CPU");
    STD_TORCH_CHECK(decoded.dim() == 5, "decoded: expected (B, K, C + 1, H, W), got ", decoded.dim(), " dimensions");
    stored = decoded.scalar_type();
    STD_TORCH_CHECK(stored == ScalarType::Float || stored == ScalarType::Double || stored == ScalarType::BFloat16,
                    "decoded: expected float32, float64 or bfloat16, got ", torch::headeronly::toString(stored));
    arithmetic = stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t K = decoded.size(1), C = decoded.size(2) - 1;
    H = decoded.size(3), W = decoded.size(4);
    STD_TORCH_CHECK(K > 0 && C > 0 && H * W > 0,
                    "decoded: expected at least one slot, one channel beside that of the masks and one pixel");
    channels_last = decoded.stride(2) < decoded.stride(4);
    pictures.B = decoded.size(0), pictures.K = K, pictures.C = C, pictures.N = H * W;
    pictures.decoded = pixels(decoded, K, C + 1);
  }

  // What is given for each pixel, slot or channel, in the dtype of the arithmetic.
  Pixels of_pixels(const Tensor& given, const char* name) {
    check(given, name, {pictures.B, H, W}, arithmetic);
    return pixels(given, 1, 1);
  }
  Pixels of_slots(const Tensor& given, const char* name) {
    check(given, name, {pictures.B, pictures.K, H, W}, arithmetic);
    return pixels(given, pictures.K, 1);
  }
  Pixels of_channels(const Tensor& given, const char* name) {
    check(given, name, {pictures.B, pictures.C, H, W}, arithmetic);
    return pixels(given, 1, pictures.C);
  }

  const void* of_images(const Tensor& given, const char* name) {
    check(given, name, {pictures.B}, arithmetic);
    owned.push_back(torch::stable::contiguous(given));
    return owned.back().const_data_ptr();
  }

  // What is not given.
  Pixels none(int64_t slots, int64_t channels) const {
    return {nullptr, pictures.decoded.storage, slots, channels, 0, 0, 0, 0};
  }

  // Room for a result of slots or channels, without elements where it is not asked for.
  Tensor new_planes(const Tensor& like, int64_t planes, bool wanted) const {
    return new_result(like, wanted ? Shape{pictures.B, planes, H, W} : Shape{0}, arithmetic);
  }

  // Room for as many numbers as decoded has, in its own layout. It is that of channels last where a pixel's channels
  // are nearer than the next pixel's.
  Tensor new_decoded(const Tensor& decoded, ScalarType dtype) const {
    const int64_t B = pictures.B, K = pictures.K, channels = pictures.C + 1;
    if (!channels_last) return new_result(decoded, {B, K, channels, H, W}, dtype);
    const Tensor x = new_result(decoded, {B, K, H, W, channels}, dtype);
    return torch::stable::transpose(torch::stable::transpose(x, 3, 4), 2, 3);
  }

  // x in place if its pixels are evenly spaced, as in plain and in channels-last layouts, otherwise copied.
  Pixels pixels(const Tensor& x, int64_t slots, int64_t channels) {
    const int64_t h = x.dim() - 2, w = x.dim() - 1;
    const bool even = H == 1 || W == 1 || x.stride(h) == W * x.stride(w);
    owned.push_back(even ? x : torch::stable::contiguous(x));
    const Tensor& y = owned.back();
    const Storage storage = storage_of(y.scalar_type());
    // Without a dimension of its own for slots or for channels, there is only one of these.
    return {const_cast<void*>(y.const_data_ptr()),
            storage,
            slots,
            channels,
            y.stride(0),
            y.stride(1),
            y.stride(h - 1),
            y.stride(W == 1 ? h : w)};
  }

  // Whether so many numbers are too large for the caches, and vectors can be written past them to all of x, which has
  // decoded's layout: to its rows, or to its slots' pixels with their channels.
  bool should_stream(const Pixels& x, ScalarType dtype, size_t numbers) const {
    const size_t bytes = arithmetic == ScalarType::Double ? 8 : 4, run = channels_last ? x.slot : x.channel;
    const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 64 == 0 && run * bytes % 64 == 0;
    return dtype == arithmetic && aligned && numbers * bytes >= kLarge;
  }

  ScalarType stored, arithmetic;
  int64_t H, W;
  bool channels_last;

 private:
  Pictures& pictures;
  std::vector<Tensor> owned;
};

// A stage for all tasks, on torch's own threads, each with a workspace of its own.
template <class Call, class Kernels, class Stage>
void run(const Call& call, const Kernels& kernels, Stage stage) {
  const int64_t bytes = kernels.workspace_size(call);
  // How many tasks, each of so many multiplications, make it worth while to wake a thread.
  const int64_t grain = 1 + (1 << 17) / (8 * call.chunk_size() * call.K * (call.C + 1));
  torch::stable::parallel_for(0, call.tasks(), grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> workspace(new char[bytes]);
    stage(call, begin, end, workspace.get());
  });
}

}  // namespace iio
