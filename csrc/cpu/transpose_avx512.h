// A square of 16 by 16 dwords in registers, transposed. Included after the target pragma.
#pragma once

#include <immintrin.h>

namespace sparsekern {
namespace {

// rows[i], dword j <-> rows[j], dword i
inline void transpose_dwords(__m512i* rows) {
  __m512i pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // quads[4 a + b], 128-bit lane c holds dword 4 c + b of rows 4 a to 4 a + 3
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i low_even = _mm512_shuffle_i32x4(quads[b], quads[4 + b], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(quads[b], quads[4 + b], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(quads[8 + b], quads[12 + b], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(quads[8 + b], quads[12 + b], 0xdd);
    rows[b] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    rows[8 + b] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    rows[4 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[12 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

}  // namespace
}  // namespace sparsekern
