// The iterations of Slot Attention on the CPU, for one instruction set. slot_attention_module.h has the formulas and the tasks.
//
// What belongs to a slot is a row of numbers, padded with zeros to whole cache lines. The inputs of an image are worked
// through in blocks of kBlock as in slot_attention.cpp, once for each iteration, and stay in the second cache where they
// fit it. Backwards each iteration leaves its coefficients of dx, two for each input and slot, and a last pass makes dx
// of all of them, so that it is written once.
#include "slot_attention_module.h"

namespace iio::IIO_ISA {
namespace {

template <class T>
IIO_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// For small x the series, as 1 - e^(-2x) then cancels.
template <class T>
IIO_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> size = x < 0 ? -x : x, e = exp<T>(T(-2) * size), x2 = x * x;
  const Vec<T> large = (T(1) - e) / (T(1) + e);
  constexpr double kSeries[] = {21844. / 6081075, -1382. / 155925, 62. / 2835, -17. / 315, 2. / 15, -1. / 3, 1};
  Vec<T> series = splat(T(-929569. / 638512875));
  for (double term : kSeries) series = series * x2 + T(term);
  return size < T(0.125) ? x * series : x < 0 ? -large : large;
}

// The work on an image.
template <class T>
class Image {
 public:
  // Without a workspace it is good for nothing but the size of one.
  Image(const Iterations& call, bool backward, char* workspace)
      : call(call),
        T_(call.T),
        K(call.K),
        N(call.N),
        D(call.padded(call.D)),
        Dx(call.padded(call.Dx)),
        H(call.padded(call.H)),
        workspace(workspace) {
    workspace_size = workspace == nullptr ? 63 : -reinterpret_cast<uintptr_t>(workspace) & 63;
    for (T** row : {&s, &s_hat, &h, &h_hat, &r, &z, &n, &j_n}) take(row, K * D);
    for (T** row : {&i, &j}) take(row, K * 3 * D);
    for (T** number : {&S, &s_share, &h_share}) take(number, K);
    take(&M, K * Dx);
    take(&y, K * H);
    take(&lane_sums, K * kLanes<T>);
    take(&rows, call.blocks() * kBlock);
    take(&copies, usable_in_place() ? 0 : N * Dx);
    take(&zeros, Dx);
    take(&p, (backward ? T_ * 2 : 1) * K * Dx);
    take(&c, (backward ? call.blocks() * T_ * 2 : 1) * K * kBlock);
    if (backward) {
      for (T** row : {&ds, &dh, &ds_before}) take(row, K * D);
      for (T** row : {&di, &dj}) take(row, K * 3 * D);
      take(&dy, K * H);
      take(&dp, K * Dx);
      take(&dM_M, K);
      take(&written, kBlock);
      take(&to_write, kBlock * Dx);
    }
    if (workspace != nullptr) std::memset(workspace, 0, workspace_size);  // and so the padding stays
  }

  // The last slots and, where it is asked for, the last A.
  void forward(int64_t image) {
    open(image);
    const int64_t size = K * call.D;
    read_rows(static_cast<const T*>(call.slots) + image * size, s);
    for (int64_t t = 0; t < T_; ++t) {
      normalise(s, s_hat, s_share);
      linear(Wp, s_hat, D, p, Dx);
      attend(image, t == T_ - 1 && call.A != nullptr);
      linear(Wi, M, Dx, i, 3 * D);
      linear(Wj, s, D, j, 3 * D);
      update();
      normalise(h, h_hat, h_share);
      linear(W1, h_hat, D, y, H);
      for (int64_t d = 0; d < K * H; ++d) y[d] = y[d] < 0 ? T(0) : y[d];  // and a NaN stays
      write_tape(image, t);
      linear(W2, y, H, s, D);
      for (int64_t d = 0; d < K * D; ++d) s[d] += h[d];
    }
    write_rows(s, static_cast<T*>(call.last_slots) + image * size);
  }

