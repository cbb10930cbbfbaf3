// Our kernels against plain loops in f64, on random numbers; what a kernel must not touch is filled with other numbers, what it must write with a large one.
#include "../../../crates/model/src/cuda/kernels.cu"
#include <algorithm>
#include <cstdio>
#include <random>

static std::mt19937 generator(1);
static int failures = 0;

template <typename T> std::vector<T> random(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> numbers(count);
  for (auto &number : numbers) number = T(normal(generator));
  return numbers;
}

template <typename T> double number(T value) { return static_cast<float>(value); }

template <typename T> void check(const char *what, const std::vector<T> &found, const std::vector<double> &expected, double within) {
  double largest = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    const double difference = std::fabs(number(found[i]) - expected[i]) / std::max(1.0, std::fabs(expected[i]));
    if (!(difference <= largest)) largest = difference;   // (NaN too)
  }
  const bool right = largest <= within;
  failures += !right;
  std::printf("%-4s %s: largest difference %.2g, allowed %.2g\n", right ? "ok" : "FAIL", what, largest, within);
}

// `within`: half a unit in the last place of T at 1, and the sum's.
template <typename T>
void kernels(decltype(rotate<T>) rotate, decltype(cache<T>) cache, decltype(silu_mul<T>) silu_mul, decltype(add_rms_norm<T>) add_rms_norm, double within) {
  const uint32_t tokens = 3, heads = 4, groups = 2, d = 64, half = d / 2, row = (heads + 2 * groups) * d;
  const T nothing = T(6e4f);   // far from everything that is computed

  // queries, keys and values side by side, as one product gives them
  const auto joint = random<T>(tokens * row);
  const T *q = joint.data(), *k = q + heads * d, *v = k + groups * d;
  const auto cos = random<float>(tokens * half), sin = random<float>(tokens * half);
  std::vector<T> out(tokens * (heads + groups) * d, nothing);
  launch(tokens, heads + groups, 32, [&] { rotate(q, k, cos.data(), sin.data(), out.data(), row, row, heads, half); });
  std::vector<double> expected(out.size());
  for (uint32_t t = 0; t < tokens; t++)
    for (uint32_t head = 0; head < heads + groups; head++)
      for (uint32_t i = 0; i < half; i++) {
        const double a = number(joint[t * row + head * d + i]), b = number(joint[t * row + head * d + half + i]), c = cos[t * half + i], s = sin[t * half + i];
        double *to = &expected[head < heads ? (t * heads + head) * d : tokens * heads * d + (t * groups + head - heads) * d];
        to[i] = a * c - b * s;
        to[i + half] = a * s + b * c;
      }
  check("rotate", out, expected, within);

  // a pool with a group more than the attention has
  const uint32_t pool_row = (groups + 1) * d, slots[tokens] = {5, 0, 9};
  std::vector<T> keys(10 * pool_row, T(7.0f)), values(10 * pool_row, T(8.0f));
  launch(tokens, 2, 128, [&] { cache(k, v, slots, keys.data(), values.data(), row, row, groups * d, pool_row); });
  std::vector<double> expected_keys(keys.size(), 7), expected_values(values.size(), 8);
  for (uint32_t t = 0; t < tokens; t++)
    for (uint32_t i = 0; i < groups * d; i++) {
      expected_keys[slots[t] * pool_row + i] = number(k[t * row + i]);
      expected_values[slots[t] * pool_row + i] = number(v[t * row + i]);
    }
  check("cache, keys", keys, expected_keys, 0);
  check("cache, values", values, expected_values, 0);

  const uint32_t ffn = 300;
  const auto gate_up = random<T>(tokens * 2 * ffn);
  std::vector<T> products(tokens * ffn, nothing);
  launch(tokens, 2, 256, [&] { silu_mul(gate_up.data(), gate_up.data() + ffn, products.data(), 2 * ffn, 2 * ffn, ffn); });
  expected.assign(products.size(), 0);
  for (uint32_t t = 0; t < tokens; t++)
    for (uint32_t i = 0; i < ffn; i++) {
      const double g = number(gate_up[t * 2 * ffn + i]);
      expected[t * ffn + i] = g / (1 + std::exp(-g)) * number(gate_up[t * 2 * ffn + ffn + i]);
    }
  check("silu_mul", products, expected, 2 * within);

  for (uint32_t width : {576, 100, 2048, 4096}) {
    const uint32_t rows = 2, threads = std::min((width + 31) / 32 * 32, 1024u);
    const auto hidden = random<T>(rows * width), update = random<T>(rows * width), weight = random<T>(width);
    std::vector<T> both(2 * rows * width, nothing);
    launch(rows, 1, threads, [&] { add_rms_norm(hidden.data(), update.data(), weight.data(), both.data(), width, 1e-5f); });
    expected.assign(both.size(), 0);
    for (uint32_t r = 0; r < rows; r++) {
      double squares = 0;
      for (uint32_t i = 0; i < width; i++) {
        const double sum = number(T(float(number(hidden[r * width + i]) + number(update[r * width + i]))));
        expected[r * width + i] = sum;
        squares += sum * sum;
      }
      for (uint32_t i = 0; i < width; i++) expected[(rows + r) * width + i] = expected[r * width + i] / std::sqrt(squares / width + 1e-5) * number(weight[i]);
    }
    check("add_rms_norm", both, expected, within);
  }
}

int main() {
  std::puts("f32");
  kernels<float>(rotate_f32, cache_f32, silu_mul_f32, add_rms_norm_f32, 1e-6);
  std::puts("f16");
  kernels<__half>(rotate_f16, cache_f16, silu_mul_f16, add_rms_norm_f16, 1.0 / 2048);
  std::puts("bf16");
  kernels<__nv_bfloat16>(rotate_bf16, cache_bf16, silu_mul_bf16, add_rms_norm_bf16, 1.0 / 256);
  return failures > 0;
}
