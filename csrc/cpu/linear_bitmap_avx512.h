// linear_bitmap on AVX-512 F, BW, DQ and VL: an expansion turns a mask and the kept values behind it into 16 rows by 2
// inputs, which a register holds with a row to each lane, two with an input to each: no sum across lanes is needed before
// the end. Included by one file an instruction set, after its target pragma and after the expand_words of that set. No
// STL here: a weak symbol compiled for AVX-512 could replace the baseline's.
#pragma once

#include "fresh_zero.h"
#include "linear_bitmap.h"

namespace sparsekern {
namespace {

// measured on Zen 5, one thread: 9 GB/s without, 25 at 2 KB ahead, 28 to 32 at 4 KB, 36 at 8 KB, no more at 16 KB
constexpr int64_t kPrefetchBytes = 8192;

// expanded weights that fit into half of L1
constexpr int64_t kChunkBytes = 16384;
// tokens whose sums stay in L1 beside them
constexpr int64_t kWideTokens = 64;

inline void store_bf16(uint16_t* target, __m512 wide, __mmask16 rows) {
  // to nearest, ties to even; rounding up the bits of a NaN could make it infinite
  const __m512i bits = _mm512_castps_si512(wide);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
  _mm256_mask_storeu_epi16(target, rows, _mm512_cvtepi32_epi16(high));
}

inline __m512 load_bf16(const uint16_t* source, __mmask16 rows) {
  const __m512i words = _mm512_maskz_cvtepu16_epi32(rows, _mm256_maskz_loadu_epi16(rows, source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

// bfloat16 values: a mask expands to one register, dword n = (row n, input 0), (row n, input 1).
struct Bf16Values {
  using Value = uint16_t;
  static constexpr int kRegisters = 1;
  static constexpr int64_t kDirectTokens = 16;

  static void expand(uint32_t mask, const Value* values, __m512i* tile) {
    tile[0] = expand_words(mask, values);
  }
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
  static Weights weights(const __m512i* tile) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(tile[0], 16)),
            _mm512_castsi512_ps(_mm512_and_si512(tile[0], _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static void add(Sum& sum, const Weights& w, const X* x) {
    sum.rows = _mm512_fmadd_ps(w.even, _mm512_set1_ps(x[0]), sum.rows);
    sum.rows = _mm512_fmadd_ps(w.odd, _mm512_set1_ps(x[1]), sum.rows);
  }
  static __m512 total(const Sum& sum) { return sum.rows; }
};

// float32 values: two registers, of rows 0 to 7 and 8 to 15, lane 2 n + j = (row n, input j).
struct Float32ByFma {
  using Value = float;
  using X = float;
  static constexpr int kRegisters = 2;
  static constexpr int64_t kDirectTokens = 8;

  struct Sum {
    __m512 low, high;
  };
  static Sum zero() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  struct Weights {
    __m512 low, high;
  };
  static void expand(uint32_t mask, const Value* values, __m512i* tile) {
    const auto low = static_cast<__mmask16>(mask);
    const auto high = static_cast<__mmask16>(mask >> 16);
    tile[0] = _mm512_mask_expand_epi32(fresh_zero(), low, _mm512_loadu_si512(values));
    tile[1] = _mm512_mask_expand_epi32(fresh_zero(), high, _mm512_loadu_si512(values + __builtin_popcount(low)));
  }
  static Weights weights(const __m512i* tile) { return {_mm512_castsi512_ps(tile[0]), _mm512_castsi512_ps(tile[1])}; }
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

// float16 values: widened, then as float32.
struct Float16ByFma : Float32ByFma {
  using Value = uint16_t;

  static __m512 widen(const Value* values) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
  static void expand(uint32_t mask, const Value* values, __m512i* tile) {
    const auto low = static_cast<__mmask16>(mask);
    const auto high = static_cast<__mmask16>(mask >> 16);
    const __m512i second = _mm512_castps_si512(widen(values + __builtin_popcount(low)));
    tile[0] = _mm512_mask_expand_epi32(fresh_zero(), low, _mm512_castps_si512(widen(values)));
    tile[1] = _mm512_mask_expand_epi32(fresh_zero(), high, second);
  }
  static void store(void* y, int64_t offset, __m512 sums, __mmask16 rows) {
    const __m256i halves = _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<Value*>(y) + offset, rows, halves);
  }
  static __m512 load_bias(const void* bias, int64_t row, __mmask16 rows) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rows, static_cast<const Value*>(bias) + row));
  }
};

// What a panel works on. row and rows are outputs, the mask has a bit for each of them that exists.
template <class Kind>
struct Panel {
  const uint32_t* masks;
  const typename Kind::Value* values;
  const typename Kind::Value* end;
  int64_t masks_count;
  int64_t row;
  __mmask16 rows;
  int64_t out_features;

  Panel(const BitmapWeight& weight, int64_t panel)
      : masks(weight.masks + panel * block_count(weight) * kBlockMasks),
        values(static_cast<const typename Kind::Value*>(weight.values) + weight.panel_offsets[panel]),
        end(static_cast<const typename Kind::Value*>(weight.values) + weight.panel_offsets[panel + 1]),
        masks_count(block_count(weight) * kBlockMasks),
        row(panel * kPanelRows),
        rows(static_cast<__mmask16>(weight.out_features - row < kPanelRows ? (1u << (weight.out_features - row)) - 1
                                                                            : 0xffffu)),
        out_features(weight.out_features) {}
};

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

template <int size>
struct Group {
  static constexpr int kSize = size;
};

// Calls function with the group size as a compile-time number.
template <class Function>
void with_group(int64_t group, Function&& function) {
  switch (group) {
    case 1: return function(Group<1>{});
    case 2: return function(Group<2>{});
    case 3: return function(Group<3>{});
    case 4: return function(Group<4>{});
    case 6: return function(Group<6>{});
    case 8: return function(Group<8>{});
    case 12: return function(Group<12>{});
    default: return function(Group<kMaxGroup>{});
  }
}

// Few tokens: the expanded weights go from the register straight into the sums.
template <class Kind, int kGroup>
void panel_direct(const Panel<Kind>& panel, const typename Kind::X* x, const void* bias, void* y, int64_t tokens) {
  // a lone sum would wait for itself: the fused multiply-add takes four cycles
  constexpr int kChains = kGroup == 1 ? 4 : kGroup <= 4 ? 2 : 1;
  typename Kind::Sum sums[kChains][kGroup];
#pragma GCC unroll 4
  for (auto& chain : sums) {
#pragma GCC unroll 16
    for (auto& sum : chain) sum = Kind::zero();
  }
  const uint32_t* masks = panel.masks;
  const typename Kind::Value* values = panel.values;
  for (int64_t q = 0; q < panel.masks_count; q += kBlockMasks) {
    prefetch(masks);
    for (int64_t i = 0; i < kBlockMasks; i += kChains) {
      static_assert(kChains <= kGuardMasks, "see kTailBytes");
      values = values < panel.end ? values : panel.end;
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        __m512i tile[Kind::kRegisters];
        const uint32_t mask = *masks++;
        prefetch(values);
        Kind::expand(mask, values, tile);
        values += __builtin_popcount(mask);
        const typename Kind::Weights w = Kind::weights(tile);
#pragma GCC unroll 16
        for (int token = 0; token < kGroup; ++token) Kind::add(sums[chain][token], w, x + token * 2);
        x += kGroup * 2;
      }
    }
  }
  const __m512 b = bias != nullptr ? Kind::load_bias(bias, panel.row, panel.rows) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int token = 0; token < kGroup; ++token) {
    __m512 sum = Kind::total(sums[0][token]);
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) sum = _mm512_add_ps(sum, Kind::total(sums[chain][token]));
    if (token < tokens) Kind::store(y, token * panel.out_features + panel.row, _mm512_add_ps(sum, b), panel.rows);
  }
}

