// What a register of weights is and how it is multiplied, on AVX-512: 16 rows by 2 inputs, a row to each lane, so that no
// sum across lanes is ever needed. Included by one file an instruction set, after its target pragma. No STL here: a weak
// symbol compiled for AVX-512 could replace the baseline's.
#pragma once

#include "bf16_avx512.h"
#include "panel_product.h"

namespace sparsekern {
namespace {

// A tile in registers.
template <int kCount>
struct Tile {
  __m512i part[kCount];

  static Tile load(const __m512i* source) {
    Tile tile;
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) tile.part[i] = _mm512_loadu_si512(source + i);
    return tile;
  }
  void store(__m512i* target) const {
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) _mm512_storeu_si512(target + i, part[i]);
  }
};

// bfloat16 values: one register, dword n = (row n, input 0), (row n, input 1).
struct Bf16Values {
  using Value = uint16_t;
  static constexpr int kRegisters = 1;
  static constexpr int kPanels = 2;  // that are multiplied together

  static void store(void* y, int64_t offset, __m512 sums, __mmask16 rows) {
    store_bf16(static_cast<uint16_t*>(y) + offset, sums, rows);
  }
  static __m512 load_bias(const void* bias, int64_t row, __mmask16 rows) {
    return load_bf16(static_cast<const uint16_t*>(bias) + row, rows);
  }
};

// A bfloat16 is the upper half of a float32: a shift and an and make two of a dword.
struct Bf16ByFma : Bf16Values {
  using X = float;
  struct Sum {
    __m512 rows;
  };
  static Sum zero() { return {_mm512_setzero_ps()}; }
  struct Weights {
    __m512 even, odd;
  };
  static Weights weights(Tile<1> tile) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(tile.part[0], 16)),
            _mm512_castsi512_ps(_mm512_and_si512(tile.part[0], _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static void add(Sum& sum, const Weights& w, const X* x) {
    sum.rows = _mm512_fmadd_ps(w.even, _mm512_set1_ps(x[0]), sum.rows);
    sum.rows = _mm512_fmadd_ps(w.odd, _mm512_set1_ps(x[1]), sum.rows);
  }
  // each row has its own two inputs, a dword of x
  static void add_each(Sum& sum, const Weights& w, __m512i x) {
    const Weights inputs = weights({{x}});
    sum.rows = _mm512_fmadd_ps(w.even, inputs.even, sum.rows);
    sum.rows = _mm512_fmadd_ps(w.odd, inputs.odd, sum.rows);
  }
  static __m512 total(const Sum& sum) { return sum.rows; }
};

// float32 values: two registers, of rows 0 to 7 and 8 to 15, lane 2 n + j = (row n, input j).
struct Float32ByFma {
  using Value = float;
  using X = float;
  static constexpr int kRegisters = 2;
  static constexpr int kPanels = 1;

  struct Sum {
    __m512 low, high;
  };
  static Sum zero() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  struct Weights {
    __m512 low, high;
  };
  static Weights weights(Tile<2> tile) {
    return {_mm512_castsi512_ps(tile.part[0]), _mm512_castsi512_ps(tile.part[1])};
  }
  static void add(Sum& sum, const Weights& w, const X* x) {
    double both;
    __builtin_memcpy(&both, x, sizeof both);
    const __m512 pair = _mm512_castpd_ps(_mm512_set1_pd(both));
    sum.low = _mm512_fmadd_ps(w.low, pair, sum.low);
    sum.high = _mm512_fmadd_ps(w.high, pair, sum.high);
  }
  static __m512 total(const Sum& sum) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(sum.low, even, sum.high),
                         _mm512_permutex2var_ps(sum.low, odd, sum.high));
  }
  static void store(void* y, int64_t offset, __m512 sums, __mmask16 rows) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + offset, rows, sums);
  }
  static __m512 load_bias(const void* bias, int64_t row, __mmask16 rows) {
    return _mm512_maskz_loadu_ps(rows, static_cast<const float*>(bias) + row);
  }
};

// float16 values: multiplied as float32.
struct Float16ByFma : Float32ByFma {
  using Value = uint16_t;

  static void store(void* y, int64_t offset, __m512 sums, __mmask16 rows) {
    const __m256i halves = _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<Value*>(y) + offset, rows, halves);
  }
  static __m512 load_bias(const void* bias, int64_t row, __mmask16 rows) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rows, static_cast<const Value*>(bias) + row));
  }
};

inline __m512i widen_halves(const uint16_t* values) {
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
}

}  // namespace
}  // namespace sparsekern
