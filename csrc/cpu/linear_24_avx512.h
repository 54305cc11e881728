// linear_24 on AVX-512 with VBMI. Nothing is expanded: of each group of four inputs a register holds the two values of 16
// rows, and a shuffle of 32 inputs of x by their positions brings each value its input. Two weights a row are one
// multiplication, so this is half of the dense arithmetic; the positions of a group are made into the shuffle's indices
// once for all tokens. Included by one file an instruction set, after its target pragma. No STL here, as in
// panel_kinds_avx512.h.
#pragma once

#include "linear_24.h"
#include "panel_kinds_avx512.h"

namespace sparsekern {
namespace {

// as far ahead as linear_bitmap reads, see panel_linear_avx512.h; of positions there are an eighth of the bytes
constexpr int64_t kValuesAheadBytes = 8192;
constexpr int64_t kPositionsAheadBytes = 1024;

// The inputs of 16 rows by 2 values as words of the block's 32: bits 2 i and 2 i + 1 of `positions` are those of word i.
inline __m512i indices(uint64_t positions, int64_t group) {
  // byte 2 i of every eight takes the bits from 2 i on
  const __m512i shifts = _mm512_set_epi64(0x3e3e3c3c3a3a3838, 0x3636343432323030, 0x2e2e2c2c2a2a2828, 0x2626242422222020,
                                          0x1e1e1c1c1a1a1818, 0x1616141412121010, 0x0e0e0c0c0a0a0808, 0x0606040402020000);
  const __m512i bits = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(static_cast<int64_t>(positions)));
  // (bits & 3) | 4 group
  return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x00030003),
                                   _mm512_set1_epi32(static_cast<int>(group * 0x00040004)), 0xea);
}

// Tokens first_token to first_token + kTokens - 1 by one panel; `tokens` of them exist, at least one.
template <class Kind, int kTokens>
void panel_24(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t panel, int64_t all_tokens,
              int64_t first_token, int64_t tokens) {
  // VDPBF16PS takes six cycles and two start in each: fewer sums than twelve would wait for themselves
  constexpr int kChains = kTokens <= 2 ? 4 : kTokens <= 4 ? 2 : 1;
  typename Kind::Sum sums[kChains][kTokens];
#pragma GCC unroll 4
  for (auto& chain : sums) {
#pragma GCC unroll 24
    for (auto& sum : chain) sum = Kind::zero();
  }
  const int64_t blocks = blocks_24(weight.in_features);
  const char* values = static_cast<const char*>(weight.values) + panel * blocks * kGroups24 * 64;
  const uint64_t* positions = weight.positions + panel * blocks * kGroups24;
  x += first_token * kBlockInputs;
  // what is missing is the last token again
  const int64_t last = tokens - 1;
  for (int64_t block = 0; block < blocks; ++block) {
    _mm_prefetch(reinterpret_cast<const char*>(positions) + kPositionsAheadBytes, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int group = 0; group < kGroups24; ++group) {
      _mm_prefetch(values + kValuesAheadBytes, _MM_HINT_T0);
      const typename Kind::Weights w = Kind::weights({{_mm512_loadu_si512(values)}});
      const __m512i index = indices(*positions, group);
#pragma GCC unroll 24
      for (int token = 0; token < kTokens; ++token) {
        const __m512i inputs = _mm512_loadu_si512(x + (token < last ? token : last) * kBlockInputs);
        Kind::add_each(sums[group % kChains][token], w, _mm512_permutexvar_epi16(index, inputs));
      }
      values += 64;
      ++positions;
    }
    x += all_tokens * kBlockInputs;
  }
  const int64_t row = panel * kPanelRows, left = weight.out_features - row;
  const auto rows = static_cast<__mmask16>(left < kPanelRows ? (1u << left) - 1 : 0xffffu);
  const __m512 b = bias == nullptr ? _mm512_setzero_ps() : Kind::load_bias(bias, row, rows);
#pragma GCC unroll 24
  for (int token = 0; token < kTokens; ++token) {
    __m512 sum = Kind::total(sums[0][token]);
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) sum = _mm512_add_ps(sum, Kind::total(sums[chain][token]));
    if (token < tokens) {
      Kind::store(y, (first_token + token) * weight.out_features + row, _mm512_add_ps(sum, b), rows);
    }
  }
}

template <class Kind>
void panels_24(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
               int64_t first_panel, int64_t end_panel) {
  const Turns turns(tokens);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    for (int64_t turn = 0; turn < turns.count; ++turn) {
      const int64_t first = turns.first(turn), here = turns.first(turn + 1) - first;
      const auto run = here == 1    ? panel_24<Kind, 1>
                       : here == 2  ? panel_24<Kind, 2>
                       : here <= 4  ? panel_24<Kind, 4>
                       : here <= 8  ? panel_24<Kind, 8>
                       : here <= 12 ? panel_24<Kind, 12>
                       : here <= 16 ? panel_24<Kind, 16>
                       : here <= 20 ? panel_24<Kind, 20>
                                    : panel_24<Kind, 24>;
      run(weight, x, bias, y, panel, tokens, first, here);
    }
  }
}

}  // namespace
}  // namespace sparsekern
