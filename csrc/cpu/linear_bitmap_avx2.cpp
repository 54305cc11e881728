// linear_bitmap on AVX2: a mask becomes four registers of eight lanes, (row, input) each, widened to float32 as they are
// expanded; the two inputs of a row are added at the end. No STL here: see linear_bitmap_avx512.h.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")

#include "expand_avx2.h"
#include "linear_bitmap.h"
#include "panel_sums_avx2.h"

namespace sparsekern {
namespace {

// as far ahead as AVX-512 reads, see linear_bitmap_avx512.h
constexpr int64_t kPrefetchBytes = 8192;
// expanded weights that fit into a quarter of L1, as float32
constexpr int64_t kChunk = 8192 / 4 / kTileFloats;
// groups whose sums stay in L1 beside them
constexpr int64_t kWideGroups = 5;
// as many are worth expanding the weight twice: stored and loaded again it was slower
constexpr int64_t kDirectTokens = 6;

// What a panel works on.
template <class Kind>
struct Panel {
  const uint32_t* masks;
  const typename Kind::Value* values;
  const typename Kind::Value* end;
  int64_t masks_count;
  PanelRows rows;

  Panel(const BitmapWeight& weight, int64_t panel)
      : masks(weight.masks + panel * block_count(weight) * kBlockMasks),
        values(static_cast<const typename Kind::Value*>(weight.values) + weight.panel_offsets[panel]),
        end(static_cast<const typename Kind::Value*>(weight.values) + weight.panel_offsets[panel + 1]),
        masks_count(block_count(weight) * kBlockMasks),
        rows(weight.out_features, panel) {}
};

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

// Calls use(byte's number, expanded byte) for the four of a mask; returns the values after it.
template <class Kind, class Use>
inline const typename Kind::Value* expand_mask(uint32_t mask, const typename Kind::Value* values, Use&& use) {
  // counted from the mask each time, so that no byte waits for the one before it
  use(0, Kind::expand(mask, 0, values));
  use(1, Kind::expand(mask, 1, values + __builtin_popcount(mask << 24)));
  use(2, Kind::expand(mask, 2, values + __builtin_popcount(mask << 16)));
  use(3, Kind::expand(mask, 3, values + __builtin_popcount(mask << 8)));
  return values + __builtin_popcount(mask);
}

// The expanded weights go from the register straight into the sums of kTokens tokens. The x of a mask are x_step floats
// apart; y has the first token's row, and `tokens` of them.
template <class Kind, int kTokens>
void panel_direct(const Panel<Kind>& panel, const float* x, int64_t x_step, const void* bias, void* y, int64_t tokens) {
  // a lone token's sums would wait for themselves: the fused multiply-add takes four cycles
  constexpr int kChains = kTokens == 1 ? 2 : 1;
  __m256 sums[kChains][kTokens][kMaskBytes];
#pragma GCC unroll 2
  for (auto& chain : sums) {
#pragma GCC unroll 3
    for (auto& token : chain) {
#pragma GCC unroll 4
      for (auto& sum : token) sum = _mm256_setzero_ps();
    }
  }
  const uint32_t* masks = panel.masks;
  const typename Kind::Value* values = panel.values;
  for (int64_t q = 0; q < panel.masks_count; q += kBlockMasks) {
    prefetch(masks);
    for (int64_t i = 0; i < kBlockMasks; i += kGuardMasks) {
      values = values < panel.end ? values : panel.end;
#pragma GCC unroll 4
      for (int step = 0; step < kGuardMasks; ++step) {
        const int chain = step % kChains;
        if (sizeof(*values) == 4 || step % 2 == 0) prefetch(values);
        __m256 pairs[kTokens];
#pragma GCC unroll 3
        for (int token = 0; token < kTokens; ++token) pairs[token] = broadcast_pair(x + token * 2);
        values = expand_mask<Kind>(*masks++, values, [&](int byte, __m256 w) {
#pragma GCC unroll 3
          for (int token = 0; token < kTokens; ++token) {
            sums[chain][token][byte] = _mm256_fmadd_ps(w, pairs[token], sums[chain][token][byte]);
          }
        });
        x += x_step;
      }
    }
  }
#pragma GCC unroll 3
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
    for (int byte = 0; byte < kMaskBytes; ++byte) {
      if (kChains == 2) {
        sums[0][token][byte] = _mm256_add_ps(sums[0][token][byte], sums[kChains - 1][token][byte]);
      }
    }
    __m256 low, high;
    total(sums[0][token], low, high);
    if (token < tokens) store<Kind>(panel.rows, low, high, bias, y, token);
  }
}

// Adds what `count` expanded masks contribute to totals [kTokens, kPanelRows]; a mask's x are x_step floats apart.
template <int kTokens>
void multiply(const float* tiles, int64_t count, const float* x, int64_t x_step, float* totals) {
  __m256 sums[kTokens][kMaskBytes];
#pragma GCC unroll 3
  for (auto& token : sums) {
#pragma GCC unroll 4
    for (auto& sum : token) sum = _mm256_setzero_ps();
  }
  for (int64_t q = 0; q < count; ++q) {
    __m256 pairs[kTokens];
#pragma GCC unroll 3
    for (int token = 0; token < kTokens; ++token) pairs[token] = broadcast_pair(x + token * 2);
#pragma GCC unroll 4
    for (int byte = 0; byte < kMaskBytes; ++byte) {
      const __m256 w = _mm256_load_ps(tiles + byte * kLanes);
#pragma GCC unroll 3
      for (int token = 0; token < kTokens; ++token) {
        sums[token][byte] = _mm256_fmadd_ps(w, pairs[token], sums[token][byte]);
      }
    }
    tiles += kTileFloats;
    x += x_step;
  }
#pragma GCC unroll 3
  for (int token = 0; token < kTokens; ++token, totals += kPanelRows) {
    __m256 low, high;
    total(sums[token], low, high);
    _mm256_store_ps(totals, _mm256_add_ps(_mm256_load_ps(totals), low));
    _mm256_store_ps(totals + kLanes, _mm256_add_ps(_mm256_load_ps(totals + kLanes), high));
  }
}

// More tokens than registers: a chunk of the panel is expanded into L1 and multiplied with a few tokens after the other.
template <class Kind>
void panel_wide(const Panel<Kind>& panel, const float* x, const Groups& groups, int64_t first_group,
                int64_t end_group, const void* bias, void* y) {
  const int64_t first_token = groups.first(first_group);
  alignas(64) float tiles[kChunk * kTileFloats];
  alignas(64) float totals[kWideGroups * kMaxGroup * kPanelRows] = {};
  const typename Kind::Value* values = panel.values;
  for (int64_t first = 0; first < panel.masks_count; first += kChunk) {
    const int64_t count = panel.masks_count - first < kChunk ? panel.masks_count - first : kChunk;
    for (int64_t q = 0; q < count; ++q) {
      if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
      prefetch(values);
      values = expand_mask<Kind>(panel.masks[first + q], values, [&](int byte, __m256 w) {
        _mm256_store_ps(tiles + q * kTileFloats + byte * kLanes, w);
      });
    }
    for (int64_t turn = first_group; turn < end_group; ++turn) {
      const int64_t group = groups.size(turn);
      const float* x_here = x + (groups.first(turn) * panel.masks_count + first * group) * 2;
      float* totals_here = totals + (groups.first(turn) - first_token) * kPanelRows;
      for (int64_t done = 0; done < group;) {
        const int64_t here = next_tokens<kAtOnce>(group - done);
        const auto run = here == 1 ? multiply<1> : here == 2 ? multiply<2> : multiply<3>;
        run(tiles, count, x_here + done * 2, group * 2, totals_here + done * kPanelRows);
        done += here;
      }
    }
  }
  for (int64_t token = first_token; token < groups.first(end_group) && token < groups.tokens; ++token) {
    const float* sums = totals + (token - first_token) * kPanelRows;
    store<Kind>(panel.rows, _mm256_load_ps(sums), _mm256_load_ps(sums + kLanes), bias, y, token);
  }
}

template <class Kind>
void linear(const BitmapWeight& weight, const void* packed_x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  const auto* x = static_cast<const float*>(packed_x);
  if (groups.tokens <= kDirectTokens) {
    const int64_t group = groups.size(0);
    for (int64_t p = first_panel; p < end_panel; ++p) {
      const Panel<Kind> panel(weight, p);
      for (int64_t done = 0; done < group;) {
        const int64_t here = next_tokens<Kind::kAtOnce>(group - done);
        const auto run = here == 1   ? panel_direct<Kind, 1>
                         : here == 2 ? panel_direct<Kind, 2>
                                     : panel_direct<Kind, Kind::kAtOnce>;
        auto* y_here = static_cast<typename Kind::Value*>(y) + done * weight.out_features;
        run(panel, x + done * 2, group * 2, bias, y_here, groups.tokens - done);
        done += here;
      }
    }
    return;
  }
  // tokens outside, panels inside: the x of 60 tokens stays in L2, and the weight is expanded once for all of them
  for (int64_t group = 0; group < groups.count; group += kWideGroups) {
    const int64_t end = group + kWideGroups < groups.count ? group + kWideGroups : groups.count;
    for (int64_t p = first_panel; p < end_panel; ++p) {
      panel_wide<Kind>(Panel<Kind>(weight, p), x, groups, group, end, bias, y);
    }
  }
}

// Values of a width, moved as they are.
struct Words {
  using Value = uint16_t;
  static void expand(uint32_t mask, int byte, const Value* values, Value* target) {
    _mm_store_si128(reinterpret_cast<__m128i*>(target), expand_words(mask, byte, values));
  }
};

struct Dwords {
  using Value = uint32_t;
  static void expand(uint32_t mask, int byte, const Value* values, Value* target) {
    const __m256i wide = _mm256_castps_si256(expand_dwords(mask, byte, values));
    _mm256_store_si256(reinterpret_cast<__m256i*>(target), wide);
  }
};

template <class Kind>
void expand(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  using Value = typename Kind::Value;
  auto* dense_panel = static_cast<Value*>(dense);
  for (int64_t p = first_panel; p < end_panel; ++p) {
    const Panel<Kind> panel(weight, p);
    const Value* values = panel.values;
    for (int64_t first = 0; first < panel.masks_count; first += kBlockMasks) {
      alignas(64) Value tile[kBlockMasks * kPanelRows * 2];
      for (int64_t q = 0; q < kBlockMasks; ++q) {
        if (q % kGuardMasks == 0) values = values < panel.end ? values : panel.end;
        const uint32_t mask = panel.masks[first + q];
        prefetch(values);
#pragma GCC unroll 4
        for (int byte = 0; byte < kMaskBytes; ++byte) {
          Kind::expand(mask, byte, values, tile + (q * kMaskBytes + byte) * kLanes);
          values += __builtin_popcount(mask >> 8 * byte & 0xff);
        }
      }
      const int64_t inputs = weight.in_features - first * 2 < kBlockInputs ? weight.in_features - first * 2 : kBlockInputs;
      for (int64_t r = 0; r < panel.rows.count; ++r) {
        const Value* source = tile + r * 2;
        Value* target = dense_panel + r * weight.in_features + first * 2;
        int64_t i = 0;
        for (; i + 2 <= inputs; i += 2, source += kPanelRows * 2) __builtin_memcpy(target + i, source, 2 * sizeof(Value));
        if (i < inputs) target[i] = *source;
      }
    }
    dense_panel += panel.rows.count * weight.in_features;
  }
}

void linear_any(const BitmapWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16>
                   : weight.dtype == DType::kFloat16 ? linear<Fp16>
                                                     : linear<Float32>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

void expand_any(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kFloat32 ? expand<Dwords> : expand<Words>;
  run(weight, dense, first_panel, end_panel);
}

}  // namespace

const LinearBitmapPanels kLinearBitmapAvx2 = {DType::kFloat32, linear_any, expand_any};

}  // namespace sparsekern

#endif
