// Slot attention on the CPU, for one instruction set. slot_attention.h has the formulas and the division into tasks.
//
// A chunk of inputs is worked through in blocks of kBlock, which fit the first cache or two: k and v are read from
// memory once, and everything else about a block stays in the cache. Quantities of a slot and an input (L, A, W, their
// gradients) are laid out (slots, kBlock), so that the softmax over slots runs in as many inputs at once as a vector
// has lanes. Between those and the rows of k and v stand the matrix products of products.h.
#include "slot_attention.h"

namespace iio::IIO_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The work on a group: on the slots of one image and head, or on those of all heads of an image where they share a
// softmax. Its slots are numbered head by head, m = head * K + s.

template <class T>
class Group {
 public:
  // Without a workspace it is good for nothing but the size of one.
  Group(const SlotAttention& call, bool backward, char* workspace)
      : call(call),
        K(call.K),
        heads(call.heads()),
        M(heads * K),
        rows(backward ? 2 * K : K),
        Dk(call.padded(call.Dk)),
        Dv(call.padded(call.Dv)),
        stored(call.storage == Storage::bfloat16 ? 2 : sizeof(T)),
        workspace(workspace) {
    const int64_t widest = Dk > Dv ? Dk : Dv;
    workspace_size = workspace == nullptr ? 63 : -reinterpret_cast<uintptr_t>(workspace) & 63;
    take(&w, heads * K * (Dk + Dv));
    take(&c, heads * rows * kBlock);
    take(&lane_sums, M * kLanes<T>);
    take(&live, heads * kBlock);
    take(&active, M);
    take(&bias, M);
    take(&dU_U, M);
    take(&inverse_S, M);
    take(&dS, M);
    take(&keys, heads * kBlock);
    take(&values, kBlock);
    take(&written, kBlock);
    take(&read_keys, heads * kBlock * Dk);
    take(&read_values, kBlock * Dv);
    take(&to_write, kBlock * widest);
    take(&zeros, widest);
    if (workspace == nullptr) return;
    fill(read_keys, heads * kBlock * Dk, T(0));
    fill(read_values, kBlock * Dv, T(0));
    fill(zeros, widest, T(0));
  }

  // One chunk: sum_n W[n, s] v[n], then sum_n W[n, s], to its partial sums; A where it is asked for.
  void forward_chunk(int64_t task) {
    T* partial = open_chunk(task, Dv);
    for (int64_t g = 0; g < heads; ++g) pack_q(g);
    for (n0 = first; n0 < last; n0 += kBlock) {
      for (int64_t g = 0; g < heads; ++g) {
        open_block(g);
        dots(keys_of(g), q(g), K, Dk, row(g, 0), next_rows(g, call.k, call.Dk));
      }
      softmax();
      if (call.A != nullptr) write_A();
      for (int64_t g = 0; g < heads; ++g) {
        weigh(g);
        const T** values = values_of(g);
        const uintptr_t next = call.values_are_keys ? in_cache(values) : next_rows(g, call.v, call.Dv);
        accumulate(row(g, 0), values, K, Dv, partial + g * K * Dv, next);
      }
    }
    close_chunk(partial + M * Dv);
  }

  // One chunk: scale * sum_n dL[n, s] k[n], then sum_n dL[n, s], to its partial sums; its rows of dk and dv.
  void backward_chunk(int64_t task) {
    T* partial = open_chunk(task, Dk);
    for (int64_t g = 0; g < heads; ++g) {
      pack_q(g);
      pack_dU(g);
    }
    for (n0 = first; n0 < last; n0 += kBlock) {
      for (int64_t g = 0; g < heads; ++g) {
        open_block(g);
        if (call.values_are_keys) {  // dU follows q, as <dU, v> follows L
          dots(keys_of(g), q(g), 2 * K, Dk, row(g, 0), next_rows(g, call.k, call.Dk));
        } else {
          dots(keys_of(g), q(g), K, Dk, row(g, 0), next_rows(g, call.k, call.Dk));
          dots(values_of(g), dU(g), K, Dv, row(g, K), next_rows(g, call.v, call.Dv));
        }
      }
      softmax();
      differentiate();
      for (int64_t g = 0; g < heads; ++g) {
        if (call.values_are_keys) {
          write_rows(g, row(g, 0), q(g), 2 * K, call.Dk, Dk, call.dk);
        } else {
          write_rows(g, row(g, 0), q(g), K, call.Dk, Dk, call.dk);
          write_rows(g, row(g, K), dU(g), K, call.Dv, Dv, call.dv);
        }
        accumulate(row(g, 0), keys_of(g), K, Dk, partial + g * K * Dk, in_cache(keys_of(g)));
      }
    }
    close_chunk(partial + M * Dk);
  }

