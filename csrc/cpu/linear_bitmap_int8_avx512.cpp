// linear_bitmap_int8 on AVX-512 with VBMI2 and VNNI: one expansion turns a mask and the kept integers behind it into 16
// rows by 4 inputs, a row to each lane, and one instruction multiplies them with a byte of each of 4 inputs. Bytes of x
// are unsigned there, so the weights' own sums are kept beside the products, to take the offset of x away.
//
// A panel is expanded once for 8 tokens straight from the register, or for 64 tokens chunk by chunk through L1. No STL
// here: a weak symbol compiled for AVX-512 could replace the baseline's.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,fma,popcnt,bmi2")

#include "int8_planes_avx512.h"

namespace sparsekern {
namespace {

constexpr int64_t kPrefetchBytes = 8192;
// expanded weights in half of L1
constexpr int64_t kChunkSteps = 256;
// groups of tokens whose sums stay in L1 beside them, and whose bytes of x stay in L2
constexpr int64_t kWideGroups = 8;

// Inlined always: GCC 12 finds that a function which only prefetches does nothing, and may drop its calls.
[[gnu::always_inline]] inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

inline __m512i expand_step(uint64_t mask, const int8_t* values) {
  return _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(values));
}

inline __m512i broadcast(const uint8_t* x) {
  int four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

void pack(const void* x, DType dtype, int64_t in_features, Int8Group& group) {
  Rounding rounding[kGroupTokens];
  round_tokens(x, dtype, in_features, group, rounding);
  const int64_t rows = byte_rows(group.tokens * group.planes);
  const __m512i offset = _mm512_set1_epi32(1 << (8 * group.planes - 1));
  for (int64_t t = 0; t < group.tokens; ++t) {
    const int64_t first = (group.first_token + t) * in_features;
    uint8_t* target = group.rows + t * group.planes * kStepInputs;
    for (int64_t i = 0; i < (in_features + kInt8BlockInputs - 1) / kInt8BlockInputs * kInt8BlockInputs; i += 16) {
      const __m512 wide = load_as(x, dtype, first + i, first_lanes(in_features - i));
      const __m512i integers = _mm512_add_epi32(as_integers(wide, rounding[t]), offset);
      for (int64_t p = 0; p < group.planes; ++p, target += kStepInputs) {
        const __m128i bytes = plane_of(integers, p, group.planes);
        alignas(16) uint32_t steps[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(steps), bytes);
        for (int64_t s = 0; s < 4; ++s) __builtin_memcpy(target + s * rows * kStepInputs, &steps[s], 4);
      }
      target += 4 * rows * kStepInputs - group.planes * kStepInputs;
    }
  }
  for (int64_t row = group.tokens * group.planes; row < rows; ++row) {
    uint8_t* target = group.rows + row * kStepInputs;
    for (int64_t step = 0; step < (in_features + kInt8BlockInputs - 1) / kInt8BlockInputs * kBlockMasks; ++step) {
      __builtin_memset(target + step * rows * kStepInputs, 0, kStepInputs);
    }
  }
}

struct Panel {
  const uint64_t* masks;
  const int8_t* values;
  const int8_t* end;
  const float* scales;
  int64_t steps;
  int64_t row;
  __mmask16 rows;

  Panel(const BitmapInt8Weight& weight, int64_t panel)
      : masks(weight.masks + panel * block_count(weight) * kBlockMasks),
        values(weight.values + weight.panel_offsets[panel]),
        end(weight.values + weight.panel_offsets[panel + 1]),
        scales(weight.scales + panel * scale_groups(weight) * kPanelRows),
        steps(block_count(weight) * kBlockMasks),
        row(panel * kPanelRows),
        rows(first_lanes(weight.out_features - row)) {}
};

template <int size>
struct Rows {
  static constexpr int kSize = size;
};

// Calls function with the number of rows of bytes as a compile-time number.
template <class Function>
void with_rows(int64_t rows, Function&& function) {
  switch (rows) {
    case 2: return function(Rows<2>{});
    case 3: return function(Rows<3>{});
    case 4: return function(Rows<4>{});
    case 6: return function(Rows<6>{});
    case 8: return function(Rows<8>{});
    case 12: return function(Rows<12>{});
    case 16: return function(Rows<16>{});
    default: return function(Rows<kMostByteRows>{});
  }
}

// One group of tokens: the expanded weights go from the register straight into the sums.
template <int kRows>
void panel_direct(const BitmapInt8Weight& weight, const Panel& panel, const Int8Group& group, const void* bias, void* y) {
  // a lone sum would wait for itself: a product takes four cycles
  constexpr int kChains = kRows <= 4 ? 4 : kRows <= 8 ? 2 : 1;
  static_assert(kChains <= kGuardMasks, "see kTailBytes");
  const __m512i ones = _mm512_set1_epi8(1);
  __m512 totals[kGroupTokens];
  for (auto& total : totals) total = _mm512_setzero_ps();
  const int8_t* values = panel.values;
  const uint8_t* x = group.rows;
  each_segment(panel.steps * kStepInputs, weight.group_size, panel.scales, [&](const Segment& segment) {
    const int64_t first_step = segment.first / kStepInputs, end_step = segment.end / kStepInputs;
    __m512i sums[kChains][kRows], weights[kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      weights[c] = _mm512_setzero_si512();
#pragma GCC unroll 24
      for (auto& sum : sums[c]) sum = _mm512_setzero_si512();
    }
    const uint64_t* masks = panel.masks + first_step;
    for (int64_t step = first_step; step < end_step; step += kGuardMasks) {
      prefetch(masks);
      values = values < panel.end ? values : panel.end;
#pragma GCC unroll 4
      for (int64_t s = 0; s < kGuardMasks; ++s) {
        const int c = static_cast<int>(s % kChains);
        uint64_t mask = *masks++;
        // loaded once, not by each that needs it: a step has more loads than anything else
        __asm__("" : "+r"(mask));
        // two steps of a weight at 50 % are a cache line
        if (s % 2 == 0) prefetch(values);
        const __m512i w = expand_step(mask, values);
        values += __builtin_popcountll(mask);
        weights[c] = dot(weights[c], ones, w);
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) sums[c][r] = dot(sums[c][r], broadcast(x + r * kStepInputs), w);
        x += kRows * kStepInputs;
      }
    }
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) {
      weights[0] = _mm512_add_epi32(weights[0], weights[c]);
#pragma GCC unroll 24
      for (int r = 0; r < kRows; ++r) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[c][r]);
    }
    const __m512 scale = _mm512_loadu_ps(segment.scale);
    for (int64_t t = 0; t < group.tokens; ++t) {
      totals[t] = _mm512_fmadd_ps(combine(sums[0] + t * group.planes, group.planes, weights[0]), scale, totals[t]);
    }
  });
  const __m512 b = bias != nullptr ? load_as(bias, weight.dtype, panel.row, panel.rows) : _mm512_setzero_ps();
  for (int64_t t = 0; t < group.tokens; ++t) {
    const __m512 result = _mm512_fmadd_ps(totals[t], _mm512_set1_ps(group.scale[t]), b);
    store_as(y, weight.dtype, (group.first_token + t) * weight.out_features + panel.row, result, panel.rows);
  }
}

