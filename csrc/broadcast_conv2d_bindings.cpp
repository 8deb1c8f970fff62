// The operators broadcast_forward and broadcast_backward: what they are given is checked, results are allocated, and the
// stages of broadcast_conv2d.h run on torch's own threads.
#include "bindings.h"
#include "broadcast_conv2d.h"
#include "isa.h"

#include <memory>
#include <tuple>

namespace iio {
namespace {

// A call whose inputs are checked. The tensors made on the way live as long as it does.
class Call : public Broadcast {
 public:
  Call(const Tensor& constant, const Tensor& position_map, const Shape& rows, const Shape& columns, bool relu)
      : Broadcast{} {
    arithmetic = constant.scalar_type();
    STD_TORCH_CHECK(arithmetic == ScalarType::Float || arithmetic == ScalarType::Double,
                    "constant: expected float32 or float64, got ", torch::headeronly::toString(arithmetic));
    STD_TORCH_CHECK(constant.dim() == 4, "constant: expected 4 dimensions, got ", constant.dim());
    STD_TORCH_CHECK(position_map.dim() == 3, "position_map: expected 3 dimensions, got ", position_map.dim());
    M = constant.size(0), O = constant.size(3);
    this->rows = axis(position_map.size(0), rows, "rows");
    this->columns = axis(position_map.size(1), columns, "columns");
    this->relu = relu;
    check(constant, "constant", {M, this->rows.classes(), this->columns.classes(), O}, arithmetic);
    check(position_map, "position_map", map_shape(), arithmetic);
    this->constant = dense(constant);
    map = dense(position_map);
    storage = storage_of(arithmetic);
    kernels = choose_kernels(arithmetic == ScalarType::Double);
  }

  Shape map_shape() const { return {rows.size, columns.size, O}; }
  Shape images_shape() const { return {M, rows.size, columns.size, O}; }

  void store_as(ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(dtype == arithmetic || (dtype == ScalarType::BFloat16 && arithmetic == ScalarType::Float), name,
                    ": expected constant's dtype, or bfloat16 for float32, got ", torch::headeronly::toString(dtype));
    storage = storage_of(dtype);
  }

  const void* dense(const Tensor& x) {
    owned.push_back(torch::stable::contiguous(x));
    return owned.back().const_data_ptr();
  }

  template <class Stage>
  void run(Stage stage) {
    const int64_t bytes = kernels.workspace_size(*this);
    // How many chunks, each of so many additions, make it worth while to wake a thread.
    const int64_t grain = 1 + (1 << 15) / (1 + chunk_size() * rows.size * columns.size * O);
    torch::stable::parallel_for(0, chunks(), grain, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[bytes]);
      stage(*this, begin, end, workspace.get());
    });
  }

  ScalarType arithmetic;
  BroadcastKernels kernels;

 private:
  static Axis axis(int64_t size, const Shape& classes, const char* name) {
    STD_TORCH_CHECK(classes.size() == 3, name, ": expected 3 numbers, got ", classes.size());
    const int64_t head = classes[0], period = classes[1], tail = classes[2];
    STD_TORCH_CHECK(head >= 0 && period > 0 && tail >= 0 && head <= size && tail <= size - head, name,
                    ": expected head and tail within position_map and a period, got ", head, ", ", period, ", ", tail);
    return {size, head, period, tail};
  }

  static BroadcastKernels choose_kernels(bool is_double) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return avx512::broadcast_kernels(is_double);
    if (isa() == Isa::avx2) return avx2::broadcast_kernels(is_double);
#endif
    return baseline::broadcast_kernels(is_double);
  }

  std::vector<Tensor> owned;
};

Tensor broadcast_forward(Tensor constant, Tensor position_map, Shape rows, Shape columns, bool relu, ScalarType dtype) {
  Call call(constant, position_map, rows, columns, relu);
  call.store_as(dtype, "dtype");
  Tensor out = new_result(constant, call.images_shape(), dtype);
  call.out = out.mutable_data_ptr();
  const size_t bytes = out.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(call.out) % 64 == 0 && call.O * bytes % 64 == 0;
  call.stream = out.numel() * bytes >= kLarge && aligned && dtype == call.arithmetic;
  call.run(call.kernels.forward);
  return out;
}

std::tuple<Tensor, Tensor> broadcast_backward(Tensor d_out, Tensor constant, Tensor position_map, Shape rows,
                                              Shape columns, bool relu) {
  Call call(constant, position_map, rows, columns, relu);
  call.store_as(d_out.scalar_type(), "d_out");
  check(d_out, "d_out", call.images_shape(), d_out.scalar_type());
  call.d_out = call.dense(d_out);
  Shape shape = call.map_shape();
  Tensor d_map = new_result(constant, shape, call.arithmetic);
  shape.insert(shape.begin(), call.chunks());
  Tensor partials = new_result(constant, shape, call.arithmetic);
  Tensor d_constant =
      new_result(constant, {call.M, call.rows.classes(), call.columns.classes(), call.O}, call.arithmetic);
  call.d_map = d_map.mutable_data_ptr();
  call.partials = partials.mutable_data_ptr();
  call.d_constant = d_constant.mutable_data_ptr();
  call.run(call.kernels.backward);
  torch::stable::parallel_for(0, call.rows.size, 1 + (1 << 15) / (1 + call.chunks() * call.columns.size * call.O),
                              [&](int64_t begin, int64_t end) { call.kernels.sum_maps(call, begin, end); });
  return {d_constant, d_map};
}

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("broadcast_forward", TORCH_BOX(&broadcast_forward));
  m.impl("broadcast_backward", TORCH_BOX(&broadcast_backward));
}

}  // namespace
}  // namespace iio