  // The gradients to x, to the first slots and to what the maps make.
  void backward(int64_t image) {
    open(image);
    const int64_t size = K * call.D;
    read_rows(static_cast<const T*>(call.d_last_slots) + image * size, ds);
    for (int64_t t = T_ - 1; t >= 0; --t) {
      T *p_t = p + t * 2 * K * Dx, *dM = p_t + K * Dx;
      read_tape(image, t, p_t);
      transposed(W2, ds, D, dy, H);
      for (int64_t d = 0; d < K * H; ++d) dy[d] = y[d] <= 0 ? T(0) : dy[d];
      transposed(W1, dy, H, dh, D);
      through_normalise(dh, h_hat, h_share);
      for (int64_t d = 0; d < K * D; ++d) dh[d] += ds[d];
      differentiate_update();
      transposed(Wi, di, 3 * D, dM, Dx);
      differentiate_attention(image, t, p_t, dM);
      transposed(Wp, dp, Dx, ds_before, D);
      through_normalise(ds_before, s_hat, s_share);
      write_made(image, t);
      for (int64_t d = 0; d < K * D; ++d) ds[d] = z[d] * dh[d] + ds_before[d];
      add_linear(dj, 3 * D, K, weight(Wj), 3 * D, D, ds);
    }
    write_rows(ds, static_cast<T*>(call.d_slots) + image * size);
    write_dx(image);
  }

  int64_t workspace_size;  // bytes

 private:
  enum Map { Wp, Wi, Wj, W1, W2 };

  template <class Y>
  void take(Y** p, int64_t count) {
    *p = workspace == nullptr ? nullptr : reinterpret_cast<Y*>(workspace + workspace_size);
    workspace_size += (count * int64_t(sizeof(Y)) + 63) / 64 * 64;
  }

  // ---- The inputs ---------------------------------------------------------------------------------------------------

  int64_t stored() const { return call.storage == Storage::bfloat16 ? 2 : sizeof(T); }
  bool usable_in_place() const { return stored() == sizeof(T) && Dx == call.Dx; }

  // Where the image's rows are: in place if they can be used as they are, otherwise copied once for all iterations.
  // Behind the last input stand rows of zeros, up to a whole block.
  void open(int64_t image) {
    const char* from = static_cast<const char*>(call.x) + image * call.x_image * stored();
    for (int64_t m = 0; m < N; ++m, from += call.x_row * stored()) {
      if (!usable_in_place()) read(call.storage, from, call.Dx, copies + m * Dx);
      rows[m] = usable_in_place() ? reinterpret_cast<const T*>(from) : copies + m * Dx;
    }
    for (int64_t m = N; m < call.blocks() * kBlock; ++m) rows[m] = zeros;
  }

  int64_t count(int64_t n0) const { return N - n0 < kBlock ? N - n0 : kBlock; }

  // What to fetch while the block that begins with n0 is read for the first time.
  uintptr_t next_rows(int64_t n0) const { return in_cache(rows + (n0 + kBlock < N ? n0 + kBlock : n0)); }
  static uintptr_t in_cache(const T* const* rows) { return reinterpret_cast<uintptr_t>(rows[0]); }

  // <x[n], p[s]> becomes A, in place.
  void softmax(T* c) {
    for (int64_t n = 0; n < kBlock; n += kLanes<T>) {
      Vec<T> most = load(c + n), total{};
      for (int64_t k = 1; k < K; ++k) {
        const Vec<T> L = load(c + k * kBlock + n);
        most = L > most ? L : most;
      }
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> e = exp<T>(load(c + k * kBlock + n) - most);
        store(c + k * kBlock + n, e);
        total += e;
      }
      const Vec<T> inverse = T(1) / total;
      for (int64_t k = 0; k < K; ++k) store(c + k * kBlock + n, load(c + k * kBlock + n) * inverse);
    }
  }

