// Vectors as wide as the instruction set that the including file is compiled for.
//
// Every kernel file is compiled once for each instruction set (IIO_ISA names it: avx512, avx2, baseline), and the one
// to run is chosen when the program runs. Whatever is inlined must therefore live in a namespace of its own for each:
// the linker would otherwise keep one copy of several, perhaps one that the machine cannot execute. For the same reason
// kernel files use nothing of the standard library that is not inlined without fail.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#ifndef IIO_ISA
#define IIO_ISA baseline
#endif

#define IIO_INLINE inline __attribute__((always_inline))

namespace iio::IIO_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

// A vector of T. Arithmetic and comparison operators act lane by lane (GCC's and Clang's vector extension).
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
IIO_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// No alignment is asked for.
template <class T>
IIO_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
IIO_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof x);
}

// The first `count` lanes; the others are 0 and their memory is not read.
template <class T>
IIO_INLINE Vec<T> load_first(const T* p, int count) {
  Vec<T> x{};
  std::memcpy(&x, p, count * sizeof(T));
  return x;
}

template <class T>
IIO_INLINE void store_first(T* p, Vec<T> x, int count) {
  std::memcpy(p, &x, count * sizeof(T));
}

// To an address that is a multiple of kVectorBytes, past the caches where the instruction set can: for what is larger
// than they are. Call `finish_streams` before another thread may read it.
template <class T>
IIO_INLINE void stream(T* p, Vec<T> x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<Vec<T>*>(p));
#elif defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) __builtin_ia32_movntps512(p, x);
  if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd512(p, x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) __builtin_ia32_movntps256(p, x);
  if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd256(p, x);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) __builtin_ia32_movntps(p, x);
  if constexpr (sizeof(T) == 8) __builtin_ia32_movntpd(p, x);
#else
  store(p, x);
#endif
}

IIO_INLINE void finish_streams() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// Start to read the cache lines of `bytes` bytes from the address on. Any address will do.
template <int bytes>
IIO_INLINE void prefetch(uintptr_t address) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + i), 0, 2);
}

// What comparing two Vec<T> gives: integers as wide as T, all ones where true and 0 where false.
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

// One lane of a Mask<T>.
template <class T>
using MaskLane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
IIO_INLINE Mask<T> load_mask(const MaskLane<T>* p) {
  Mask<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Lane i is the lane at[i] of a and b one behind the other; the indices are constants.
template <class T, size_t... at>
IIO_INLINE Vec<T> pick(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(at)...);
#else
  return __builtin_shuffle(a, b, Mask<T>{MaskLane<T>(at)...});
#endif
}

// One step of `sums`: in each 2 * half lanes, first what the halves of a add up to, then those of b.
template <class T, int half, size_t... lane>
IIO_INLINE Vec<T> add_halves(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  return pick<T, ((lane & half) ? kLanes<T> + lane : lane)...>(a, b) +
         pick<T, ((lane & half) ? kLanes<T> + lane - half : lane + half)...>(a, b);
}

// Lane i is the sum over the lanes of x[i], for kLanes<T> vectors, which it overwrites.
template <class T, int count = kLanes<T>>
IIO_INLINE Vec<T> sums(Vec<T>* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    for (int i = 0; i < count / 2; ++i) {
      x[i] = add_halves<T, count / 2>(x[i], x[i + count / 2], std::make_index_sequence<kLanes<T>>());
    }
    return sums<T, count / 2>(x);
  }
}

// The sum over the lanes of x, rounded as `sums` rounds it.
template <class T>
IIO_INLINE T sum(Vec<T> x) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

template <class T>
struct Constants;

template <>
struct Constants<float> {
  typedef uint32_t Bits;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLeast = -104, kMost = 89;  // beyond these: 0 and infinity
  static constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr Bits kSqrtHalf = 0x3f3504f3;
  static constexpr int kLogTerms = 5;
  static constexpr float kSeries[] = {0x1.6d113cp-10f, 0x1.120ba2p-7f, 0x1.55551ap-5f, 0x1.5554dcp-3f, 0.5f};
};

