// The spatial mixture on the CPU, for one instruction set. spatial_mixture.h has the formulas, pixels.h the way to the pixels.
#include "spatial_mixture.h"

namespace iio::IIO_ISA {
namespace {

// factor * e^exponent
template <class T>
struct Scaled {
  Vec<T> factor, exponent;
};

// log (a / b)
template <class T>
IIO_INLINE Vec<T> log_ratio(Scaled<T> a, Scaled<T> b) {
  return log<T>(a.factor / b.factor) + (a.exponent - b.exponent);
}

// Sums over slots of e^y_k, at the pixels of a vector: over all of them, and over all but one.
//
// Of two scales none of these sums overflows or vanishes: that of the largest y_k and that of the next. Where the
// largest is left out, its sum is made at the other's scale; and a slot that is not the largest is taken from a sum
// with it, which is at least 1, so that nothing cancels.
template <class T>
class SlotSums {
 public:
  // y_k is at y + k * stride; `room` is for K vectors, kBlock apart.
  IIO_INLINE SlotSums(const T* y, int64_t stride, int64_t K, T* room) : e(room) {
    const Vec<T> none = splat(-kInfinity<T>);
    most = next = none;
    largest = splat(T(-1));
    for (int64_t k = 0; k < K; ++k) {
      const Vec<T> y_k = load(y + k * stride);
      const Mask<T> above = y_k > most;
      next = above ? most : y_k > next ? y_k : next;
      largest = above ? splat(T(k)) : largest;
      most = above ? y_k : most;
    }
    const Vec<T> scale = next > none ? next : Vec<T>{};
    rest = Vec<T>{};
    for (int64_t k = 0; k < K; ++k) {
      const Vec<T> e_k = largest == T(k) ? Vec<T>{} : exp<T>(load(y + k * stride) - scale);
      store(room + k * kBlock, e_k);
      rest += e_k;
    }
    ratio = exp<T>(next - most);
    total = 1 + ratio * rest;
    inverse = 1 / total;
  }

  // The softmax over slots.
  IIO_INLINE Vec<T> share(int64_t k) const {
    return (largest == T(k) ? splat(T(1)) : load(e + k * kBlock) * ratio) * inverse;
  }

  // The sums, over e^largest.
  IIO_INLINE Scaled<T> all() const { return {total, Vec<T>{}}; }
  IIO_INLINE Scaled<T> without(int64_t k) const {
    const Vec<T> with_largest = 1 + ratio * (rest - load(e + k * kBlock));
    return {largest == T(k) ? rest : with_largest, largest == T(k) ? next - most : Vec<T>{}};
  }

  Vec<T> most;  // the largest y_k

 private:
  const T* e;            // e^(y_k - next), but 0 for the largest
  Vec<T> next, largest;  // the largest y_k but one; which k the largest has
  Vec<T> rest, ratio, total, inverse;
};

// The work on a chunk of an image.
template <class T>
class MixtureChunk : public Chunk<T> {
 public:
  MixtureChunk(const Mixture& call, char* workspace)
      : Chunk<T>(call, workspace), call(call), precision(T(call.precision)), log_peak(T(call.log_peak)) {
    for (T** room : {&decoded_room, &d_decoded_room, &d_nll_room}) take(room, K * (C + 1));
    for (T** room : {&x_room, &d_x_room}) take(room, C);
    for (T** room : {&log_p_room, &g_room}) take(room, 1);
    for (T** room : {&m_room, &q_room, &leave_one_out_room, &dm_room, &dq_room}) take(room, K);
    for (T** room : {&log_p_k, &joint, &e_m, &e_q, &e_r}) take(room, K);
  }

