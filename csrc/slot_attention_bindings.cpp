// The operators slot_attention_forward and slot_attention_backward: what they are given is checked, results are
// allocated, and the stages of slot_attention.h run on torch's own threads.
#include "bindings.h"
#include "isa.h"
#include "slot_attention.h"

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace iio {
namespace {

template <class T>
Strided<T> strided(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), {x.stride(0), x.stride(1), x.stride(2)}};
}

// A call whose inputs are checked. The tensors made on the way live as long as it does.
class Call : public SlotAttention {
 public:
  Call(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, const std::optional<Tensor>& logit_bias,
       const std::optional<Tensor>& slot_mask, const std::optional<Tensor>& input_mask, double scale, double eps,
       bool eps_in_weights, bool normalize, bool joint_heads)
      : SlotAttention{} {
    STD_TORCH_CHECK(q.dim() == 4, "q: expected (B, H, K, Dk), got ", q.dim(), " dimensions");
    STD_TORCH_CHECK(k.dim() == 4, "k: expected (B, H, N, Dk), got ", k.dim(), " dimensions");
    STD_TORCH_CHECK(!v || v->dim() == 4, "v: expected (B, H, N, Dv), got ", v ? v->dim() : 0, " dimensions");
    B = q.size(0), H = q.size(1), K = q.size(2), Dk = q.size(3), N = k.size(2), Dv = v ? v->size(3) : Dk;
    STD_TORCH_CHECK(K > 0 && Dk > 0, "q: expected at least one slot and one feature");

    stored = k.scalar_type();
    STD_TORCH_CHECK(stored == ScalarType::Float || stored == ScalarType::Double || stored == ScalarType::BFloat16,
                    "k: expected float32, float64 or bfloat16, got ", torch::headeronly::toString(stored));
    storage = storage_of(stored);
    arithmetic = stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;

    check(q, "q", {B, H, K, Dk}, q.scalar_type() == stored ? stored : arithmetic);
    check(k, "k", {B, H, N, Dk}, stored);
    this->q = packed(q);
    this->k = rows(k);
    values_are_keys = !v;
    if (v) {
      check(*v, "v", {B, H, N, Dv}, stored);
      this->v = rows(*v);
    }
    if (logit_bias) this->logit_bias = optional(logit_bias, "logit_bias", {B, H, K});
    if (slot_mask) {
      check(*slot_mask, "slot_mask", {B, H, K}, ScalarType::Bool);
      this->slot_mask = strided<bool>(*slot_mask);
    }
    if (input_mask) {
      check(*input_mask, "input_mask", {B, H, N}, ScalarType::Bool);
      this->input_mask = strided<bool>(*input_mask);
    }
    this->scale = scale;
    this->joint_heads = joint_heads;
    this->normalize = normalize;
    if (normalize) (eps_in_weights ? eps_weights : eps_denominator) = eps;
    kernels = choose_kernels(storage);
  }

  // x, which may be small, contiguous and in the dtype of the arithmetic.
  const void* packed(const Tensor& x) {
    Tensor y = x.scalar_type() == arithmetic ? x : torch::stable::to(x, arithmetic);
    owned.push_back(y.is_contiguous() ? y : torch::stable::contiguous(y));
    return owned.back().const_data_ptr();
  }

  const void* optional(const std::optional<Tensor>& x, const char* name, const Shape& shape) {
    if (!x) return nullptr;
    check(*x, name, shape, arithmetic);
    return packed(*x);
  }

  // x in place, unless its rows are not contiguous.
  Strided<void> rows(const Tensor& x) {
    const bool usable = x.size(3) <= 1 || x.stride(3) == 1;
    owned.push_back(usable ? x : torch::stable::contiguous(x));
    return strided<void>(owned.back());
  }

  // Both stages of a pass, on all threads.
  void run(void (*chunk_stage)(const SlotAttention&, int64_t, int64_t, char*),
           void (*slot_stage)(const SlotAttention&, int64_t, int64_t), int64_t width, const Tensor& like) {
    Tensor sums = torch::stable::new_empty(like, {chunk_tasks() * partial_size(width)}, arithmetic);
    partials = sums.mutable_data_ptr();
    const int64_t bytes = kernels.workspace_size(*this);
    torch::stable::parallel_for(0, chunk_tasks(), grain(chunk_size() * heads() * K * (Dk + Dv)),
                                [&](int64_t begin, int64_t end) {
                                  std::unique_ptr<char[]> workspace(new char[bytes]);
                                  chunk_stage(*this, begin, end, workspace.get());
                                });
    torch::stable::parallel_for(0, slot_tasks(), grain(chunks() * width),
                                [&](int64_t begin, int64_t end) { slot_stage(*this, begin, end); });
  }

