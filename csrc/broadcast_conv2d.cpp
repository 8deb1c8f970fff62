// The spatial-broadcast decoder's first layer on the CPU, for one instruction set. broadcast_conv2d.h has the formulas
// and the division into tasks.
//
// A chunk of images is worked through by rows: a row of the map, and of its gradient, stays in the first cache while
// that row of all the chunk's images passes by. Within a row, the columns of one class share a vector, and the sum over
// them stays in registers. So the result is written to memory once, and its gradient read once.
#include "broadcast_conv2d.h"

namespace iio::IIO_ISA {
namespace {

// Vectors of channels from `p` on: whole ones, or the first `count` lanes of one.
template <class T, bool whole>
IIO_INLINE Vec<T> get(const T* p, int count) {
  return whole ? load(p) : load_first(p, count);
}

template <class T, bool whole>
IIO_INLINE void put(T* p, Vec<T> x, int count) {
  whole ? store(p, x) : store_first(p, x, count);
}

// Calls part<vectors, whole>(first channel, count) for groups of channels that make up all O of them.
template <class T, class Part>
IIO_INLINE void for_all_channels(int64_t O, Part part) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  for (; o + 2 * L <= O; o += 2 * L) part(std::integral_constant<int, 2>(), std::true_type(), o, L);
  for (; o + L <= O; o += L) part(std::integral_constant<int, 1>(), std::true_type(), o, L);
  if (o < O) part(std::integral_constant<int, 1>(), std::false_type(), o, int(O - o));
}

template <class T>
class Chunk {
 public:
  Chunk(const Broadcast& call, char* workspace)
      : call(call), O(call.O), R(call.rows.classes()), C(call.columns.classes()), width(call.columns.size * call.O) {
    room = reinterpret_cast<T*>(workspace + (-reinterpret_cast<uintptr_t>(workspace) & 63));
    // Where there is no ReLU nothing is cut: no number is at or below NaN.
    floor = call.relu ? T(0) : T(__builtin_nanf(""));
  }

  static int64_t workspace_size(const Broadcast& call) { return 63 + call.columns.size * call.O * sizeof(T); }

  void forward(int64_t chunk) {
    open(chunk);
    for (int64_t y = 0; y < call.rows.size; ++y) {
      for (int64_t m = first; m < last; ++m) {
        char* out = static_cast<char*>(call.out) + row(m, y) * stored();
        T* to = in_place() ? reinterpret_cast<T*>(out) : room;
        spread_row(constant(m, y), map(y), to, call.stream);
        if (!in_place()) write(call.storage, to, width, out);
      }
    }
    finish_streams();
  }

  void backward(int64_t chunk) {
    open(chunk);
    T* d_maps = static_cast<T*>(call.partials) + chunk * call.rows.size * width;
    T* d_constants = static_cast<T*>(call.d_constant);
    std::memset(d_constants + first * R * C * O, 0, (last - first) * R * C * O * sizeof(T));
    for (int64_t y = 0; y < call.rows.size; ++y) {
      T* d_map = d_maps + y * width;
      std::memset(d_map, 0, width * sizeof(T));
      for (int64_t m = first; m < last; ++m) {
        const char* d_out = static_cast<const char*>(call.d_out) + row(m, y) * stored();
        fetch_ahead(d_out);
        if (!in_place()) read(call.storage, d_out, width, room);
        const T* from = in_place() ? reinterpret_cast<const T*>(d_out) : room;
        differentiate_row(constant(m, y), map(y), from, d_constants + constant_at(m, y), d_map);
      }
    }
  }

 private:
  static constexpr int L = kLanes<T>;

  void open(int64_t chunk) {
    first = chunk * call.chunk_size();
    last = first + call.chunk_size() < call.M ? first + call.chunk_size() : call.M;
  }

  // out = relu(constant[class of x] + map[x])
  void spread_row(const T* constant, const T* map, T* out, bool streams) {
    const Axis columns = call.columns;
    for_all_channels<T>(O, [&](auto vectors, auto whole, int64_t o, int count) {
      for (int64_t c = 0; c < C; ++c) {
        Vec<T> k[vectors];
        for (int i = 0; i < vectors; ++i) k[i] = get<T, whole>(constant + c * O + o + i * L, count);
        for (int64_t x = columns.first(c); x < columns.last(c); x += columns.period) {
          for (int i = 0; i < vectors; ++i) {
            const int64_t at = x * O + o + i * L;
            const Vec<T> sum = k[i] + get<T, whole>(map + at, count);
            const Vec<T> y = sum <= floor ? T(0) : sum;
            streams ? stream(out + at, y) : put<T, whole>(out + at, y, count);
          }
        }
      }
    });
  }

