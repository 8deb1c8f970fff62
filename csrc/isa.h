// Which of the compiled instruction sets this machine runs: decided once, when the program runs.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace iio {

enum class Isa { baseline, avx2, avx512 };

inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// The widest that the machine has, or a narrower one where the environment variable IIO_KERNELS_ISA names it.
inline Isa isa() {
  static const Isa chosen = [] {
    const Isa widest = widest_isa();
    const char* name = std::getenv("IIO_KERNELS_ISA");
    if (name == nullptr || *name == '\0') return widest;
    for (Isa wanted : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      const char* names[] = {"baseline", "avx2", "avx512"};
      if (std::strcmp(name, names[int(wanted)]) == 0) return wanted < widest ? wanted : widest;
    }
    throw std::runtime_error(std::string("IIO_KERNELS_ISA: expected baseline, avx2 or avx512, got ") + name);
  }();
  return chosen;
}

}  // namespace iio