  ScalarType stored, arithmetic;
  SlotAttentionKernels kernels;

 private:
  static SlotAttentionKernels choose_kernels(Storage storage) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return avx512::slot_attention_kernels(storage);
    if (isa() == Isa::avx2) return avx2::slot_attention_kernels(storage);
#endif
    return baseline::slot_attention_kernels(storage);
  }

  // How many tasks, each of so many multiplications, make it worth while to wake a thread.
  static int64_t grain(int64_t multiplications) { return 1 + (1 << 17) / (1 + multiplications); }

  std::vector<Tensor> owned;
};

std::tuple<Tensor, Tensor, Tensor> slot_attention_forward(Tensor q, Tensor k, std::optional<Tensor> v,
                                                          std::optional<Tensor> logit_bias,
                                                          std::optional<Tensor> slot_mask,
                                                          std::optional<Tensor> input_mask, double scale, double eps,
                                                          bool eps_in_weights, bool normalize, bool joint_heads,
                                                          bool return_attention) {
  Call call(q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads);
  const auto [B, H, K, N, Dv] = std::make_tuple(call.B, call.H, call.K, call.N, call.Dv);
  Tensor U = torch::stable::new_empty(k, {B, H, K, Dv}, call.arithmetic);
  Tensor S = torch::stable::new_empty(k, {B, H, K}, call.arithmetic);
  Tensor A = new_result(k, return_attention ? Shape{B, H, K, N} : Shape{0}, call.stored);
  call.U = U.mutable_data_ptr();
  call.S = S.mutable_data_ptr();
  call.A = return_attention ? A.mutable_data_ptr() : nullptr;
  call.run(call.kernels.forward_chunks, call.kernels.forward_slots, Dv, k);
  return {U, S, A};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slot_attention_backward(
    Tensor dU, std::optional<Tensor> dS, std::optional<Tensor> dA, Tensor q, Tensor k, std::optional<Tensor> v,
    std::optional<Tensor> logit_bias, std::optional<Tensor> slot_mask, std::optional<Tensor> input_mask, Tensor U,
    Tensor S, double scale, double eps, bool eps_in_weights, bool normalize, bool joint_heads) {
  Call call(q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads);
  const auto [B, H, K, N, Dk, Dv] = std::make_tuple(call.B, call.H, call.K, call.N, call.Dk, call.Dv);
  check(U, "U", {B, H, K, Dv}, call.arithmetic);
  check(S, "S", {B, H, K}, call.arithmetic);
  check(dU, "dU", {B, H, K, Dv}, call.arithmetic);
  call.U = const_cast<void*>(call.packed(U));
  call.S = const_cast<void*>(call.packed(S));
  call.dU = call.packed(dU);
  call.dS = call.optional(dS, "dS", {B, H, K});
  if (dA) {
    check(*dA, "dA", {B, H, K, N}, call.arithmetic);
    call.dA = strided<void>(*dA);
    call.dA_stride = dA->stride(3);
  }
  Tensor dq = torch::stable::new_empty(k, {B, H, K, Dk}, call.arithmetic);
  Tensor dk = new_result(k, {B, H, N, Dk}, call.stored);
  Tensor dv = new_result(k, v ? Shape{B, H, N, Dv} : Shape{0}, call.stored);
  Tensor dlogit_bias = torch::stable::new_empty(k, logit_bias ? Shape{B, H, K} : Shape{0}, call.arithmetic);
  call.dq = dq.mutable_data_ptr();
  call.dk = dk.mutable_data_ptr();
  call.dv = v ? dv.mutable_data_ptr() : nullptr;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; };
  call.stream = (dk.numel() + dv.numel()) * dk.element_size() >= kLarge && aligned(call.dk) && aligned(call.dv);
  call.dlogit_bias = logit_bias ? dlogit_bias.mutable_data_ptr() : nullptr;
  call.run(call.kernels.backward_chunks, call.kernels.backward_slots, Dk, k);
  return {dq, dk, dv, dlogit_bias};
}

STABLE_TORCH_LIBRARY_IMPL(iio_kernels, CPU, m) {
  m.impl("slot_attention_forward", TORCH_BOX(&slot_attention_forward));
  m.impl("slot_attention_backward", TORCH_BOX(&slot_attention_backward));
}

}  // namespace
}  // namespace iio