  // d_sum = d_out where relu did not cut; d_constant[class of x] += d_sum, d_map[x] += d_sum
  void differentiate_row(const T* constant, const T* map, const T* d_out, T* d_constant, T* d_map) {
    const Axis columns = call.columns;
    for_all_channels<T>(O, [&](auto vectors, auto whole, int64_t o, int count) {
      for (int64_t c = 0; c < C; ++c) {
        Vec<T> k[vectors], total[vectors] = {};
        for (int i = 0; i < vectors; ++i) k[i] = get<T, whole>(constant + c * O + o + i * L, count);
        for (int64_t x = columns.first(c); x < columns.last(c); x += columns.period) {
          for (int i = 0; i < vectors; ++i) {
            const int64_t at = x * O + o + i * L;
            const Vec<T> sum = k[i] + get<T, whole>(map + at, count);
            const Vec<T> d_sum = sum <= floor ? T(0) : get<T, whole>(d_out + at, count);
            put<T, whole>(d_map + at, get<T, whole>(d_map + at, count) + d_sum, count);
            total[i] += d_sum;
          }
        }
        for (int i = 0; i < vectors; ++i) {
          T* to = d_constant + c * O + o + i * L;
          put<T, whole>(to, get<T, whole>(to, count) + total[i], count);
        }
      }
    });
  }

  int64_t stored() const { return call.storage == Storage::bfloat16 ? 2 : sizeof(T); }
  bool in_place() const { return stored() == sizeof(T); }

  // Elements from the first to where an image's row begins, and to its class's constants.
  int64_t row(int64_t m, int64_t y) const { return (m * call.rows.size + y) * width; }
  int64_t constant_at(int64_t m, int64_t y) const { return (m * R + call.rows.class_of(y)) * C * O; }
  const T* constant(int64_t m, int64_t y) const { return static_cast<const T*>(call.constant) + constant_at(m, y); }
  const T* map(int64_t y) const { return static_cast<const T*>(call.map) + y * width; }

  // Start to fetch the next image's row: a processor foresees long runs of addresses, and these are short ones.
  void fetch_ahead(const char* d_out) const {
    const uintptr_t from = reinterpret_cast<uintptr_t>(d_out) + call.rows.size * width * stored();
    for (int64_t at = 0; at < width * stored(); at += 64) prefetch<64>(from + at);
  }

  const Broadcast& call;
  const int64_t O, R, C, width;  // channels, classes of rows and columns, numbers in a row
  T* room;                       // a row
  T floor;

  int64_t first = 0, last = 0;  // the chunk's images
};

// ---------------------------------------------------------------------------------------------------------------------
// The stages.

template <class T>
void forward(const Broadcast& call, int64_t begin, int64_t end, char* workspace) {
  Chunk<T> images(call, workspace);
  for (int64_t chunk = begin; chunk < end; ++chunk) images.forward(chunk);
}

template <class T>
void backward(const Broadcast& call, int64_t begin, int64_t end, char* workspace) {
  Chunk<T> images(call, workspace);
  for (int64_t chunk = begin; chunk < end; ++chunk) images.backward(chunk);
}

template <class T>
void sum_maps(const Broadcast& call, int64_t begin, int64_t end) {
  const int64_t width = call.columns.size * call.O, size = call.rows.size * width;
  for (int64_t y = begin; y < end; ++y) {
    T* d_map = static_cast<T*>(call.d_map) + y * width;
    std::memset(d_map, 0, width * sizeof(T));
    for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
      const T* partial = static_cast<const T*>(call.partials) + chunk * size + y * width;
      for (int64_t i = 0; i < width; ++i) d_map[i] += partial[i];
    }
  }
}

template <class T>
BroadcastKernels kernels() {
  return {Chunk<T>::workspace_size, forward<T>, backward<T>, sum_maps<T>};
}

}  // namespace

BroadcastKernels broadcast_kernels(bool is_double) { return is_double ? kernels<double>() : kernels<float>(); }

}  // namespace iio::IIO_ISA