  int64_t workspace_size;  // bytes

 private:
  template <class Y>
  void take(Y** p, int64_t count) {
    *p = workspace == nullptr ? nullptr : reinterpret_cast<Y*>(workspace + workspace_size);
    workspace_size += SlotAttention::round_up(count * sizeof(Y), 64);
  }

  // Head g of this group among the heads of all images, and where it begins along the first two dimensions of x.
  int64_t head(int64_t g) const { return group * heads + g; }
  template <class Y>
  int64_t start(const Strided<Y>& x, int64_t g) const {
    return head(g) / call.H * x.stride[0] + head(g) % call.H * x.stride[1];
  }

  // Whether stored rows of D numbers are such as the products work on.
  bool usable_in_place(int64_t D) const { return stored == sizeof(T) && D == call.padded(D); }

  T* q(int64_t g) { return w + g * K * (Dk + Dv); }
  T* dU(int64_t g) { return q(g) + K * Dk; }
  T* row(int64_t g, int64_t s) { return c + (g * rows + s) * kBlock; }
  const T** keys_of(int64_t g) { return keys + g * kBlock; }

  // What a chunk begins with. Returns where its partial sums are, set to 0: M rows of `width`, then M numbers.
  T* open_chunk(int64_t task, int64_t width) {
    const int64_t chunks = call.chunks(), size = call.chunk_size();
    group = task / chunks;
    first = task % chunks * size;
    last = first + size < call.N ? first + size : call.N;
    for (int64_t m = 0; m < M; ++m) {
      const Strided<bool>& mask = call.slot_mask;
      active[m] = mask.data == nullptr || mask.data[start(mask, m / K) + m % K * mask.stride[2]];
      bias[m] = call.logit_bias == nullptr ? T(0) : static_cast<const T*>(call.logit_bias)[head(0) * K + m];
    }
    fill(lane_sums, M * kLanes<T>, T(0));
    T* partial = static_cast<T*>(call.partials) + task * call.partial_size(width);
    fill(partial, M * width, T(0));
    return partial;
  }

  void close_chunk(T* totals) {
    for (int64_t m = 0; m < M; ++m) totals[m] = sum<T>(load(lane_sums + m * kLanes<T>));
  }

  // Head g's queries; 0 for a masked slot, whose query is not read.
  void pack_q(int64_t g) {
    for (int64_t s = 0; s < K; ++s) {
      const T* from = static_cast<const T*>(call.q) + (head(g) * K + s) * call.Dk;
      pack(active[g * K + s] ? from : zeros, call.Dk, q(g) + s * Dk, Dk);
    }
  }

  // Head g's dU, and what it takes to get from <dU[s], v[n]> to dW[n, s] = (<dU[s], v[n]> - <dU[s], U[s]>) / S[s].
  // All of it is 0 where S is exactly 0: a slot that nothing attends to.
  void pack_dU(int64_t g) {
    for (int64_t s = 0; s < K; ++s) {
      const int64_t m = g * K + s, slot = head(0) * K + m;
      const T* from = static_cast<const T*>(call.dU) + slot * call.Dv;
      dU_U[m] = 0;
      inverse_S[m] = 1;
      if (call.normalize) {
        const T S = static_cast<const T*>(call.S)[slot];
        if (S == 0) from = zeros;
        dU_U[m] = S == 0 ? T(0) : dot(from, static_cast<const T*>(call.U) + slot * call.Dv, call.Dv);
        inverse_S[m] = S == 0 ? T(0) : 1 / S;
      }
      dS[m] = call.dS == nullptr ? T(0) : static_cast<const T*>(call.dS)[slot];
      pack(from, call.Dv, dU(g) + s * Dv, Dv);
    }
  }