  // M and S, and with `wanted` A.
  void attend(int64_t image, bool wanted) {
    fill(M, K * Dx, T(0));
    fill(lane_sums, K * kLanes<T>, T(0));
    for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
      dots(rows + n0, p, K, Dx, c, next_rows(n0));
      softmax(c);
      for (int64_t k = 0; k < K; ++k) {
        T* A = c + k * kBlock;
        if (wanted) std::memcpy(static_cast<T*>(call.A) + (image * K + k) * N + n0, A, count(n0) * sizeof(T));
        for (int64_t n = 0; n < kBlock; ++n) A[n] += T(call.eps);
        fill(A + count(n0), kBlock - count(n0), T(0));
        Vec<T> total = load(lane_sums + k * kLanes<T>);
        for (int64_t n = 0; n < kBlock; n += kLanes<T>) total += load(A + n);
        store(lane_sums + k * kLanes<T>, total);
      }
      accumulate(c, rows + n0, K, Dx, M, in_cache(rows + n0));
    }
    for (int64_t k = 0; k < K; ++k) {
      S[k] = sum<T>(load(lane_sums + k * kLanes<T>));
      for (int64_t d = 0; d < Dx; ++d) M[k * Dx + d] = S[k] == 0 ? T(0) : M[k * Dx + d] / S[k];
    }
  }

  // Divides dM by S; makes dp, and leaves in c the coefficients of dx: of p in K rows, of dM in K more.
  void differentiate_attention(int64_t image, int64_t t, const T* p_t, T* dM) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < Dx; ++d) dM[k * Dx + d] = S[k] == 0 ? T(0) : dM[k * Dx + d] / S[k];
      dM_M[k] = dot(dM + k * Dx, M + k * Dx, Dx);
    }
    fill(dp, K * Dx, T(0));
    for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
      T* A = coefficients(n0) + t * 2 * K * kBlock;
      T* dA = A + K * kBlock;
      dots(rows + n0, p_t, 2 * K, Dx, A, next_rows(n0));
      softmax(A);
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t n = 0; n < kBlock; ++n) dA[k * kBlock + n] -= dM_M[k];
      }
      if (t == T_ - 1 && call.dA != nullptr) add_dA(image, n0, dA);
      for (int64_t n = 0; n < kBlock; n += kLanes<T>) {
        Vec<T> mean{};
        for (int64_t k = 0; k < K; ++k) mean += load(A + k * kBlock + n) * load(dA + k * kBlock + n);
        for (int64_t k = 0; k < K; ++k) {
          const Vec<T> A_k = load(A + k * kBlock + n);
          store(A + k * kBlock + n, A_k * (load(dA + k * kBlock + n) - mean));
          store(dA + k * kBlock + n, A_k + T(call.eps));
        }
      }
      for (int64_t k = 0; k < K; ++k) fill(A + k * kBlock + count(n0), kBlock - count(n0), T(0));
      accumulate(A, rows + n0, K, Dx, dp, in_cache(rows + n0));
    }
  }

  // The gradient that arrives at A itself.
  void add_dA(int64_t image, int64_t n0, T* dA) {
    const int64_t* stride = call.dA_stride;
    for (int64_t k = 0; k < K; ++k) {
      const T* more = static_cast<const T*>(call.dA) + image * stride[0] + k * stride[1] + n0 * stride[2];
      for (int64_t n = 0; n < count(n0); ++n) dA[k * kBlock + n] += more[n * stride[2]];
    }
  }

  T* coefficients(int64_t n0) { return c + n0 * T_ * 2 * K; }

  void write_dx(int64_t image) {
    const bool in_place = usable_in_place();
    for (int64_t n0 = 0; n0 < N; n0 += kBlock) {
      char* to = static_cast<char*>(call.dx) + (image * N + n0) * call.Dx * stored();
      for (int64_t n = 0; n < kBlock; ++n) {
        const bool here = in_place && n < count(n0);
        written[n] = here ? reinterpret_cast<T*>(to + n * call.Dx * stored()) : to_write + n * Dx;
      }
      combine(coefficients(n0), p, T_ * 2 * K, Dx, written, in_place && call.stream);
      for (int64_t n = 0; n < count(n0) && !in_place; ++n) {
        write(call.storage, written[n], call.Dx, to + n * call.Dx * stored());
      }
    }
  }

  // ---- The slots ----------------------------------------------------------------------------------------------------

  const T* weight(Map map) const { return static_cast<const T*>(call.weights[map]); }

  // to = W from + b
  void linear(Map map, const T* from, int64_t I, T* to, int64_t O) {
    for (int64_t k = 0; k < K; ++k) std::memcpy(to + k * O, call.biases[map], O * sizeof(T));
    add_linear(from, I, K, weight(map), I, O, to);
  }

  // to = W^T from
  void transposed(Map map, const T* from, int64_t O, T* to, int64_t I) {
    fill(to, K * I, T(0));
    add_linear(from, O, K, weight(map), O, I, to);
  }

  // x with mean 0 and variance 1; the share of it that this leaves.
  void normalise(const T* x, T* x_hat, T* share) {
    for (int64_t k = 0; k < K; ++k, x += D, x_hat += D) {
      const T mean = total(x) / T(call.D);
      for (int64_t d = 0; d < call.D; ++d) x_hat[d] = x[d] - mean;
      share[k] = T(1 / __builtin_sqrt(double(dot(x_hat, x_hat, D) / T(call.D) + T(call.norm_eps))));
      for (int64_t d = 0; d < call.D; ++d) x_hat[d] *= share[k];  // not the padding, which a NaN would spoil
    }
  }

  // The gradient to x̂ becomes that to x, in place.
  void through_normalise(T* dx, const T* x_hat, const T* share) {
    for (int64_t k = 0; k < K; ++k, dx += D, x_hat += D) {
      const T mean = total(dx) / T(call.D), slope = dot(dx, x_hat, D) / T(call.D);
      for (int64_t d = 0; d < call.D; ++d) dx[d] = (dx[d] - mean - x_hat[d] * slope) * share[k];
    }
  }

  T total(const T* x) {
    Vec<T> sums{};
    for (int64_t d = 0; d < D; d += kLanes<T>) sums += load(x + d);
    return sum<T>(sums);
  }

  // The gates, and h.
  void update() {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < D; d += kLanes<T>) {
        const int64_t at = k * D + d;
        const T *i_k = i + k * 3 * D + d, *j_k = j + k * 3 * D + d;
        const Vec<T> r_d = sigmoid<T>(load(i_k) + load(j_k));
        const Vec<T> z_d = sigmoid<T>(load(i_k + D) + load(j_k + D));
        const Vec<T> j_d = load(j_k + 2 * D), n_d = tanh<T>(load(i_k + 2 * D) + r_d * j_d);
        store(r + at, r_d);
        store(z + at, z_d);
        store(n + at, n_d);
        store(j_n + at, j_d);
        store(h + at, (1 - z_d) * n_d + z_d * load(s + at));
      }
    }
  }

  // di and dj from dh.
  void differentiate_update() {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < D; d += kLanes<T>) {
        const int64_t at = k * D + d;
        T *di_k = di + k * 3 * D + d, *dj_k = dj + k * 3 * D + d;
        const Vec<T> r_d = load(r + at), z_d = load(z + at), n_d = load(n + at), dh_d = load(dh + at);
        const Vec<T> dn = dh_d * (1 - z_d) * (1 - n_d * n_d);
        const Vec<T> dz = dh_d * (load(s + at) - n_d) * z_d * (1 - z_d);
        const Vec<T> dr = dn * load(j_n + at) * r_d * (1 - r_d);
        store(di_k, dr);
        store(dj_k, dr);
        store(di_k + D, dz);
        store(dj_k + D, dz);
        store(di_k + 2 * D, dn);
        store(dj_k + 2 * D, dn * r_d);
      }
    }
  }

  // ---- Between memory, where rows are as wide as they are, and the workspace, where they are padded -------------------

  // Some columns of the tape, for all slots: where they are in the workspace, how many, and how far slots lie apart.
  struct Columns {
    T* data;
    int64_t width, stride;
  };

  template <size_t number>
  void write_columns(const Columns (&all)[number], T* to) {
    for (int64_t k = 0; k < K; ++k) {
      for (const Columns& each : all) {
        std::memcpy(to, each.data + k * each.stride, each.width * sizeof(T));
        to += each.width;
      }
    }
  }

  template <size_t number>
  void read_columns(const T* from, const Columns (&all)[number]) {
    for (int64_t k = 0; k < K; ++k) {
      for (const Columns& each : all) {
        std::memcpy(each.data + k * each.stride, from, each.width * sizeof(T));
        from += each.width;
      }
    }
  }

  void read_rows(const T* from, T* to) {
    fill(to, K * D, T(0));  // the padding may be of a NaN
    read_columns(from, {{to, call.D, D}});
  }
  void write_rows(T* from, T* to) { write_columns({{from, call.D, D}}, to); }

  T* tape(int64_t image, int64_t t) { return static_cast<T*>(call.tape) + (image * T_ + t) * K * call.tape_width(); }

  void write_tape(int64_t image, int64_t t) {
    const int64_t d = call.D;
    write_columns({{s_hat, d, D},
                   {M, call.Dx, Dx},
                   {s, d, D},
                   {h_hat, d, D},
                   {y, call.H, H},
                   {p, call.Dx, Dx},
                   {r, d, D},
                   {z, d, D},
                   {n, d, D},
                   {j_n, d, D},
                   {S, 1, 1},
                   {s_share, 1, 1},
                   {h_share, 1, 1}},
                  tape(image, t));
  }

  void read_tape(int64_t image, int64_t t, T* p_t) {
    const int64_t d = call.D;
    read_columns(tape(image, t), {{s_hat, d, D},
                                  {M, call.Dx, Dx},
                                  {s, d, D},
                                  {h_hat, d, D},
                                  {y, call.H, H},
                                  {p_t, call.Dx, Dx},
                                  {r, d, D},
                                  {z, d, D},
                                  {n, d, D},
                                  {j_n, d, D},
                                  {S, 1, 1},
                                  {s_share, 1, 1},
                                  {h_share, 1, 1}});
  }

  void write_made(int64_t image, int64_t t) {
    const int64_t d = call.D;
    T* to = static_cast<T*>(call.made) + (image * T_ + t) * K * call.made_width();
    write_columns({{dp, call.Dx, Dx},
                   {di, d, 3 * D},
                   {di + D, d, 3 * D},
                   {di + 2 * D, d, 3 * D},
                   {dj, d, 3 * D},
                   {dj + D, d, 3 * D},
                   {dj + 2 * D, d, 3 * D},
                   {dy, call.H, H},
                   {ds, d, D}},
                  to);
  }

  const Iterations& call;
  const int64_t T_, K, N;
  const int64_t D, Dx, H;  // padded
  char* workspace;

  T *s, *s_hat, *h, *h_hat, *r, *z, *n, *j_n, *i, *j, *S, *s_share, *h_share, *M, *y;  // (K, width): as in the formulas
  T *ds, *dh, *ds_before, *di, *dj, *dy, *dp, *dM_M;                                   // ds_before: through ŝ
  T* p;            // forward (K, Dx), backward for all iterations p and dM: (T, 2, K, Dx)
  T* c;            // forward (K, kBlock), backward (blocks, T, 2, K, kBlock): coefficients for slots and inputs
  T* lane_sums;    // (K, kLanes)
  const T** rows;  // (blocks, kBlock): those of the inputs
  T *copies, *zeros;
  T** written;  // (kBlock): rows of dx
  T* to_write;
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
int64_t workspace_size(const Iterations& call, bool backward) {
  return Image<T>(call, backward, nullptr).workspace_size;
}

template <class T>
void forward(const Iterations& call, int64_t begin, int64_t end, char* workspace) {
  Image<T> image(call, /*backward=*/false, workspace);
  for (int64_t b = begin; b < end; ++b) image.forward(b);
}

template <class T>
void backward(const Iterations& call, int64_t begin, int64_t end, char* workspace) {
  Image<T> image(call, /*backward=*/true, workspace);
  for (int64_t b = begin; b < end; ++b) image.backward(b);
  finish_streams();
}

template <class T>
IterationsKernels kernels() {
  return {workspace_size<T>, forward<T>, backward<T>};
}

}  // namespace

IterationsKernels iterations_kernels(Storage storage) {
  return storage == Storage::float64 ? kernels<double>() : kernels<float>();
}

}  // namespace iio::IIO_ISA
