// The operators iterations_forward and iterations_backward: what they are given is checked, results are allocated, and
// the stages of slot_attention_module.h run on torch's own threads.
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "slot_attention_module.h"

namespace iio {
namespace {

constexpr const char* kMaps[] = {"wp", "wi", "wj", "w1", "w2"};
constexpr const char* kBiases[] = {"bp", "bi", "bj", "b1", "b2"};

// A call whose inputs are checked. The tensors made on the way live as long as it does.
class Call : public Iterations {
 public:
  // `slots` stands for any tensor (B, K, D).
  Call(const Tensor& x, const Tensor& slots, const char* slots_name, const std::vector<Tensor>& weights, int64_t steps,
       double epsilon)
      : Iterations{} {
    STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, Dx), got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(slots.dim() == 3, slots_name, ": expected (B, K, D), got ", slots.dim(), " dimensions");
    STD_TORCH_CHECK(weights.size() == 5, "weights: expected 5 tensors, got ", weights.size());
    STD_TORCH_CHECK(weights[3].dim() == 2, "w1: expected (H, D), got ", weights[3].dim(), " dimensions");
    STD_TORCH_CHECK(steps > 0, "iterations: expected at least one, got ", steps);
    stored = x.scalar_type();
    STD_TORCH_CHECK(stored == ScalarType::Float || stored == ScalarType::Double || stored == ScalarType::BFloat16,
                    "x: expected float32, float64 or bfloat16, got ", torch::headeronly::toString(stored));
    storage = storage_of(stored);
    arithmetic = stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    B = x.size(0), N = x.size(1), Dx = x.size(2), K = slots.size(1), D = slots.size(2), H = weights[3].size(0);
    T = steps, eps = epsilon;
    STD_TORCH_CHECK(K > 0 && D > 0 && Dx > 0 && H > 0, "x, slots, w1: expected at least one slot and one feature");
    check(x, "x", {B, N, Dx}, stored);
    owned.push_back(Dx == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x));
    this->x = owned.back().const_data_ptr();
    x_image = owned.back().stride(0), x_row = owned.back().stride(1);
    const Shape shapes[] = {{Dx, D}, {3 * D, Dx}, {3 * D, D}, {H, D}, {D, H}};
    for (int i = 0; i < 5; ++i) check(weights[i], kMaps[i], shapes[i], arithmetic);
    kernels = choose_kernels(storage);
  }

  const void* packed(const Tensor& given, const char* name, const Shape& shape) {
    check(given, name, shape, arithmetic);
    owned.push_back(torch::stable::contiguous(given));
    return owned.back().const_data_ptr();
  }

  // The weights as the products read them, (in, out) or (out, in).
  void pack(const std::vector<Tensor>& given, bool transposed) {
    for (int map = 0; map < 5; ++map) weights[map] = pad(given[map], map, transposed);
  }
  void pack_biases(const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(given.size() == 5, "biases: expected 5 tensors, got ", given.size());
    const Shape shapes[] = {{Dx}, {3 * D}, {3 * D}, {H}, {D}};
    for (int map = 0; map < 5; ++map) {
      check(given[map], kBiases[map], shapes[map], arithmetic);
      biases[map] = pad(given[map], map, /*transposed=*/false);
    }
  }

  template <class Stage>
  void run(Stage stage, bool backward) {
    const int64_t bytes = kernels.workspace_size(*this, backward);
    // How many images, each of so many multiplications, make it worth while to wake a thread.
    const int64_t grain = 1 + (1 << 17) / (1 + T * K * (2 * N * Dx + 4 * D * (D + H)));
    torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[bytes]);
      stage(*this, begin, end, workspace.get());
    });
  }

  ScalarType stored, arithmetic;
  IterationsKernels kernels;

 private:
  static IterationsKernels choose_kernels(Storage storage) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return avx512::iterations_kernels(storage);
    if (isa() == Isa::avx2) return avx2::iterations_kernels(storage);