  void pack(const T* from, int64_t D, T* to, int64_t width) {
    for (int64_t d = 0; d < D; ++d) to[d] = from[d];
    fill(to + D, width - D, T(0));
  }

  // What a block of inputs begins with, for head g: which of its inputs take part, and their keys.
  void open_block(int64_t g) {
    const Strided<bool>& mask = call.input_mask;
    MaskLane<T>* here = live + g * kBlock;
    for (int64_t i = 0; i < kBlock; ++i) here[i] = -MaskLane<T>(n0 + i < last);
    if (mask.data != nullptr) {
      const bool* from = mask.data + start(mask, g) + n0 * mask.stride[2];
      for (int64_t i = 0; i < kBlock && n0 + i < last; ++i) here[i] = -MaskLane<T>(from[i * mask.stride[2]]);
    }
    read_rows(g, call.k, call.Dk, Dk, read_keys + g * kBlock * Dk, keys_of(g));
  }

  const T** values_of(int64_t g) {
    if (call.values_are_keys) return keys_of(g);
    read_rows(g, call.v, call.Dv, Dv, read_values, values);
    return values;
  }

  // Where head g's rows of the block are: in place if they can be used as they are, otherwise copied to `copies`. An
  // input that takes no part is not read: its row is 0.
  void read_rows(int64_t g, const Strided<void>& x, int64_t D, int64_t width, T* copies, const T** to) {
    const char* from = static_cast<const char*>(x.data) + (start(x, g) + n0 * x.stride[2]) * stored;
    const int64_t stride = x.stride[2] * stored;
    const bool apart = x.stride[2] != D;  // then the next block is fetched here, otherwise by the products
    for (int64_t i = 0; i < kBlock; ++i, from += stride) {
      if (!live[g * kBlock + i] || D == 0) {
        to[i] = zeros;
      } else if (usable_in_place(D)) {
        to[i] = reinterpret_cast<const T*>(from);
      } else {
        read(call.storage, from, D, copies + i * width);
        to[i] = copies + i * width;
      }
      for (int64_t at = 0; apart && at < D * stored; at += 64) {
        prefetch<64>(reinterpret_cast<uintptr_t>(from) + kBlock * stride + at);
      }
    }
  }

  // Where the next block of head g's rows begins, if they lie one behind the other; it may be beyond the last.
  uintptr_t next_rows(int64_t g, const Strided<void>& x, int64_t D) const {
    if (x.stride[2] != D) return in_cache(keys);
    const int64_t first_element = start(x, g) + (n0 + kBlock) * D;
    return reinterpret_cast<uintptr_t>(x.data) + first_element * stored;
  }
  static uintptr_t in_cache(const T* const* rows) { return reinterpret_cast<uintptr_t>(rows[0]); }

  // out[n] = sum_r c_r[n] w[r] for head g's inputs, over `count` rows r; 0 for those that take no part.
  void write_rows(int64_t g, const T* c_r, const T* w, int64_t count, int64_t D, int64_t width, void* out) {
    char* to = static_cast<char*>(out) + (head(g) * call.N + n0) * D * stored;
    const MaskLane<T>* here = live + g * kBlock;
    const bool in_place = usable_in_place(D);
    for (int64_t i = 0; i < kBlock; ++i) {
      written[i] = in_place && here[i] ? reinterpret_cast<T*>(to + i * D * stored) : to_write + i * width;
    }
    combine(c_r, w, count, width, written, in_place && call.stream);
    for (int64_t i = 0; i < kBlock && n0 + i < last; ++i) {
      if (!here[i]) {
        std::memset(to + i * D * stored, 0, D * stored);
      } else if (!in_place) {
        write(call.storage, written[i], D, to + i * D * stored);
      }
    }
  }

