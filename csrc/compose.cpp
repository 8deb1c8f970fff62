// Slot composition on the CPU, for one instruction set. compose.h has the formulas, pixels.h the way to the pixels.
#include "compose.h"

namespace iio::IIO_ISA {
namespace {

// The work on a chunk of an image.
template <class T>
class CompositionChunk : public Chunk<T> {
 public:
  CompositionChunk(const Composition& call, char* workspace) : Chunk<T>(call, workspace), call(call) {
    for (T** room : {&rgba_room, &d_rgba_room}) take(room, K * (C + 1));
    for (T** room : {&a_room, &da_room}) take(room, K);
    for (T** room : {&x_room, &x_hat_room, &d_x_room, &d_x_hat_room}) take(room, C);
  }

  // The results asked for; the sum of squares to `partials`.
  void forward(int64_t task) {
    open(task);
    Vec<T> squares{};
    for (; first < last; first += kBlock) {
      fetch_ahead(call.decoded);
      const Rows<T> rgba = read_rows(call.decoded, rgba_room);
      const Rows<T> a = result_rows(call.a, a_room), x_hat = result_rows(call.x_hat, x_hat_room);
      softmax(rgba, a);
      blend(rgba, a, x_hat);
      write_rows(a, call.a);
      write_rows(x_hat, call.x_hat);
      if (call.x.data != nullptr) squares += squared_error(x_hat, read_rows(call.x, x_room));
    }
    if (call.x.data != nullptr) static_cast<T*>(call.partials)[task] = sum<T>(squares);
  }

  void backward(int64_t task) {
    open(task);
    const Rows<T> a = rows_in(a_room, 1), da = rows_in(da_room, 1), x_hat = rows_in(x_hat_room, C);
    for (; first < last; first += kBlock) {
      fetch_ahead(call.decoded);
      if (!call.stream) fetch_ahead(call.d_decoded);
      const Rows<T> rgba = read_rows(call.decoded, rgba_room);
      softmax(rgba, a);
      Rows<T> d_x_hat = read_rows(call.d_x_hat, d_x_hat_room);
      if (call.g != nullptr) {
        const Rows<T> through_x_hat = d_x_hat, d_x = result_rows(call.d_x, d_x_room);
        d_x_hat = rows_in(d_x_hat_room, C);
        blend(rgba, a, x_hat);
        differentiate_error(x_hat, read_rows(call.x, x_room), through_x_hat, d_x_hat, d_x);
        write_rows(d_x, call.d_x);
      }
      const Rows<T> d_rgba = result_rows(call.d_decoded, d_rgba_room);
      differentiate(rgba, a, d_x_hat, read_rows(call.da, da_room), da, d_rgba);
      write_rows(d_rgba, call.d_decoded);
    }
  }

 private:
  using Chunk<T>::K, Chunk<T>::C, Chunk<T>::L, Chunk<T>::image, Chunk<T>::first, Chunk<T>::last;
  using Chunk<T>::take, Chunk<T>::open, Chunk<T>::fetch_ahead;
  using Chunk<T>::rows_in, Chunk<T>::read_rows, Chunk<T>::result_rows, Chunk<T>::write_rows;

  // a_k = softmax over the slots k of alpha_k
  void softmax(Rows<T> rgba, Rows<T> a) {
    for (int n = 0; n < kBlock; n += L) {
      Vec<T> most = load(rgba(0, C) + n), total{};
      for (int64_t k = 1; k < K; ++k) {
        const Vec<T> alpha = load(rgba(k, C) + n);
        most = alpha > most ? alpha : most;
      }
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> e = exp<T>(load(rgba(k, C) + n) - most);
        store(a(k, 0) + n, e);
        total += e;
      }
      const Vec<T> inverse = T(1) / total;
      for (int64_t k = 0; k < K; ++k) store(a(k, 0) + n, load(a(k, 0) + n) * inverse);
    }
  }

