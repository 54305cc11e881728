// linear_bitmap_int8_index on AVX-512 with VBMI, VBMI2 and VNNI. The 128 bytes of a window lie in two registers; a step's
// 64 places are looked up there at once, and one instruction multiplies what was found with the 64 integers beside it, a
// row to each lane. The bytes of x are unsigned there, so the weights' own sums are kept beside the products, to take the
// offset of x away. No STL here: a weak symbol compiled for AVX-512 could replace the baseline's.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,fma,popcnt,bmi2")

#include "int8_planes_avx512.h"
#include "linear_bitmap_int8_index.h"

namespace sparsekern {
namespace {

constexpr int64_t kPrefetchBytes = 8192;
// of a row, in a step
constexpr int64_t kStepWeights = 4;
constexpr int64_t kMostSteps = kWindowInputs / kStepWeights;
// groups of tokens for which a window is expanded once, and whose sums stay in L1
constexpr int64_t kWideGroups = 8;

// Inlined always: GCC 12 finds that a function which only prefetches does nothing, and may drop its calls.
[[gnu::always_inline]] inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

struct Step {
  __m512i places, values;
};

// A panel's weights. `at` counts those that were read.
struct PanelWeights {
  const uint64_t* masks;
  const uint64_t* masks_end;
  const uint8_t* places;
  const int8_t* values;
  int64_t end;

  PanelWeights(const BitmapIndexWeight& weight, int64_t panel)
      : masks(weight.masks + weight.step_offsets[panel]), masks_end(weight.masks + weight.step_offsets[panel + 1]),
        places(weight.places + weight.value_offsets[panel]),
        values(static_cast<const int8_t*>(weight.values) + weight.value_offsets[panel]),
        end(weight.value_offsets[panel + 1] - weight.value_offsets[panel]) {}

  // steps of a window, which may lie, from mask `mask` on
  int64_t count(int64_t steps, const uint64_t* mask) const {
    steps = steps < kMostSteps ? steps : kMostSteps;
    return steps < masks_end - mask ? steps : masks_end - mask;
  }

  // Expands a step and returns where the next one starts.
  [[gnu::always_inline]] int64_t expand(uint64_t mask, int64_t at, __m512i& step_places, __m512i& step_values) const {
    // loaded once, not by each that needs it
    __asm__("" : "+r"(mask));
    prefetch(places + at);
    prefetch(values + at);
    step_places = _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(places + at));
    step_values = _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(values + at));
    const int64_t next = at + __builtin_popcountll(mask);
    // masks that lie: no step starts behind the panel's end, which kIndexTail covers
    return next < end ? next : end;
  }
};

// kRows rows of bytes of one window.
template <int kRows>
struct Window {
  __m512i low[kRows], high[kRows];
  explicit Window(const uint8_t* x) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      low[r] = _mm512_loadu_si512(x + r * kWindowInputs);
      high[r] = _mm512_loadu_si512(x + r * kWindowInputs + 64);
    }
  }
};

template <int kRows>
inline void add(const Window<kRows>& window, __m512i places, __m512i values, __m512i* sums) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r] = dot(sums[r], _mm512_permutex2var_epi8(window.low[r], places, window.high[r]), values);
  }
}

inline void store(const Int8IndexCall& call, const Int8Group& group, int64_t t, int64_t panel, __m512 total) {
  const DType dtype = call.scales->dtype;
  const int64_t row = panel * kPanelRows, out_features = call.weight->out_features;
  const __mmask16 rows = first_lanes(out_features - row);
  const __m512 b = call.bias != nullptr ? load_as(call.bias, dtype, row, rows) : _mm512_setzero_ps();
  const __m512 result = _mm512_fmadd_ps(total, _mm512_set1_ps(group.scale[t]), b);
  store_as(call.y, dtype, (group.first_token + t) * out_features + row, result, rows);
}

inline const float* scales_of(const Int8IndexCall& call, int64_t panel) {
  const int64_t in_features = call.weight->in_features, size = call.scales->group_size;
  const int64_t groups = in_features == 0 ? 1 : (in_features + size - 1) / size;
  return call.scales->scales + panel * groups * kPanelRows;
}