  // <k, q> becomes A, in place.
  void softmax() {
    const T scale = T(call.scale);
    const Vec<T> nothing = splat(T(-__builtin_inf()));
    for (int64_t n = 0; n < kBlock; n += kLanes<T>) {
      Vec<T> most = nothing, total{};
      for (int64_t g = 0; g < heads; ++g) {
        for (int64_t s = 0; s < K; ++s) {
          if (!active[g * K + s]) continue;
          Vec<T> L = load(row(g, s) + n) * scale + bias[g * K + s];
          L = takes_part(g, n) ? L : nothing;
          store(row(g, s) + n, L);
          most = L > most ? L : most;
        }
      }
      for (int64_t g = 0; g < heads; ++g) {
        for (int64_t s = 0; s < K; ++s) {
          if (!active[g * K + s]) continue;
          Vec<T> e = exp<T>(load(row(g, s) + n) - most);
          store(row(g, s) + n, e);
          total += e;
        }
      }
      const Vec<T> inverse = T(1) / total;
      for (int64_t g = 0; g < heads; ++g) {
        for (int64_t s = 0; s < K; ++s) {
          Vec<T> A = active[g * K + s] ? load(row(g, s) + n) * inverse : Vec<T>{};
          store(row(g, s) + n, takes_part(g, n) ? A : Vec<T>{});
        }
      }
    }
  }

  void write_A() {
    for (int64_t g = 0; g < heads; ++g) {
      for (int64_t s = 0; s < K; ++s) {
        char* to = static_cast<char*>(call.A) + ((head(g) * K + s) * call.N + n0) * stored;
        write(call.storage, row(g, s), last - n0 < kBlock ? last - n0 : kBlock, to);
      }
    }
  }

  // Head g's A becomes W, in place.
  void weigh(int64_t g) {
    const T eps = T(call.eps_weights);
    for (int64_t s = 0; s < K; ++s) {
      Vec<T> total{};
      for (int64_t n = 0; n < kBlock; n += kLanes<T>) {
        Vec<T> W = takes_part(g, n) ? load(row(g, s) + n) + eps : Vec<T>{};
        store(row(g, s) + n, W);
        total += W;
      }
      add_lane_sums(g, s, total);
    }
  }

  // A and <dU, v> become scale * dL and W / S, in place.
  void differentiate() {
    const T scale = T(call.scale), eps = T(call.eps_weights);
    Vec<T> mean[kBlock / kLanes<T>]{};  // of dA over the slots, under A
    for (int64_t g = 0; g < heads; ++g) {
      for (int64_t s = 0; s < K; ++s) {
        if (!active[g * K + s]) continue;
        const T *A = row(g, s), dU_U = this->dU_U[g * K + s], inverse_S = this->inverse_S[g * K + s];
        T* dA = row(g, K + s);
        for (int64_t i = 0; i < kBlock; ++i) dA[i] = (dA[i] - dU_U) * inverse_S + dS[g * K + s];
        if (call.dA.data != nullptr) add_dA(g, s, dA);
        for (int64_t n = 0; n < kBlock; n += kLanes<T>) mean[n / kLanes<T>] += load(A + n) * load(dA + n);
      }
    }
    for (int64_t g = 0; g < heads; ++g) {
      for (int64_t s = 0; s < K; ++s) {
        Vec<T> total{};
        for (int64_t n = 0; n < kBlock; n += kLanes<T>) {
          const Vec<T> A = load(row(g, s) + n), dA = load(row(g, K + s) + n);
          Vec<T> dL = active[g * K + s] ? A * (dA - mean[n / kLanes<T>]) : Vec<T>{};
          dL = takes_part(g, n) ? dL : Vec<T>{};
          total += dL;
          store(row(g, s) + n, dL * scale);
          store(row(g, K + s) + n, takes_part(g, n) ? (A + eps) * inverse_S[g * K + s] : Vec<T>{});
        }
        add_lane_sums(g, s, total);
      }
    }
  }

  // The gradient that arrives at A itself.
  void add_dA(int64_t g, int64_t s, T* dA) {
    const T* more = static_cast<const T*>(call.dA.data) + start(call.dA, g) + s * call.dA.stride[2];
    for (int64_t i = 0; i < kBlock && n0 + i < last; ++i) {
      if (live[g * kBlock + i]) dA[i] += more[(n0 + i) * call.dA_stride];
    }
  }

  Mask<T> takes_part(int64_t g, int64_t n) const { return load_mask<T>(live + g * kBlock + n); }

