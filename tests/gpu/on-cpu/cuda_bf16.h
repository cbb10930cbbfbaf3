// As much of CUDA C++ as our kernels use, for a C++ compiler: blocks run one after the other, a block's threads at once.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static

struct Index {
  uint32_t x = 1, y = 1;
};
inline Index gridDim, blockDim;
inline thread_local Index blockIdx, threadIdx;

inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline float lanes[32][32];

inline void __syncthreads() { block->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  lanes[warp][lane] = value;
  warps[warp]->arrive_and_wait();
  const float other = lanes[warp][lane ^ mask];
  warps[warp]->arrive_and_wait();
  return other;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

// Rounds to nearest even; not for NaN.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

// Runs a kernel over a grid; `threads` a multiple of 32.
template <typename F> void launch(uint32_t x, uint32_t y, uint32_t threads, F kernel) {
  gridDim = {x, y};
  blockDim = {threads, 1};
  for (uint32_t at = 0; at < x * y; at++) {
    block = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (uint32_t warp = 0; warp < threads / 32; warp++) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> all;
    for (uint32_t thread = 0; thread < threads; thread++)
      all.emplace_back([=] {
        blockIdx = {at % x, at / x};
        threadIdx = {thread, 0};
        kernel();
      });
    for (auto &thread : all) thread.join();
  }
}