// Adds what `count` expanded masks contribute to sums [kGroup, kPanelRows].
template <class Kind, int kGroup>
void multiply(const __m512i* tiles, int64_t count, const typename Kind::X* x, float* totals) {
  typename Kind::Sum sums[kGroup];
#pragma GCC unroll 16
  for (auto& sum : sums) sum = Kind::zero();
  for (int64_t q = 0; q < count; ++q) {
    const typename Kind::Weights w = Kind::weights(tiles + q * Kind::kRegisters);
#pragma GCC unroll 16
    for (int token = 0; token < kGroup; ++token) Kind::add(sums[token], w, x + token * 2);
    x += kGroup * 2;
  }
#pragma GCC unroll 16
  for (int token = 0; token < kGroup; ++token) {
    float* total = totals + token * kPanelRows;
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), Kind::total(sums[token])));
  }
}

// More tokens than registers: a chunk of the panel is expanded into L1 and multiplied with group after group.
template <class Kind>
void panel_wide(const Panel<Kind>& panel, const typename Kind::X* x, const void* bias, void* y, int64_t tokens) {
  constexpr int64_t kChunk = kChunkBytes / 64 / Kind::kRegisters;
  alignas(64) __m512i tiles[kChunk * Kind::kRegisters];
  alignas(64) float totals[kWideTokens * kPanelRows];
  const __m512 b = bias != nullptr ? Kind::load_bias(bias, panel.row, panel.rows) : _mm512_setzero_ps();
  for (int64_t t = 0; t < kWideTokens; ++t) _mm512_store_ps(totals + t * kPanelRows, b);
  const typename Kind::Value* values = panel.values;
  for (int64_t first = 0; first < panel.masks_count; first += kChunk) {
    const int64_t count = panel.masks_count - first < kChunk ? panel.masks_count - first : kChunk;
    for (int64_t q = 0; q < count; ++q) {
      if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
      const uint32_t mask = panel.masks[first + q];
      prefetch(values);
      Kind::expand(mask, values, tiles + q * Kind::kRegisters);
      values += __builtin_popcount(mask);
    }
    const typename Kind::X* x_group = x;
    for (int64_t token = 0; token < tokens; token += kMaxGroup) {
      const int64_t group = group_size(tokens - token);
      with_group(group, [&](auto known) {
        constexpr int kGroup = decltype(known)::kSize;
        multiply<Kind, kGroup>(tiles, count, x_group + first * kGroup * 2, totals + token * kPanelRows);
      });
      x_group += panel.masks_count * group * 2;
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Kind::store(y, t * panel.out_features + panel.row, _mm512_load_ps(totals + t * kPanelRows), panel.rows);
  }
}

template <class Kind>
void linear(const BitmapWeight& weight, const void* packed_x, const void* bias, void* y, int64_t tokens,
            int64_t first_panel, int64_t end_panel) {
  const auto* x = static_cast<const typename Kind::X*>(packed_x);
  if (tokens <= Kind::kDirectTokens) {
    with_group(group_size(tokens), [&](auto known) {
      constexpr int kGroup = decltype(known)::kSize;
      for (int64_t p = first_panel; p < end_panel; ++p) {
        panel_direct<Kind, kGroup>(Panel<Kind>(weight, p), x, bias, y, tokens);
      }
    });
    return;
  }
  // tokens outside, panels inside: the x of 64 tokens stays in L2, and the weight is expanded once for all of them
  for (int64_t token = 0; token < tokens; token += kWideTokens) {
    const int64_t here = tokens - token < kWideTokens ? tokens - token : kWideTokens;
    const auto* x_here = x + token * block_count(weight) * kBlockInputs;
    auto* y_here = static_cast<typename Kind::Value*>(y) + token * weight.out_features;
    for (int64_t p = first_panel; p < end_panel; ++p) {
      panel_wide<Kind>(Panel<Kind>(weight, p), x_here, bias, y_here, here);
    }
  }
}

template <class Kind>
void expand(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  using Value = typename Kind::Value;
  auto* dense_panel = static_cast<Value*>(dense);
  for (int64_t p = first_panel; p < end_panel; ++p) {
    const Panel<Kind> panel(weight, p);
    const int64_t rows = __builtin_popcount(panel.rows);
    const Value* values = panel.values;
    for (int64_t first = 0; first < panel.masks_count; first += kBlockMasks) {
      alignas(64) __m512i tiles[kBlockMasks * Kind::kRegisters];
      for (int64_t q = 0; q < kBlockMasks; ++q) {
        if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
        const uint32_t mask = panel.masks[first + q];
        prefetch(values);
        Kind::expand(mask, values, tiles + q * Kind::kRegisters);
        values += __builtin_popcount(mask);
      }
      // [kBlockMasks, kPanelRows, 2]
      const auto* tile = reinterpret_cast<const Value*>(tiles);
      Value* target = dense_panel + first * 2;
      const int64_t inputs = weight.in_features - first * 2;
      for (int64_t r = 0; r < rows; ++r, tile += 2, target += weight.in_features) {
        if (inputs >= kBlockInputs) {
#pragma GCC unroll 16
          for (int64_t q = 0; q < kBlockMasks; ++q) {
            __builtin_memcpy(target + q * 2, tile + q * kPanelRows * 2, 2 * sizeof(Value));
          }
        } else {
          for (int64_t i = 0; i < inputs; ++i) target[i] = tile[i / 2 * kPanelRows * 2 + i % 2];
        }
      }
    }
    dense_panel += rows * weight.in_features;
  }
}

template <class Bf16Kind>
void linear_any(const BitmapWeight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16Kind>
                   : weight.dtype == DType::kFloat16 ? linear<Float16ByFma>
                                                     : linear<Float32ByFma>;
  run(weight, x, bias, y, tokens, first_panel, end_panel);
}

// sixteen bits are moved, whatever they mean
inline void expand_any(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kFloat32 ? expand<Float32ByFma> : expand<Bf16Values>;
  run(weight, dense, first_panel, end_panel);
}

}  // namespace
}  // namespace sparsekern
