// How the numbers of a tensor are stored: as what the kernels compute in, or as bfloat16, the upper half of a float.
#pragma once

#include "simd.h"

namespace iio {

enum class Storage { float32, float64, bfloat16 };

namespace IIO_ISA {

// D stored numbers to T.
template <class T>
IIO_INLINE void read(Storage storage, const char* from, int64_t D, T* to) {
  if (storage != Storage::bfloat16) {
    std::memcpy(to, from, D * sizeof(T));
    return;
  }
  for (int64_t d = 0; d < D; ++d) {
    uint16_t half;
    std::memcpy(&half, from + d * sizeof half, sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    to[d] = T(x);
  }
}

// D numbers to storage: to the nearest, in a tie to the even one; a NaN stays one.
template <class T>
IIO_INLINE void write(Storage storage, const T* from, int64_t D, char* to) {
  if (storage != Storage::bfloat16) {
    std::memcpy(to, from, D * sizeof(T));
    return;
  }
  for (int64_t d = 0; d < D; ++d) {
    const float x = float(from[d]);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint16_t half = uint16_t(x == x ? rounded : (bits >> 16) | 0x40);
    std::memcpy(to + d * sizeof half, &half, sizeof half);
  }
}

}  // namespace IIO_ISA
}  // namespace iio