// Adds what `count` expanded steps contribute to sums [kRows, kPanelRows].
template <int kRows>
void multiply(const __m512i* tiles, int64_t count, const uint8_t* x, __m512i* totals) {
  __m512i sums[kRows];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) sums[r] = totals[r];
  for (int64_t q = 0; q < count; ++q) {
    const __m512i w = tiles[q];
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) sums[r] = dot(sums[r], broadcast(x + r * kStepInputs), w);
    x += kRows * kStepInputs;
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) totals[r] = sums[r];
}

// More tokens than registers: a chunk of the panel is expanded into L1 and multiplied with group after group.
void panel_wide(const BitmapInt8Weight& weight, const Panel& panel, const Int8Group* groups, int64_t count,
                const void* bias, void* y) {
  alignas(64) __m512i tiles[kChunkSteps];
  __m512i sums[kWideGroups][kMostByteRows];
  __m512 totals[kWideGroups][kGroupTokens];
  for (auto& group : totals) {
    for (auto& total : group) total = _mm512_setzero_ps();
  }
  const __m512i ones = _mm512_set1_epi8(1);
  const int8_t* values = panel.values;
  each_segment(panel.steps * kStepInputs, weight.group_size, panel.scales, [&](const Segment& segment) {
    const int64_t first_step = segment.first / kStepInputs, end_step = segment.end / kStepInputs;
    for (int64_t g = 0; g < count; ++g) {
      for (auto& sum : sums[g]) sum = _mm512_setzero_si512();
    }
    __m512i weights = _mm512_setzero_si512();
    for (int64_t first = first_step; first < end_step; first += kChunkSteps) {
      const int64_t steps = end_step - first < kChunkSteps ? end_step - first : kChunkSteps;
      for (int64_t q = 0; q < steps; ++q) {
        if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
        const uint64_t mask = panel.masks[first + q];
        prefetch(panel.masks + first + q);
        prefetch(values);
        tiles[q] = expand_step(mask, values);
        values += __builtin_popcountll(mask);
        weights = dot(weights, ones, tiles[q]);
      }
      for (int64_t g = 0; g < count; ++g) {
        with_rows(byte_rows(groups[g].tokens * groups[g].planes), [&](auto known) {
          constexpr int kRows = decltype(known)::kSize;
          multiply<kRows>(tiles, steps, groups[g].rows + first * kRows * kStepInputs, sums[g]);
        });
      }
    }
    const __m512 scale = _mm512_loadu_ps(segment.scale);
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t t = 0; t < groups[g].tokens; ++t) {
        const __m512 sum = combine(sums[g] + t * groups[g].planes, groups[g].planes, weights);
        totals[g][t] = _mm512_fmadd_ps(sum, scale, totals[g][t]);
      }
    }
  });
  const __m512 b = bias != nullptr ? load_as(bias, weight.dtype, panel.row, panel.rows) : _mm512_setzero_ps();
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t t = 0; t < groups[g].tokens; ++t) {
      const __m512 result = _mm512_fmadd_ps(totals[g][t], _mm512_set1_ps(groups[g].scale[t]), b);
      store_as(y, weight.dtype, (groups[g].first_token + t) * weight.out_features + panel.row, result, panel.rows);
    }
  }
}