  void add_lane_sums(int64_t g, int64_t s, Vec<T> x) {
    T* at = lane_sums + (g * K + s) * kLanes<T>;
    store(at, load(at) + x);
  }

  const SlotAttention& call;
  const int64_t K, heads, M, rows;  // M slots in the group; `rows` rows of c for each head
  const int64_t Dk, Dv;             // padded
  const int64_t stored;             // bytes of a stored number
  char* workspace;

  int64_t group = 0, first = 0, last = 0;  // of the chunk: its group, its inputs
  int64_t n0 = 0;                          // of the block: its first input

  T* w;               // for each head: q (K, Dk), dU (K, Dv)
  T* c;               // for each head: L, A or W (K, kBlock), and in the backward pass as many rows for their gradients
  T* lane_sums;       // (M, kLanes): sums over the inputs of the chunk
  MaskLane<T>* live;  // (heads, kBlock): whether an input takes part, as a Mask
  bool* active;       // (M): whether a slot takes part
  T *bias, *dU_U, *inverse_S, *dS;        // (M)
  const T **keys, **values;               // (heads, kBlock) and (kBlock): rows of the block's inputs
  T** written;                            // (kBlock): rows of dk or dv
  T *read_keys, *read_values, *to_write;  // those rows, where they cannot be used in place
  T* zeros;
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
int64_t workspace_size(const SlotAttention& call) {
  return Group<T>(call, /*backward=*/true, nullptr).workspace_size;
}

template <class T>
void forward_chunks(const SlotAttention& call, int64_t begin, int64_t end, char* workspace) {
  Group<T> group(call, /*backward=*/false, workspace);
  for (int64_t task = begin; task < end; ++task) group.forward_chunk(task);
}

template <class T>
void backward_chunks(const SlotAttention& call, int64_t begin, int64_t end, char* workspace) {
  Group<T> group(call, /*backward=*/true, workspace);
  for (int64_t task = begin; task < end; ++task) group.backward_chunk(task);
  finish_streams();
}

// The partial sums of `slot`, one of all B * H * K, over all chunks: its row to `total`, its number returned.
template <class T>
T add_partials(const SlotAttention& call, int64_t slot, int64_t D, T* total) {
  const int64_t M = call.heads() * call.K, width = call.padded(D), chunks = call.chunks();
  const T* partial = static_cast<const T*>(call.partials) + slot / M * chunks * call.partial_size(D);
  T number = 0;
  fill(total, D, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk, partial += call.partial_size(D)) {
    for (int64_t d = 0; d < D; ++d) total[d] += partial[slot % M * width + d];
    number += partial[M * width + slot % M];
  }
  return number;
}

template <class T>
void forward_slots(const SlotAttention& call, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    T* U = static_cast<T*>(call.U) + slot * call.Dv;
    const T S = add_partials(call, slot, call.Dv, U) + T(call.eps_denominator);
    static_cast<T*>(call.S)[slot] = S;
    for (int64_t d = 0; d < call.Dv && call.normalize; ++d) U[d] = S == 0 ? T(0) : U[d] / S;
  }
}

template <class T>
void backward_slots(const SlotAttention& call, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    T* dq = static_cast<T*>(call.dq) + slot * call.Dk;
    const T dbias = add_partials(call, slot, call.Dk, dq);
    if (call.dlogit_bias != nullptr) static_cast<T*>(call.dlogit_bias)[slot] = dbias;
    const Strided<bool>& mask = call.slot_mask;
    const int64_t b = slot / (call.H * call.K), h = slot / call.K % call.H, s = slot % call.K;
    if (mask.data != nullptr && !mask.data[b * mask.stride[0] + h * mask.stride[1] + s * mask.stride[2]]) {
      fill(dq, call.Dk, T(0));  // its dL is 0, but 0 times a key that is NaN is not
    }
  }
}

template <class T>
SlotAttentionKernels kernels() {
  return {workspace_size<T>, forward_chunks<T>, forward_slots<T>, backward_chunks<T>, backward_slots<T>};
}

}  // namespace

SlotAttentionKernels slot_attention_kernels(Storage storage) {
  return storage == Storage::float64 ? kernels<double>() : kernels<float>();
}

}  // namespace iio::IIO_ISA