template <>
struct Constants<double> {
  typedef uint64_t Bits;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLeast = -746, kMost = 710;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr int kLogTerms = 10;
  static constexpr double kSeries[] = {
      0x1.af38d53857513p-26, 0x1.2891a8c1d838dp-22, 0x1.71de0d9c145d0p-19, 0x1.a019b8ef67c6cp-16, 0x1.a01a01a7c8d47p-13,
      0x1.6c16c17893833p-10, 0x1.11111111109adp-7,  0x1.5555555553d4fp-5,  0x1.5555555555556p-3,  0.5};
};

// e to the power x, within one unit in the last place or so; -infinity gives 0, a NaN stays one.
//
// x = n ln 2 + r with an integer n and |r| <= ln 2 / 2, so e^x = 2^n (1 + r + r^2 (1/2 + r/6 + ...)). The polynomial
// interpolates at the Chebyshev nodes. 2^n is two factors, as it may itself be too large or too small for T.
template <class T>
IIO_INLINE Vec<T> exp(Vec<T> x) {
  typedef Constants<T> C;
  typedef typename C::Bits Bits;
  constexpr T kRound = T(3) * T(Bits(1) << (C::kMantissa - 1));  // what is added to it has its integer in the last bits

  x = x < C::kLeast ? splat(C::kLeast) : x;
  x = x > C::kMost ? splat(C::kMost) : x;
  Vec<T> shifted = x * C::kLog2E + kRound;
  Vec<T> n = shifted - kRound;
  Vec<T> r = x - n * C::kLn2High - n * C::kLn2Low;
  Vec<T> series = splat(C::kSeries[0]);
  for (size_t i = 1; i < sizeof C::kSeries / sizeof(T); ++i) series = series * r + C::kSeries[i];
  Vec<T> y = (series * r * r + r) + T(1);

  // Exponents with their bias, which keeps them positive: n + 2 bias, and its two halves.
  T round = kRound;
  Bits round_bits;
  std::memcpy(&round_bits, &round, sizeof round);
  Vec<Bits> bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits - round_bits + Bits(2 * C::kBias);
  Vec<Bits> half = bits >> 1, other = bits - half;
  half <<= C::kMantissa;
  other <<= C::kMantissa;
  Vec<T> power, other_power;
  std::memcpy(&power, &half, sizeof half);
  std::memcpy(&other_power, &other, sizeof other);
  return y * power * other_power;
}

// The natural logarithm of 0 and of normal numbers, within two units in the last place or so; a NaN stays one.
//
// x = 2^n m with m in [sqrt 1/2, sqrt 2], so ln x = n ln 2 + 2 artanh s with s = (m - 1) / (m + 1), |s| < 0.172, of
// which the series s + s^3/3 + s^5/5 + ... is summed as far as T can tell.
template <class T>
IIO_INLINE Vec<T> log(Vec<T> x) {
  typedef Constants<T> C;
  typedef typename C::Bits Bits;
  constexpr Bits kFraction = (Bits(1) << C::kMantissa) - 1;

  // As integers, positive numbers are their exponents and fractions: from sqrt 1/2 on, each 2^kMantissa is an n.
  Vec<Bits> bits;
  std::memcpy(&bits, &x, sizeof x);
  bits -= C::kSqrtHalf;
  Mask<T> exponent;
  std::memcpy(&exponent, &bits, sizeof bits);
  const Vec<T> n = __builtin_convertvector(exponent >> C::kMantissa, Vec<T>);
  bits = (bits & kFraction) + C::kSqrtHalf;
  Vec<T> m;
  std::memcpy(&m, &bits, sizeof m);

  const Vec<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vec<T> series{};
  for (int i = C::kLogTerms; i > 0; --i) series = series * square + T(2) / T(2 * i + 1);
  const Vec<T> y = n * C::kLn2High + (2 * s + (s * square * series + n * C::kLn2Low));
  return x == 0 ? splat(-kInfinity<T>) : x == x ? y : x;
}

}  // namespace iio::IIO_ISA