  void forward(int64_t task) {
    open(task);
    const bool everything = call.m.data != nullptr;
    for (; first < last; first += kBlock) {
      for (const Pixels* each : {&call.decoded, &call.m, &call.q, &call.leave_one_out}) fetch_ahead(*each);
      if (!call.stream) fetch_ahead(call.d_decoded);
      const Rows<T> decoded = read_rows(call.decoded, decoded_room), x = read_rows(call.x, x_room);
      const Rows<T> log_p = result_rows(call.log_p, log_p_room);
      const Rows<T> m = result_rows(call.m, m_room), q = result_rows(call.q, q_room);
      const Rows<T> leave_one_out = result_rows(call.leave_one_out, leave_one_out_room);
      const Rows<T> d_decoded = result_rows(call.d_decoded, d_decoded_room);
      for (int n = 0; n < kBlock; n += L) {
        const SlotSums<T> priors(decoded(0, C) + n, decoded.slot, K, e_m + n);
        likelihoods(decoded, x, priors.most, n);
        const SlotSums<T> joints(joint + n, kBlock, K, e_r + n);
        const Vec<T> shift = joints.most + log_peak;
        store(log_p(0, 0) + n, log_ratio<T>(joints.all(), priors.all()) + shift);
        if (!everything) continue;
        const SlotSums<T> uniform(log_p_k + n, kBlock, K, e_q + n);
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> m_k = priors.share(k), r_k = joints.share(k);
          store(m(k, 0) + n, m_k);
          store(q(k, 0) + n, uniform.share(k));
          store(leave_one_out(k, 0) + n, log_ratio<T>(joints.without(k), priors.without(k)) + shift);
          for (int64_t c = 0; c < C; ++c) {
            const Vec<T> difference = load(decoded(k, c) + n) - load(x(0, c) + n);
            store(d_decoded(k, c) + n, r_k * precision * difference);
          }
          store(d_decoded(k, C) + n, m_k - r_k);
        }
      }
      write_rows(log_p, call.log_p);
      write_rows(m, call.m);
      write_rows(q, call.q);
      write_rows(leave_one_out, call.leave_one_out);
      write_rows(d_decoded, call.d_decoded);
    }
  }

  void backward(int64_t task) {
    if (call.d_nll.data == nullptr) {
      backward_anew(task);
    } else {
      backward_from_results(task);
    }
  }

 private:
  void backward_from_results(int64_t task) {
    open(task);
    const bool of_q = call.dq.data != nullptr;
    for (; first < last; first += kBlock) {
      for (const Pixels* each : {&call.d_nll, &call.m, &call.q}) fetch_ahead(*each);
      if (of_q) fetch_ahead(call.decoded);
      if (!call.stream) fetch_ahead(call.d_decoded);
      const Rows<T> d_nll = read_rows(call.d_nll, d_nll_room), g = read_rows(call.g, g_room);
      const Rows<T> m = read_rows(call.m, m_room), dm = read_rows(call.dm, dm_room);
      const Rows<T> d_decoded = result_rows(call.d_decoded, d_decoded_room), d_x = result_rows(call.d_x, d_x_room);
      Rows<T> decoded{}, x{}, q{}, dq{};
      if (of_q) {
        decoded = read_rows(call.decoded, decoded_room), x = read_rows(call.x, x_room);
        q = read_rows(call.q, q_room), dq = read_rows(call.dq, dq_room);
      }
      for (int n = 0; n < kBlock; n += L) {
        Vec<T> mean_dm{}, mean_dq{};
        for (int64_t k = 0; k < K; ++k) {
          mean_dm += load(m(k, 0) + n) * load(dm(k, 0) + n);
          if (of_q) mean_dq += load(q(k, 0) + n) * load(dq(k, 0) + n);
        }
        const Vec<T> g_n = load(g(0, 0) + n);
        for (int64_t c = 0; c < C; ++c) store(d_x(0, c) + n, Vec<T>{});
        for (int64_t k = 0; k < K; ++k) {
          Vec<T> d_square{};
          if (of_q) d_square = load(q(k, 0) + n) * (load(dq(k, 0) + n) - mean_dq) * precision;
          for (int64_t c = 0; c < C; ++c) {
            Vec<T> d_mu = -g_n * load(d_nll(k, c) + n);
            if (of_q) d_mu += d_square * (load(x(0, c) + n) - load(decoded(k, c) + n));
            store(d_decoded(k, c) + n, d_mu);
            store(d_x(0, c) + n, load(d_x(0, c) + n) - d_mu);
          }
          const Vec<T> d_m = load(m(k, 0) + n) * (load(dm(k, 0) + n) - mean_dm);
          store(d_decoded(k, C) + n, d_m - g_n * load(d_nll(k, C) + n));
        }
      }
      write_rows(d_decoded, call.d_decoded);
      write_rows(d_x, call.d_x);
    }
  }

