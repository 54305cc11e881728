// Vectors of 8-bit, 16-bit and 32-bit values, expanded and compressed: what bitmap_rows and bitmap_panels do on AVX-512
// VBMI2. Included after the target pragma; no STL here, as in linear_bitmap_avx512.h.
#pragma once

#include "../ops.h"
#include "fresh_zero.h"

namespace sparsekern {
namespace {

struct Values8 {
  using Value = int8_t;
  using Mask = __mmask64;
  static constexpr int64_t kLanes = 64;
  static Mask first(int64_t count) { return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)); }
  static __m512i load(Mask lanes, const Value* source) { return _mm512_maskz_loadu_epi8(lanes, source); }
  static void store(Value* target, Mask lanes, __m512i x) { _mm512_mask_storeu_epi8(target, lanes, x); }
  static __m512i expand(Mask mask, __m512i x) { return _mm512_mask_expand_epi8(fresh_zero(), mask, x); }
  static __m512i compress(Mask mask, __m512i x) { return _mm512_mask_compress_epi8(fresh_zero(), mask, x); }
};

struct Values16 {
  using Value = uint16_t;
  using Mask = __mmask32;
  static constexpr int64_t kLanes = 32;
  static Mask first(int64_t count) { return static_cast<Mask>(_bzhi_u64(0xffffffffu, static_cast<unsigned>(count))); }
  static __m512i load(Mask lanes, const Value* source) { return _mm512_maskz_loadu_epi16(lanes, source); }
  static void store(Value* target, Mask lanes, __m512i x) { _mm512_mask_storeu_epi16(target, lanes, x); }
  static __m512i expand(Mask mask, __m512i x) { return _mm512_mask_expand_epi16(fresh_zero(), mask, x); }
  static __m512i compress(Mask mask, __m512i x) { return _mm512_mask_compress_epi16(fresh_zero(), mask, x); }
  static Mask nonzero(__m512i x) { return _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x7fff)); }
  static Mask not_finite(__m512i x, DType dtype) {
    const __m512i exponent = _mm512_set1_epi16(dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
  }
};

struct Values32 {
  using Value = uint32_t;
  using Mask = __mmask16;
  static constexpr int64_t kLanes = 16;
  static Mask first(int64_t count) { return static_cast<Mask>(_bzhi_u32(0xffffu, static_cast<unsigned>(count))); }
  static __m512i load(Mask lanes, const Value* source) { return _mm512_maskz_loadu_epi32(lanes, source); }
  static void store(Value* target, Mask lanes, __m512i x) { _mm512_mask_storeu_epi32(target, lanes, x); }
  static __m512i expand(Mask mask, __m512i x) { return _mm512_mask_expand_epi32(fresh_zero(), mask, x); }
  static __m512i compress(Mask mask, __m512i x) { return _mm512_mask_compress_epi32(fresh_zero(), mask, x); }
  static Mask nonzero(__m512i x) { return _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x7fffffff)); }
  static Mask not_finite(__m512i x, DType) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(x, exponent), exponent);
  }
};

// Reads `count` values at source and nothing behind them.
template <class Kind>
__m512i load_values(const typename Kind::Value* source, const typename Kind::Value* end, int64_t count) {
  return end - source >= Kind::kLanes ? _mm512_loadu_si512(source) : Kind::load(Kind::first(count), source);
}

// Writes `count` values at target, and what comes behind them as long as that is before end.
template <class Kind>
void store_values(typename Kind::Value* target, const typename Kind::Value* end, int64_t count, __m512i x) {
  if (end - target >= Kind::kLanes) {
    _mm512_storeu_si512(target, x);
  } else {
    Kind::store(target, Kind::first(count), x);
  }
}

inline int64_t count_ones_avx512(const uint8_t* bits, int64_t bytes) {
  __m512i ones = _mm512_setzero_si512();
  for (; bytes >= 64; bits += 64, bytes -= 64) {
    ones = _mm512_add_epi64(ones, _mm512_popcnt_epi64(_mm512_loadu_si512(bits)));
  }
  const __m512i rest = _mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(bytes)), bits);
  return _mm512_reduce_add_epi64(_mm512_add_epi64(ones, _mm512_popcnt_epi64(rest)));
}

}  // namespace
}  // namespace sparsekern
