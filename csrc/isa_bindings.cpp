// What `python -m iio_kernels` reports.
#include <exception>

#include "isa.h"

extern "C" __attribute__((visibility("default"))) const char* iio_kernels_instruction_set() {
  static std::string answer;
  try {
    const char* names[] = {"baseline", "avx2", "avx512"};
    answer = names[int(iio::isa())];
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer.c_str();
}