  // From the gradient to log p alone.
  void backward_anew(int64_t task) {
    open(task);
    for (; first < last; first += kBlock) {
      fetch_ahead(call.decoded);
      if (!call.stream) fetch_ahead(call.d_decoded);
      const Rows<T> decoded = read_rows(call.decoded, decoded_room), x = read_rows(call.x, x_room);
      const Rows<T> g = read_rows(call.g, g_room);
      const Rows<T> d_decoded = result_rows(call.d_decoded, d_decoded_room), d_x = result_rows(call.d_x, d_x_room);
      for (int n = 0; n < kBlock; n += L) {
        const SlotSums<T> priors(decoded(0, C) + n, decoded.slot, K, e_m + n);
        likelihoods(decoded, x, priors.most, n);
        const SlotSums<T> joints(joint + n, kBlock, K, e_r + n);
        const Vec<T> g_n = load(g(0, 0) + n);
        for (int64_t c = 0; c < C; ++c) store(d_x(0, c) + n, Vec<T>{});
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> r_k = joints.share(k);
          for (int64_t c = 0; c < C; ++c) {
            const Vec<T> d_mu = g_n * r_k * precision * (load(x(0, c) + n) - load(decoded(k, c) + n));
            store(d_decoded(k, c) + n, d_mu);
            store(d_x(0, c) + n, load(d_x(0, c) + n) - d_mu);
          }
          store(d_decoded(k, C) + n, g_n * (r_k - priors.share(k)));
        }
      }
      write_rows(d_decoded, call.d_decoded);
      write_rows(d_x, call.d_x);
    }
  }

  using Chunk<T>::K, Chunk<T>::C, Chunk<T>::L, Chunk<T>::first, Chunk<T>::last;
  using Chunk<T>::take, Chunk<T>::open, Chunk<T>::fetch_ahead;
  using Chunk<T>::read_rows, Chunk<T>::result_rows, Chunk<T>::write_rows;

  // log p_k, and log m_k p_k, but for what is the same for all slots.
  IIO_INLINE void likelihoods(Rows<T> decoded, Rows<T> x, Vec<T> most, int n) {
    for (int64_t k = 0; k < K; ++k) {
      Vec<T> squares{};
      for (int64_t c = 0; c < C; ++c) {
        const Vec<T> difference = load(x(0, c) + n) - load(decoded(k, c) + n);
        squares += difference * difference;
      }
      const Vec<T> log_likelihood = squares * (-precision / 2);
      store(log_p_k + k * kBlock + n, log_likelihood);
      store(joint + k * kBlock + n, log_likelihood + (load(decoded(k, C) + n) - most));
    }
  }

  const Mixture& call;
  const T precision, log_peak;

  T *decoded_room, *d_decoded_room, *d_nll_room;                // (K, C + 1, kBlock)
  T *x_room, *d_x_room;                                         // (C, kBlock)
  T *log_p_room, *g_room;                                       // (kBlock,)
  T *m_room, *q_room, *leave_one_out_room, *dm_room, *dq_room;  // (K, kBlock)
  T *log_p_k, *joint, *e_m, *e_q, *e_r;                         // (K, kBlock)
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
int64_t workspace_size(const Mixture& call) {
  return MixtureChunk<T>(call, nullptr).workspace_size;
}

template <class T>
void forward(const Mixture& call, int64_t begin, int64_t end, char* workspace) {
  MixtureChunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.forward(task);
  finish_streams();
}

template <class T>
void backward(const Mixture& call, int64_t begin, int64_t end, char* workspace) {
  MixtureChunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.backward(task);
  finish_streams();
}

template <class T>
MixtureKernels kernels() {
  return {workspace_size<T>, forward<T>, backward<T>};
}

}  // namespace

MixtureKernels mixture_kernels(Storage storage) {
  return storage == Storage::float64 ? kernels<double>() : kernels<float>();
}

}  // namespace iio::IIO_ISA