// One group of few rows of bytes: the expanded weights go from the register straight into the sums.
template <int kRows>
void panel_direct(const Int8IndexCall& call, const Int8Group& group, int64_t panel) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t windows = window_count(weight);
  const uint16_t* steps = weight.steps + panel * windows;
  const __m512i ones = _mm512_set1_epi8(1);
  const PanelWeights weights_of(weight, panel);
  const uint64_t* masks = weights_of.masks;
  int64_t at = 0;
  __m512 totals[kGroupTokens];
  for (auto& total : totals) total = _mm512_setzero_ps();
  each_segment(windows * kWindowInputs, call.scales->group_size, scales_of(call, panel), [&](const Segment& segment) {
    __m512i sums[2][kRows], weights[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      weights[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (auto& sum : sums[c]) sum = _mm512_setzero_si512();
    }
    for (int64_t w = segment.first / kWindowInputs; w < segment.end / kWindowInputs; ++w) {
      const Window<kRows> window(group.rows + w * kRows * kWindowInputs);
      const int64_t count = weights_of.count(steps[w], masks);
      prefetch(masks);
      int64_t s = 0;
      for (; s + 2 <= count; s += 2) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          __m512i places, values;
          at = weights_of.expand(*masks++, at, places, values);
          weights[c] = dot(weights[c], ones, values);
          add(window, places, values, sums[c]);
        }
      }
      if (s < count) {
        __m512i places, values;
        at = weights_of.expand(*masks++, at, places, values);
        weights[0] = dot(weights[0], ones, values);
        add(window, places, values, sums[0]);
      }
    }
    weights[0] = _mm512_add_epi32(weights[0], weights[1]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[1][r]);
    const __m512 scale = _mm512_loadu_ps(segment.scale);
    for (int64_t t = 0; t < group.tokens; ++t) {
      totals[t] = _mm512_fmadd_ps(combine(sums[0] + t * group.planes, group.planes, weights[0]), scale, totals[t]);
    }
  });
  for (int64_t t = 0; t < group.tokens; ++t) store(call, group, t, panel, totals[t]);
}

// Windows that are expanded together: as many as have that many steps.
struct Chunk {
  // with the weights' and the tokens' bytes in L1
  static constexpr int64_t kSteps = 128;
  Step steps[kSteps];
  int64_t counts[kSteps];
  int64_t windows;

  // Those of first to end - 1, but for what is left to the next chunk, from `masks` and `at` on, which move. Returns `sum`
  // and the weights' own sums.
  __m512i fill(const PanelWeights& weights, const uint64_t*& masks, int64_t& at, const uint16_t* of_window,
               int64_t first, int64_t end, __m512i sum) {
    const __m512i ones = _mm512_set1_epi8(1);
    // a vector that is stored could change whatever has an address: these have none
    const PanelWeights panel = weights;
    const uint64_t* mask = masks;
    int64_t here = at, filled = 0, w = 0;
    for (; first + w < end && w < kSteps && filled + kMostSteps <= kSteps; ++w) {
      const int64_t count = panel.count(of_window[first + w], mask);
      prefetch(mask);
      for (int64_t s = filled; s < filled + count; ++s) {
        __m512i places, values;
        here = panel.expand(*mask++, here, places, values);
        steps[s].places = places;
        steps[s].values = values;
        sum = dot(sum, ones, values);
      }
      counts[w] = count;
      filled += count;
    }
    masks = mask;
    at = here;
    windows = w;
    return sum;
  }
};

