// What the int8 products share on AVX-512: tokens as planes of bytes, their sums, and y. Included after the target pragma;
// no STL here, as in linear_bitmap_avx512.h.
#pragma once

#include "bf16_avx512.h"
#include "linear_bitmap_int8.h"

namespace sparsekern {
namespace {

// sum + the products of four unsigned bytes of x with four signed ones of w. Written out because GCC 12 copies every sum
// before and after the intrinsic, more sums than there are registers.
inline __m512i dot(__m512i sum, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

inline __m512 load_as(const void* source, DType dtype, int64_t offset, __mmask16 lanes) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(source) + offset);
  return load_bf16(static_cast<const uint16_t*>(source) + offset, lanes);
}

inline void store_as(void* target, DType dtype, int64_t offset, __m512 x, __mmask16 lanes) {
  if (dtype == DType::kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(target) + offset, lanes, x);
  store_bf16(static_cast<uint16_t*>(target) + offset, x, lanes);
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(count < 0 ? 0 : count > 16 ? 16 : count)));
}

Rounding rounding_of_token(const void* x, DType dtype, int64_t offset, int64_t in_features) {
  __m512 most = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t i = 0; i < in_features; i += 16) {
    const __m512 size = _mm512_abs_ps(load_as(x, dtype, offset + i, first_lanes(in_features - i)));
    wrong = static_cast<__mmask16>(wrong | _mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ));
    most = _mm512_max_ps(most, size);
    sum = _mm512_add_ps(sum, size);
  }
  return rounding_of(_mm512_reduce_max_ps(most), _mm512_reduce_add_ps(sum), wrong == 0, dtype, in_features);
}

// How each token of a group becomes integers, and with it planes and scale of the group.
void round_tokens(const void* x, DType dtype, int64_t in_features, Int8Group& group, Rounding* rounding) {
  group.planes = 1;
  for (int64_t t = 0; t < group.tokens; ++t) {
    rounding[t] = rounding_of_token(x, dtype, (group.first_token + t) * in_features, in_features);
    group.scale[t] = rounding[t].scale;
    group.planes = rounding[t].planes > group.planes ? rounding[t].planes : group.planes;
  }
}

// 16 inputs as bytes of plane p.
inline __m128i plane_of(__m512i integers, int64_t p, int64_t planes) {
  return _mm512_cvtepi32_epi8(_mm512_srli_epi32(integers, static_cast<unsigned>(8 * (planes - 1 - p))));
}

inline __m512i as_integers(__m512 x, const Rounding& rounding) {
  const __m512i most = _mm512_set1_epi32((1 << (8 * rounding.planes - 1)) - 1);
  return _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(rounding.factor))), most);
}

// Inputs that share a scale, in parts whose sums fit into 32 bits.
struct Segment {
  int64_t first, end;
  const float* scale;  // [kPanelRows]
};

// Calls function for the parts of 0 to inputs - 1, of a panel whose scales are [groups, kPanelRows].
template <class Function>
void each_segment(int64_t inputs, int64_t group_size, const float* scales, Function&& function) {
  for (int64_t first = 0; first < inputs;) {
    const int64_t group = first / group_size;
    int64_t end = (group + 1) * group_size;
    end = end < inputs ? end : inputs;
    end = end < first + kMostSummed ? end : first + kMostSummed;
    function(Segment{first, end, scales + group * kPanelRows});
    first = end;
  }
}

// The sum of a token's rows of bytes: exact in double, so that it does not depend on the planes of its neighbours.
inline __m512 combine(const __m512i* sums, int64_t planes, __m512i weights) {
  const __m512i signed_digit = _mm512_sub_epi32(sums[0], _mm512_slli_epi32(weights, 7));
  __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(signed_digit));
  __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(signed_digit, 1));
  for (int64_t p = 1; p < planes; ++p) {
    const __m512d base = _mm512_set1_pd(256.0);
    low = _mm512_fmadd_pd(low, base, _mm512_cvtepi32_pd(_mm512_castsi512_si256(sums[p])));
    high = _mm512_fmadd_pd(high, base, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sums[p], 1)));
  }
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

}  // namespace
}  // namespace sparsekern
