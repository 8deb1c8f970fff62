// As much of CUDA as csrc/iio_loss.cu uses, on a CPU: found before CUDA's own header, it lets a C++ compiler compile
// that file as it is, and every kernel runs on plain memory.
//
// Blocks run one after the other. A thread of a block is a fiber, which runs until it waits for the others. What real
// threads would do at once they do here in the order of their numbers or, with IIO_HOST_ORDER=descending in the
// environment, against it: a result that depends on it has a race. Under ThreadSanitizer fibers are threads that only
// __syncthreads orders, so that it reports such a race by itself.
//
// Like a GPU this is strict about launches (sizes, shared memory that was not asked for) and barriers that not all
// threads reach, and shared memory is full of NaN at first. Past its end AddressSanitizer stops the program.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __CUDACC__
#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

alignas(64) inline double dynamic_shared[(227 << 10) / sizeof(double)];  // that of an H100

namespace cuda_on_host {

constexpr int kWarp = 32;

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

// ---- Fibers ---------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  jmp_buf position;
  void* stack = nullptr;
  void* tsan = nullptr;
  bool started = false, done = false;
};

// What waits for all of a number of threads. A thread that comes twice finds the next turn.
struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // for every second exchange
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  Fiber scheduler;
  std::function<void()> kernel;
  int running = 0;
  bool moved = false;
};

inline Block block;

// setjmp is ten times as fast, but sanitizers follow swapcontext alone.
inline void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.position)) return;
  if (to.started) _longjmp(to.position, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

inline void body() {
  block.kernel();
  Fiber& self = block.fibers[block.running];
  self.done = block.moved = true;
  change(self, block.scheduler);
}

inline void make(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) stop("no memory for a stack");
  }
  fiber.started = fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
#if defined(__SANITIZE_THREAD__)
  if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

inline void wait(Barrier& barrier, int threads) {
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
  block.moved = true;
  const int self = block.running;
  while (barrier.turn == turn) change(block.fibers[self], block.scheduler);
}

inline void run_block(int threads, size_t shared) {
  std::memset(dynamic_shared, 0xff, shared);  // NaN
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, shared);
  ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(dynamic_shared) + shared, sizeof(dynamic_shared) - shared);
#elif defined(__SANITIZE_THREAD__)
  block.scheduler.tsan = __tsan_get_current_fiber();
#endif
  block.scheduler.started = true;
  block.barrier = {};
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  if (int(block.fibers.size()) < threads) block.fibers.resize(threads);
  for (int k = 0; k < threads; ++k) make(block.fibers[k]);
  const char* const order = std::getenv("IIO_HOST_ORDER");
  const bool descending = order && std::string(order) == "descending";
  for (int left = threads; left > 0;) {
    block.moved = false;
    for (int j = 0; j < threads; ++j) {
      const int k = descending ? threads - 1 - j : j;
      if (block.fibers[k].done) continue;
      block.running = k;
      threadIdx = dim3(k);
      change(block.scheduler, block.fibers[k]);
      left -= block.fibers[k].done;
    }
    if (!block.moved) stop("a barrier that not all threads reach");
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, sizeof(dynamic_shared));
#endif
}

inline std::map<void*, int> asked_for;  // shared memory, by kernel
inline int launches = 0;

}  // namespace cuda_on_host

// ---- In kernels -----------------------------------------------------------------------------------------------------

inline void __syncthreads() {
  using namespace cuda_on_host;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&block.barrier);
#endif
  wait(block.barrier, blockDim.x);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block.barrier);
#endif
}

// Of all lanes. It moves values and orders no other memory.
template <class T>
__attribute__((no_sanitize_thread)) T __shfl_xor_sync(unsigned lanes, T x, int with) {
  using namespace cuda_on_host;
  if (lanes != 0xffffffff || blockDim.x % kWarp) stop("an exchange without all lanes");
  const int lane = threadIdx.x % kWarp;
  Warp& warp = block.warps[threadIdx.x / kWarp];
  uint64_t* const values = warp.values[warp.barrier.turn % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  values[lane] = bits;
  wait(warp.barrier, kWarp);
  bits = values[lane ^ with];
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- On the host ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaFuncAttributes {};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > sizeof(dynamic_shared)) return cudaErrorInvalidValue;
  cuda_on_host::asked_for[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_host;
  const auto found = asked_for.find(reinterpret_cast<void*>(kernel));
  const size_t limit = found == asked_for.end() ? 48 << 10 : found->second;
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  if (threads.x == 0 || threads.x > 1024 || threads.y != 1 || threads.z != 1) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  ++launches;
  gridDim = grid;
  blockDim = threads;
  block.kernel = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    run_block(threads.x, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}

extern "C" __attribute__((used, visibility("default"))) inline int cuda_on_host_launches() {
  return cuda_on_host::launches;
}
