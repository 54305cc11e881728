// The packed product on AVX-512 F: one fused multiply-add a float32. Serves addmm, and gram where its inputs are not
// bfloat16 or the processor does not multiply those.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")

#include "product_avx512.h"

namespace sparsekern {
namespace {

struct Fma {
  static __m512 add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

void pack_gram(const void* x, DType dtype, int64_t tokens, int64_t in_features, int64_t first_panel, int64_t end_panel,
               float* a, float* b) {
  const auto pack = dtype == DType::kFloat32   ? pack_gram_of<Float32Steps>
                    : dtype == DType::kFloat16 ? pack_gram_of<Float16Steps>
                                               : pack_gram_of<Bf16Steps>;
  pack(x, tokens, in_features, first_panel, end_panel, a, b);
}

// 8 lines of 8 steps become 8 steps of 8 lines, kWidth apart.
template <int64_t kWidth>
void transpose(const __m256* lines, float* target, int64_t steps) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(lines[i], lines[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(lines[i], lines[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int step = 0; step < 8 && step < steps; ++step) {
    const __m256 low = quads[step % 4], high = quads[step % 4 + 4];
    _mm256_store_ps(target + step * kWidth,
                    step < 4 ? _mm256_permute2f128_ps(low, high, 0x20) : _mm256_permute2f128_ps(low, high, 0x31));
  }
}

// Lines whose steps follow each other in memory.
template <int64_t kWidth>
void pack_along(const float* lines, int64_t line_stride, int64_t count, int64_t steps, float scale, float* target) {
  for (int64_t part = 0; part < kWidth; part += 8) {
    for (int64_t step = 0; step < steps; step += 8) {
      const __mmask8 inside = static_cast<__mmask8>(first_lanes(steps - step));
      __m256 loaded[8];
      for (int line = 0; line < 8; ++line) {
        const bool exists = part + line < count;
        const float* source = lines + (exists ? part + line : 0) * line_stride + step;
        const __m256 values = _mm256_maskz_loadu_ps(exists ? inside : 0, source);
        loaded[line] = _mm256_mul_ps(values, _mm256_set1_ps(scale));
      }
      transpose<kWidth>(loaded, target + step * kWidth + part, steps - step);
    }
  }
}

// Lines that follow each other in memory at every step.
template <int64_t kWidth>
void pack_across(const float* lines, int64_t step_stride, int64_t count, int64_t steps, float scale, float* target) {
  constexpr int64_t kVector = kWidth % kLanes ? 8 : kLanes;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t part = 0; part < kWidth; part += kVector) {
      const __mmask16 inside = first_lanes(count - part);
      const float* source = lines + step * step_stride + part;
      if constexpr (kVector == kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(inside, source);
        _mm512_store_ps(target + step * kWidth + part, _mm512_mul_ps(values, _mm512_set1_ps(scale)));
      } else {
        const __m256 values = _mm256_maskz_loadu_ps(static_cast<__mmask8>(inside), source);
        _mm256_store_ps(target + step * kWidth + part, _mm256_mul_ps(values, _mm256_set1_ps(scale)));
      }
    }
  }
}

template <int64_t kWidth>
void pack_lines(const float* lines, int64_t line_stride, int64_t step_stride, int64_t count, int64_t steps,
                float scale, int64_t first_panel, int64_t end_panel, float* packed) {
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t first = panel * kWidth;
    float* target = packed + first * steps;
    if (step_stride == 1) {
      pack_along<kWidth>(lines + first * line_stride, line_stride, count - first, steps, scale, target);
    } else {
      pack_across<kWidth>(lines + first, step_stride, count - first, steps, scale, target);
    }
  }
}

}  // namespace

const Product kProductAvx512 = {1, multiply<Fma>, pack_gram, pack_lines<kTileRows>, pack_lines<kTileColumns>};

bool has_product_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

}  // namespace sparsekern

#endif