// Adds what a chunk contributes to sums [kRows]; x is that of its first window.
template <int kRows>
void multiply(const Chunk& chunk, const uint8_t* x, __m512i* totals) {
  __m512i sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = totals[r];
  const Step* steps = chunk.steps;
  for (int64_t w = 0; w < chunk.windows; ++w, x += kRows * kWindowInputs) {
    const Window<kRows> window(x);
    for (const Step* end = steps + chunk.counts[w]; steps < end; ++steps) add(window, steps->places, steps->values, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) totals[r] = sums[r];
}

// More rows of bytes: windows are expanded once, for all of them.
void panel_wide(const Int8IndexCall& call, const Int8Group* groups, int64_t count, int64_t panel) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t windows = window_count(weight);
  const uint16_t* steps = weight.steps + panel * windows;
  const PanelWeights weights_of(weight, panel);
  const uint64_t* masks = weights_of.masks;
  int64_t at = 0;
  Chunk chunk;
  __m512i sums[kWideGroups][kMostByteRows];
  __m512 totals[kWideGroups][kGroupTokens];
  for (auto& group : totals) {
    for (auto& total : group) total = _mm512_setzero_ps();
  }
  each_segment(windows * kWindowInputs, call.scales->group_size, scales_of(call, panel), [&](const Segment& segment) {
    for (int64_t g = 0; g < count; ++g) {
      for (auto& sum : sums[g]) sum = _mm512_setzero_si512();
    }
    __m512i weights = _mm512_setzero_si512();
    const int64_t end = segment.end / kWindowInputs;
    for (int64_t w = segment.first / kWindowInputs; w < end; w += chunk.windows) {
      weights = chunk.fill(weights_of, masks, at, steps, w, end, weights);
      for (int64_t g = 0; g < count; ++g) {
        const int64_t rows = index_byte_rows(groups[g].tokens * groups[g].planes);
        const uint8_t* x = groups[g].rows;
        int64_t r = 0;
        for (; r + kIndexRows <= rows; r += kIndexRows, x += windows * kIndexRows * kWindowInputs) {
          multiply<kIndexRows>(chunk, x + w * kIndexRows * kWindowInputs, sums[g] + r);
        }
        if (r < rows) multiply<kFewIndexRows>(chunk, x + w * kFewIndexRows * kWindowInputs, sums[g] + r);
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
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t t = 0; t < groups[g].tokens; ++t) store(call, groups[g], t, panel, totals[g][t]);
  }
}

void linear(const Int8IndexCall& call, const Int8Group* groups, int64_t count, int64_t first_panel, int64_t end_panel) {
  const int64_t rows = count == 1 ? groups->tokens * groups->planes : kMostByteRows;
  const auto direct = rows == 2   ? panel_direct<2>
                      : rows == 3 ? panel_direct<3>
                      : rows == 4 ? panel_direct<4>
                                  : nullptr;
  if (direct != nullptr) {
    for (int64_t p = first_panel; p < end_panel; ++p) direct(call, *groups, p);
    return;
  }
  for (int64_t group = 0; group < count; group += kWideGroups) {
    const int64_t here = count - group < kWideGroups ? count - group : kWideGroups;
    for (int64_t p = first_panel; p < end_panel; ++p) panel_wide(call, groups + group, here, p);
  }
}

// Where row r of window w lies: rows by kIndexRows, then by what is left.
inline uint8_t* row_of(uint8_t* rows, int64_t r, int64_t count, int64_t w, int64_t windows) {
  const int64_t first = r / kIndexRows * kIndexRows;
  const int64_t together = count - first < kIndexRows ? count - first : kIndexRows;
  return rows + (first * windows + w * together + r - first) * kWindowInputs;
}

void pack(const void* x, DType dtype, int64_t in_features, Int8Group& group) {
  Rounding rounding[kGroupTokens];
  round_tokens(x, dtype, in_features, group, rounding);
  const int64_t rows = index_byte_rows(group.tokens * group.planes);
  const int64_t windows = (in_features + kWindowInputs - 1) / kWindowInputs;
  const __m512i offset = _mm512_set1_epi32(1 << (8 * group.planes - 1));
  for (int64_t t = 0; t < group.tokens; ++t) {
    const int64_t first = (group.first_token + t) * in_features;
    for (int64_t i = 0; i < windows * kWindowInputs; i += 16) {
      const __m512 wide = load_as(x, dtype, first + i, first_lanes(in_features - i));
      const __m512i integers = _mm512_add_epi32(as_integers(wide, rounding[t]), offset);
      for (int64_t p = 0; p < group.planes; ++p) {
        uint8_t* target = row_of(group.rows, t * group.planes + p, rows, i / kWindowInputs, windows) + i % kWindowInputs;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), plane_of(integers, p, group.planes));
      }
    }
  }
  for (int64_t r = group.tokens * group.planes; r < rows; ++r) {
    for (int64_t w = 0; w < windows; ++w) __builtin_memset(row_of(group.rows, r, rows, w, windows), 0, kWindowInputs);
  }
}

}  // namespace

const LinearBitmapInt8Index kLinearBitmapInt8IndexAvx512 = {pack, linear};

}  // namespace sparsekern

#endif