void linear(const BitmapInt8Weight& weight, const Int8Group* groups, int64_t count, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  if (count == 1) {
    with_rows(byte_rows(groups->tokens * groups->planes), [&](auto known) {
      constexpr int kRows = decltype(known)::kSize;
      for (int64_t p = first_panel; p < end_panel; ++p) {
        panel_direct<kRows>(weight, Panel(weight, p), *groups, bias, y);
      }
    });
    return;
  }
  // tokens outside, panels inside: the x of 64 tokens stays in L2, and the weight is expanded once for all of them
  for (int64_t group = 0; group < count; group += kWideGroups) {
    const int64_t here = count - group < kWideGroups ? count - group : kWideGroups;
    for (int64_t p = first_panel; p < end_panel; ++p) {
      panel_wide(weight, Panel(weight, p), groups + group, here, bias, y);
    }
  }
}

void expand(const BitmapInt8Weight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  auto* target = static_cast<char*>(dense);
  for (int64_t p = first_panel; p < end_panel; ++p) {
    const Panel panel(weight, p);
    const int64_t rows = __builtin_popcount(panel.rows);
    const int8_t* values = panel.values;
    for (int64_t first = 0; first < panel.steps; first += kBlockMasks) {
      alignas(64) int8_t tiles[kBlockMasks][kPanelRows][kStepInputs];
      for (int64_t q = 0; q < kBlockMasks; ++q) {
        if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
        const uint64_t mask = panel.masks[first + q];
        _mm512_store_si512(tiles[q], expand_step(mask, values));
        values += __builtin_popcountll(mask);
      }
      const int64_t input = first * kStepInputs;
      const float* scale = panel.scales + input / weight.group_size * kPanelRows;
      for (int64_t r = 0; r < rows; ++r) {
        const __m512 s = _mm512_set1_ps(scale[r]);
        for (int64_t i = 0; i < kInt8BlockInputs && input + i < weight.in_features; i += 16) {
          alignas(16) int8_t integers[16];
          for (int64_t step = 0; step < 4; ++step) {
            __builtin_memcpy(integers + step * kStepInputs, tiles[i / kStepInputs + step][r], kStepInputs);
          }
          const __m128i narrow = _mm_load_si128(reinterpret_cast<const __m128i*>(integers));
          // no -0.0
          const __m512 wide =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow)), s, _mm512_setzero_ps());
          store_as(target, weight.dtype, r * weight.in_features + input + i, wide,
                   first_lanes(weight.in_features - input - i));
        }
      }
    }
    target += rows * weight.in_features * value_bytes(weight.dtype);
  }
}

}  // namespace

const LinearBitmapInt8Panels kLinearBitmapInt8Avx512 = {pack, linear, expand};

}  // namespace sparsekern

#endif
