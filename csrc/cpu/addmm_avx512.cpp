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

// 8 rows of 8 steps become 8 steps of 8 rows.
void transpose(const __m256* rows, float* target, int64_t steps) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int step = 0; step < 8 && step < steps; ++step) {
    const __m256 low = quads[step % 4], high = quads[step % 4 + 4];
    _mm256_store_ps(target + step * kTileRows,
                    step < 4 ? _mm256_permute2f128_ps(low, high, 0x20) : _mm256_permute2f128_ps(low, high, 0x31));
  }
}

void pack_rows(const float* a, int64_t a_stride, int64_t rows, int64_t steps, float scale, int64_t first_panel,
               int64_t end_panel, float* packed) {
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t first = panel * kTileRows;
    float* target = packed + first * steps;
    for (int64_t step = 0; step < steps; step += 8) {
      const __mmask8 inside = static_cast<__mmask8>(first_lanes(steps - step));
      __m256 loaded[8];
      for (int row = 0; row < 8; ++row) {
        const bool exists = first + row < rows;
        const float* source = a + (first + (exists ? row : 0)) * a_stride + step;
        const __m256 values = _mm256_maskz_loadu_ps(exists ? inside : 0, source);
        loaded[row] = _mm256_mul_ps(values, _mm256_set1_ps(scale));
      }
      transpose(loaded, target + step * kTileRows, steps - step);
    }
  }
}

void pack_columns(const float* b, int64_t b_stride, int64_t columns, int64_t steps, int64_t first_panel,
                  int64_t end_panel, float* packed) {
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t first = panel * kTileColumns;
    float* target = packed + first * steps;
    for (int64_t step = 0; step < steps; ++step) {
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 inside = first_lanes(columns - first - v * kLanes);
        const float* source = b + step * b_stride + first + v * kLanes;
        _mm512_store_ps(target + step * kTileColumns + v * kLanes, _mm512_maskz_loadu_ps(inside, source));
      }
    }
  }
}

}  // namespace

const Product kProductAvx512 = {1, multiply<Fma>, pack_gram, pack_rows, pack_columns};

bool has_product_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

}  // namespace sparsekern

#endif