  // x_hat_c = sum_k a_k rgb_{k,c}
  void blend(Rows<T> rgba, Rows<T> a, Rows<T> x_hat) {
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        Vec<T> total{};
        for (int64_t k = 0; k < K; ++k) total += load(a(k, 0) + n) * load(rgba(k, c) + n);
        store(x_hat(0, c) + n, total);
      }
    }
  }

  // sum_c (x_hat_c - x_c)^2
  Vec<T> squared_error(Rows<T> x_hat, Rows<T> x) {
    Vec<T> total{};
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        const Vec<T> difference = load(x_hat(0, c) + n) - load(x(0, c) + n);
        total += difference * difference;
      }
    }
    return total;
  }

  // d_x_hat_c = 2 g (x_hat_c - x_c) / (C N) + what comes through x_hat itself; d_x_c = minus the first of them
  void differentiate_error(Rows<T> x_hat, Rows<T> x, Rows<T> through_x_hat, Rows<T> d_x_hat, Rows<T> d_x) {
    const T factor = 2 * static_cast<const T*>(call.g)[image] / (T(C) * T(call.N));
    for (int64_t c = 0; c < C; ++c) {
      for (int n = 0; n < kBlock; n += L) {
        const Vec<T> through_error = factor * (load(x_hat(0, c) + n) - load(x(0, c) + n));
        store(d_x_hat(0, c) + n, load(through_x_hat(0, c) + n) + through_error);
        store(d_x(0, c) + n, -through_error);
      }
    }
  }

  // da_k        = sum_c d_x_hat_c rgb_{k,c} + what comes through a itself
  // d_rgb_{k,c} = a_k d_x_hat_c
  // d_alpha_k   = a_k (da_k - sum_j a_j da_j)
  void differentiate(Rows<T> rgba, Rows<T> a, Rows<T> d_x_hat, Rows<T> through_a, Rows<T> da, Rows<T> d_rgba) {
    const bool streams = call.stream && d_rgba.data != d_rgba_room;  // then what is put there stays there
    for (int n = 0; n < kBlock; n += L) {
      Vec<T> mean{};
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> a_k = load(a(k, 0) + n);
        Vec<T> da_k = load(through_a(k, 0) + n);
        for (int64_t c = 0; c < C; ++c) {
          const Vec<T> d_x_hat_c = load(d_x_hat(0, c) + n);
          da_k += d_x_hat_c * load(rgba(k, c) + n);
          put(d_rgba(k, c) + n, a_k * d_x_hat_c, streams);
        }
        store(da(k, 0) + n, da_k);
        mean += a_k * da_k;
      }
      for (int64_t k = 0; k < K; ++k) {
        put(d_rgba(k, C) + n, load(a(k, 0) + n) * (load(da(k, 0) + n) - mean), streams);
      }
    }
  }

  const Composition& call;

  T *rgba_room, *d_rgba_room;                        // (K, C + 1, kBlock)
  T *a_room, *da_room;                               // (K, kBlock)
  T *x_room, *x_hat_room, *d_x_room, *d_x_hat_room;  // (C, kBlock)
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
int64_t workspace_size(const Composition& call) {
  return CompositionChunk<T>(call, nullptr).workspace_size;
}

template <class T>
void forward(const Composition& call, int64_t begin, int64_t end, char* workspace) {
  CompositionChunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.forward(task);
}

template <class T>
void errors(const Composition& call, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    double total = 0;
    for (int64_t i = 0; i < call.chunks(); ++i) {
      total += static_cast<const T*>(call.partials)[image * call.chunks() + i];
    }
    static_cast<T*>(call.errors)[image] = T(total / (double(call.C) * double(call.N)));
  }
}

template <class T>
void backward(const Composition& call, int64_t begin, int64_t end, char* workspace) {
  CompositionChunk<T> chunk(call, workspace);
  for (int64_t task = begin; task < end; ++task) chunk.backward(task);
  finish_streams();
}

template <class T>
CompositionKernels kernels() {
  return {workspace_size<T>, forward<T>, errors<T>, backward<T>};
}

}  // namespace

CompositionKernels composition_kernels(Storage storage) {
  return storage == Storage::float64 ? kernels<double>() : kernels<float>();
}

}  // namespace iio::IIO_ISA
