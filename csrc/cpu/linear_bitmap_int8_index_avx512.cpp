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

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

struct Step {
  __m512i places, values;
};

// A panel's weights, step by step.
struct Cursor {
  const uint64_t* masks;
  const uint64_t* masks_end;
  const uint8_t* places;
  const uint8_t* places_end;
  const int8_t* values;

  Cursor(const BitmapIndexWeight& weight, int64_t panel)
      : masks(weight.masks + weight.step_offsets[panel]), masks_end(weight.masks + weight.step_offsets[panel + 1]),
        places(weight.places + weight.value_offsets[panel]), places_end(weight.places + weight.value_offsets[panel + 1]),
        values(static_cast<const int8_t*>(weight.values) + weight.value_offsets[panel]) {}

  // steps of a window, which may lie
  int64_t count(int64_t steps) const {
    steps = steps < kMostSteps ? steps : kMostSteps;
    return steps < masks_end - masks ? steps : masks_end - masks;
  }

  inline Step next() {
    const uint64_t mask = *masks++;
    prefetch(places);
    prefetch(values);
    Step step;
    step.places = _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(places));
    step.values = _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(values));
    const int64_t kept = __builtin_popcountll(mask);
    // masks that lie: no step starts behind the panel's end, which kIndexTail covers
    const int64_t moved = kept < places_end - places ? kept : places_end - places;
    places += moved;
    values += moved;
    return step;
  }
};

// kRows rows of bytes of one window.
template <int kRows>
struct Window {
  __m512i low[kRows], high[kRows];
  explicit Window(const uint8_t* x) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      low[r] = _mm512_loadu_si512(x + r * kWindowInputs);
      high[r] = _mm512_loadu_si512(x + r * kWindowInputs + 64);
    }
  }
};

template <int kRows>
inline void add(const Window<kRows>& window, const Step& step, __m512i* sums) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r] = dot(sums[r], _mm512_permutex2var_epi8(window.low[r], step.places, window.high[r]), step.values);
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
  Cursor cursor(weight, panel);
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
      const int64_t count = cursor.count(steps[w]);
      prefetch(cursor.masks);
      int64_t s = 0;
      for (; s + 2 <= count; s += 2) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const Step step = cursor.next();
          weights[c] = dot(weights[c], ones, step.values);
          add(window, step, sums[c]);
        }
      }
      if (s < count) {
        const Step step = cursor.next();
        weights[0] = dot(weights[0], ones, step.values);
        add(window, step, sums[0]);
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

// Adds what a window's steps contribute to sums [kIndexRows].
void multiply(const Step* steps, int64_t count, const uint8_t* x, __m512i* totals) {
  const Window<kIndexRows> window(x);
  __m512i sums[2][kIndexRows];
#pragma GCC unroll 4
  for (int r = 0; r < kIndexRows; ++r) {
    sums[0][r] = totals[r];
    sums[1][r] = _mm512_setzero_si512();
  }
  int64_t s = 0;
  for (; s + 2 <= count; s += 2) {
    add(window, steps[s], sums[0]);
    add(window, steps[s + 1], sums[1]);
  }
  if (s < count) add(window, steps[s], sums[0]);
#pragma GCC unroll 4
  for (int r = 0; r < kIndexRows; ++r) totals[r] = _mm512_add_epi32(sums[0][r], sums[1][r]);
}

// More rows of bytes: a window is expanded once, for all of them.
void panel_wide(const Int8IndexCall& call, const Int8Group* groups, int64_t count, int64_t panel) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t windows = window_count(weight);
  const uint16_t* counts = weight.steps + panel * windows;
  const __m512i ones = _mm512_set1_epi8(1);
  Cursor cursor(weight, panel);
  Step steps[kMostSteps];
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
    for (int64_t w = segment.first / kWindowInputs; w < segment.end / kWindowInputs; ++w) {
      const int64_t here = cursor.count(counts[w]);
      prefetch(cursor.masks);
      for (int64_t s = 0; s < here; ++s) {
        steps[s] = cursor.next();
        weights = dot(weights, ones, steps[s].values);
      }
      for (int64_t g = 0; g < count; ++g) {
        const int64_t rows = index_byte_rows(groups[g].tokens * groups[g].planes);
        for (int64_t r = 0; r < rows; r += kIndexRows) {
          multiply(steps, here, groups[g].rows + (w * rows + r) * kWindowInputs, sums[g] + r);
        }
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
  const int64_t rows = count == 1 ? index_byte_rows(groups->tokens * groups->planes) : kMostByteRows;
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
      uint8_t* target = group.rows + (i / kWindowInputs * rows + t * group.planes) * kWindowInputs + i % kWindowInputs;
      for (int64_t p = 0; p < group.planes; ++p) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + p * kWindowInputs), plane_of(integers, p, group.planes));
      }
    }
  }
  for (int64_t w = 0; w < windows; ++w) {
    const int64_t filled = group.tokens * group.planes;
    __builtin_memset(group.rows + (w * rows + filled) * kWindowInputs, 0,
                     static_cast<size_t>((rows - filled) * kWindowInputs));
  }
}

}  // namespace

const LinearBitmapInt8Index kLinearBitmapInt8IndexAvx512 = {pack, linear};

}  // namespace sparsekern

#endif
