// The packed product on AVX-512. Included by one file an instruction set, after its target pragma. No STL here: a weak
// symbol compiled for AVX-512 could replace the baseline's.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// the intrinsics' own headers, https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "product.h"

namespace sparsekern {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kTileColumns / kLanes;

// The first `count` lanes of 16, none below 0.
inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// c [rows, columns] += a^T b, of one panel each.
template <class Math>
inline void multiply_tile(const float* a, const float* b, int64_t steps, float* c, int64_t c_stride, int64_t rows,
                          int64_t columns) {
  __m512 sums[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row) {
    // C arrives while the sums are taken
    if (row < rows) {
      __builtin_prefetch(c + row * c_stride, 1);
      __builtin_prefetch(c + row * c_stride + kLanes, 1);
      __builtin_prefetch(c + row * c_stride + 2 * kLanes, 1);
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512 b_step[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) b_step[v] = _mm512_load_ps(b + step * kTileColumns + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row) {
      const __m512 a_row = _mm512_set1_ps(a[step * kTileRows + row]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[row][v] = Math::add(sums[row][v], a_row, b_step[v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row) {
    if (row < rows) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 inside = first_lanes(columns - v * kLanes);
        float* target = c + row * c_stride + v * kLanes;
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, target), sums[row][v]);
        _mm512_mask_storeu_ps(target, inside, sum);
      }
    }
  }
}

template <class Math>
void multiply(const Block& block) {
  for (int64_t row = 0; row < block.rows; row += kTileRows) {
    const float* a = block.a + row * block.steps;
    for (int64_t column = 0; column < block.columns; column += kTileColumns) {
      if (row >= column + kTileColumns + block.diagonal) continue;
      multiply_tile<Math>(a, block.b + column * block.steps, block.steps, block.c + row * block.c_stride + column,
                          block.c_stride, block.rows - row, block.columns - column);
    }
  }
}

// Steps of x^T x, `Steps::load(x, token, tokens, in_features, column, inside)` giving 16 columns of one, as panels.
template <class Steps>
void pack_gram_of(const void* x, int64_t tokens, int64_t in_features, int64_t first_panel, int64_t end_panel, float* a,
                  float* b) {
  const auto* source = static_cast<const typename Steps::Source*>(x);
  const int64_t steps = (tokens + Steps::kTokens - 1) / Steps::kTokens;
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t first = panel * kTileColumns;
    float* columns = b + first * steps;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t token = step * Steps::kTokens;
      const auto* row = source + token * in_features + first;
      const bool second = token + 1 < tokens;
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 inside = first_lanes(in_features - first - v * kLanes);
        const __m512 loaded = Steps::load(row + v * kLanes, second ? in_features : 0, second, inside);
        _mm512_store_ps(columns + step * kTileColumns + v * kLanes, loaded);
      }
    }
    // the same columns again, in the shape of A
    for (int64_t part = 0; part < kTileColumns; part += kTileRows) {
      float* rows = a + (first + part) * steps;
      for (int64_t step = 0; step < steps; ++step) {
        _mm256_store_ps(rows + step * kTileRows, _mm256_load_ps(columns + step * kTileColumns + part));
      }
    }
  }
}

// One token a step, widened to float32.
struct Float32Steps {
  using Source = float;
  static constexpr int64_t kTokens = 1;
  static __m512 load(const Source* x, int64_t, bool, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, x); }
};

struct Float16Steps {
  using Source = uint16_t;
  static constexpr int64_t kTokens = 1;
  static __m512 load(const Source* x, int64_t, bool, __mmask16 inside) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, x));
  }
};

inline __m512i load_words(const uint16_t* x, __mmask16 inside) {
  return _mm512_maskz_cvtepu16_epi32(inside, _mm256_maskz_loadu_epi16(inside, x));
}

struct Bf16Steps {
  using Source = uint16_t;
  static constexpr int64_t kTokens = 1;
  static __m512 load(const Source* x, int64_t, bool, __mmask16 inside) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(load_words(x, inside), 16));
  }
};

}  // namespace
}  // namespace sparsekern