#endif
    return baseline::iterations_kernels(storage);
  }

  // A map's weight, or its bias as a column, with zeros behind each row and column, and behind each gate of three.
  const void* pad(const Tensor& given, int map, bool transposed) {
    const int64_t out[] = {Dx, D, D, H, D}, in[] = {D, Dx, D, D, H};
    const int64_t gates = map == 1 || map == 2 ? 3 : 1, rows = gates * padded(out[map]);
    const int64_t columns = given.dim() == 1 ? 1 : in[map], width = given.dim() == 1 ? 1 : padded(in[map]);
    Tensor room = torch::stable::new_zeros(given, {rows * width});
    const auto copy = [&](const auto* from, auto* to) {
      for (int64_t row = 0; row < gates * out[map]; ++row) {
        const int64_t there = row / out[map] * padded(out[map]) + row % out[map];
        for (int64_t i = 0; i < columns; ++i) {
          to[transposed ? i * rows + there : there * width + i] =
              from[row * given.stride(0) + (given.dim() == 1 ? 0 : i * given.stride(1))];
        }
      }
    };
    if (arithmetic == ScalarType::Double) {
      copy(static_cast<const double*>(given.const_data_ptr()), static_cast<double*>(room.mutable_data_ptr()));
    } else {
      copy(static_cast<const float*>(given.const_data_ptr()), static_cast<float*>(room.mutable_data_ptr()));
    }
    owned.push_back(room);
    return room.const_data_ptr();
  }

  std::vector<Tensor> owned;
};

std::tuple<Tensor, Tensor, Tensor> iterations_forward(Tensor x, Tensor slots, std::vector<Tensor> weights,
                                                      std::vector<Tensor> biases, int64_t iterations, double eps,
                                                      double norm_eps, bool return_attention) {
  Call call(x, slots, "slots", weights, iterations, eps);
  call.norm_eps = norm_eps;
  call.slots = call.packed(slots, "slots", {call.B, call.K, call.D});
  call.pack(weights, /*transposed=*/true);
  call.pack_biases(biases);
  Tensor last_slots = torch::stable::new_empty(x, {call.B, call.K, call.D}, call.arithmetic);
  Tensor A = new_result(x, return_attention ? Shape{call.B, call.K, call.N} : Shape{0}, call.arithmetic);
  Tensor tape = new_result(x, {call.B, call.T, call.K, call.tape_width()}, call.arithmetic);
  call.last_slots = last_slots.mutable_data_ptr();
  call.A = return_attention ? A.mutable_data_ptr() : nullptr;
  call.tape = tape.mutable_data_ptr();
  call.run(call.kernels.forward, /*backward=*/false);
  return {last_slots, A, tape};
}

std::tuple<Tensor, Tensor, Tensor> iterations_backward(Tensor d_slots, std::optional<Tensor> d_attention, Tensor x,
                                                       Tensor tape, std::vector<Tensor> weights, double eps) {
  STD_TORCH_CHECK(tape.dim() == 4, "tape: expected (B, T, K, its width), got ", tape.dim(), " dimensions");
  Call call(x, d_slots, "d_slots", weights, tape.size(1), eps);
  const auto [B, T, K, N, D, Dx] = std::make_tuple(call.B, call.T, call.K, call.N, call.D, call.Dx);
  call.d_last_slots = call.packed(d_slots, "d_slots", {B, K, D});
  call.tape = const_cast<void*>(call.packed(tape, "tape", {B, T, K, call.tape_width()}));
  call.pack(weights, /*transposed=*/false);
  if (d_attention) {
    check(*d_attention, "d_attention", {B, K, N}, call.arithmetic);
    call.dA = d_attention->const_data_ptr();
    for (int i = 0; i < 3; ++i) call.dA_stride[i] = d_attention->stride(i);
  }
  Tensor dx = new_result(x, {B, N, Dx}, call.stored);
  Tensor d_first_slots = torch::stable::new_empty(x, {B, K, D}, call.arithmetic);
  Tensor made = new_result(x, {B, T, K, call.made_width()}, call.arithmetic);
  call.dx = dx.mutable_data_ptr();
  call.stream = dx.numel() * dx.element_size() >= kLarge && reinterpret_cast<uintptr_t>(call.dx) % 64 == 0;
  call.d_slots = d_first_slots.mutable_data_ptr();
  call.made = made.mutable_data_ptr();
  call.run(call.kernels.backward, /*backward=*/true);
  return {dx, d_first_slots, made};
}

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("iterations_forward", TORCH_BOX(&iterations_forward));
  m.impl("iterations_backward", TORCH_BOX(&iterations_backward));
}

}  // namespace
}  // namespace iio
