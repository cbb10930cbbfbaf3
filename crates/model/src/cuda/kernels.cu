// What a pass does between its matrix products on a GPU, fused so that a token costs few launches. T is float, half or bfloat16; sums are float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

template <typename T> __device__ __forceinline__ float load(T x) { return static_cast<float>(x); }
template <typename T> __device__ __forceinline__ T store(float x) { return static_cast<T>(x); }

// Rotary embedding of queries and keys: a head's halves (a, b) become (a cos - b sin, a sin + b cos).
// q [tokens][q_heads][d] and k [tokens][k_heads][d] have rows q_row and k_row numbers apart; cos and sin [tokens][d / 2]; out [tokens][q_heads + k_heads][d].
// grid (tokens, q_heads + k_heads)
template <typename T>
__device__ void rotate(const T *q, const T *k, const float *cos, const float *sin, T *out, uint32_t q_row, uint32_t k_row, uint32_t q_heads, uint32_t half) {
  const size_t token = blockIdx.x;
  const uint32_t head = blockIdx.y;
  const T *from = head < q_heads ? q + token * q_row + head * 2 * half : k + token * k_row + (head - q_heads) * 2 * half;
  // queries of all tokens first, then keys: both are whole tensors
  const uint32_t k_heads = gridDim.y - q_heads;
  T *to = head < q_heads ? out + (token * q_heads + head) * 2 * half
                         : out + (size_t(gridDim.x) * q_heads + token * k_heads + (head - q_heads)) * 2 * half;
  for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
    const float a = load(from[i]), b = load(from[i + half]), c = cos[token * half + i], s = sin[token * half + i];
    to[i] = store<T>(a * c - b * s);
    to[i + half] = store<T>(a * s + b * c);
  }
}

// Puts the new tokens' keys and values where their slots say. k and v have rows k_row and v_row numbers apart, of which `width` are kept; a pool's rows are
// `pool_row` apart.
// grid (tokens, 2): keys, values
template <typename T>
__device__ void cache(const T *k, const T *v, const uint32_t *slots, T *keys, T *values, uint32_t k_row, uint32_t v_row, uint32_t width, uint32_t pool_row) {
  const size_t token = blockIdx.x;
  const T *from = blockIdx.y == 0 ? k + token * k_row : v + token * v_row;
  T *to = (blockIdx.y == 0 ? keys : values) + size_t(slots[token]) * pool_row;
  for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// silu(gate) * up; rows gate_row and up_row numbers apart, out [tokens][width].
// grid (tokens, width / block)
template <typename T>
__device__ void silu_mul(const T *gate, const T *up, T *out, uint32_t gate_row, uint32_t up_row, uint32_t width) {
  const size_t token = blockIdx.x;
  const uint32_t i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= width) return;
  const float g = load(gate[token * gate_row + i]);
  // (rounded between the two, as separate operations do)
  const float activated = load(store<T>(g / (1.0f + __expf(-g))));
  out[token * width + i] = store<T>(activated * load(up[token * up_row + i]));
}

// The residual stream after an update, and its RMS norm for what comes next: out holds [rows][width] sums, then as many normed ones.
// grid (rows), block of a multiple of 32
template <typename T>
__device__ void add_rms_norm(const T *hidden, const T *update, const T *weight, T *out, uint32_t width, float eps) {
  const size_t row = blockIdx.x;
  const T *a = hidden + row * width, *b = update + row * width;
  T *sum = out + row * width, *normed = out + (gridDim.x + row) * width;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
    const T s = store<T>(load(a[i]) + load(b[i]));
    sum[i] = s;
    squares += load(s) * load(s);
  }
  __shared__ float parts[32];
  for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lane);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f;
  for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lane);
  const float scale = rsqrtf(squares / width + eps);
  for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) normed[i] = store<T>(load(sum[i]) * scale * load(weight[i]));
}

#define KERNELS(T, name)                                                                                                                             \
  extern "C" __global__ void rotate_##name(const T *q, const T *k, const float *cos, const float *sin, T *out, uint32_t q_row, uint32_t k_row,       \
                                           uint32_t q_heads, uint32_t half) {                                                                        \
    rotate(q, k, cos, sin, out, q_row, k_row, q_heads, half);                                                                                        \
  }                                                                                                                                                  \
  extern "C" __global__ void cache_##name(const T *k, const T *v, const uint32_t *slots, T *keys, T *values, uint32_t k_row, uint32_t v_row,         \
                                          uint32_t width, uint32_t pool_row) {                                                                       \
    cache(k, v, slots, keys, values, k_row, v_row, width, pool_row);                                                                                 \
  }                                                                                                                                                  \
  extern "C" __global__ void silu_mul_##name(const T *gate, const T *up, T *out, uint32_t gate_row, uint32_t up_row, uint32_t width) {               \
    silu_mul(gate, up, out, gate_row, up_row, width);                                                                                                \
  }                                                                                                                                                  \
  extern "C" __global__ void add_rms_norm_##name(const T *hidden, const T *update, const T *weight, T *out, uint32_t width, float eps) {             \
    add_rms_norm(hidden, update, weight, out, width, eps);                                                                                           \
  }

KERNELS(float, f32)
KERNELS(__half, f16)
KERNELS(__nv_bfloat16, bf16)
