// linear_bitmap_index on AVX-512 with VBMI, VBMI2 and BF16. A window's 128 inputs lie in four registers, as high and as
// low bytes; a step's 64 places are looked up there, both bytes of each at once, and two instructions multiply what was
// found with the 64 values beside it, a row to each lane. A window is expanded once, for all tokens. No STL here: a weak
// symbol compiled for AVX-512 could replace the baseline's.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,fma,popcnt,bmi2")

#include "bf16_avx512.h"
#include "linear_bitmap_index.h"

namespace sparsekern {
namespace {

constexpr int64_t kPrefetchBytes = 8192;

// Inlined always: GCC 12 finds that a function which only prefetches does nothing, and may drop its calls.
[[gnu::always_inline]] inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
}

// The inputs of a window: high bytes, then low ones.
struct Window {
  __m512i high[2], low[2];
  explicit Window(const uint8_t* x) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm512_loadu_si512(x + 64 * i);
      low[i] = _mm512_loadu_si512(x + kWindowInputs + 64 * i);
    }
  }
};

struct Step {
  __m512i places, even, odd;
};

inline void add(const Window& window, const Step& step, __m512& even, __m512& odd) {
  const __m512i high = _mm512_permutex2var_epi8(window.high[0], step.places, window.high[1]);
  const __m512i low = _mm512_permutex2var_epi8(window.low[0], step.places, window.low[1]);
  even = _mm512_dpbf16_ps(even, reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, high)),
                          reinterpret_cast<__m512bh>(step.even));
  odd = _mm512_dpbf16_ps(odd, reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, high)),
                         reinterpret_cast<__m512bh>(step.odd));
}

// A panel's weights, step by step.
struct Cursor {
  const uint64_t* masks;
  const uint8_t* places;
  const uint16_t* values;
  const uint8_t* places_end;
  const uint64_t* masks_end;

  Cursor(const BitmapIndexWeight& weight, int64_t panel)
      : masks(weight.masks + weight.step_offsets[panel]), places(weight.places + weight.value_offsets[panel]),
        values(static_cast<const uint16_t*>(weight.values) + weight.value_offsets[panel]),
        places_end(weight.places + weight.value_offsets[panel + 1]),
        masks_end(weight.masks + weight.step_offsets[panel + 1]) {}

  // steps of a window, which may lie
  int64_t count(int64_t steps) const { return steps < masks_end - masks ? steps : masks_end - masks; }

  inline Step next() {
    const uint64_t mask = *masks++;
    const auto even = static_cast<__mmask32>(_pext_u64(mask, 0x00ff00ff00ff00ffu));
    const auto odd = static_cast<__mmask32>(_pext_u64(mask, 0xff00ff00ff00ff00u));
    prefetch(masks);
    prefetch(places);
    prefetch(values);
    Step step;
    step.places = _mm512_mask_expand_epi8(fresh_zero(), mask, _mm512_loadu_si512(places));
    step.even = _mm512_mask_expand_epi16(fresh_zero(), even, _mm512_loadu_si512(values));
    const int64_t first = __builtin_popcount(even);
    step.odd = _mm512_mask_expand_epi16(fresh_zero(), odd, _mm512_loadu_si512(values + first));
    const int64_t kept = first + __builtin_popcount(odd);
    // masks that lie: no step starts behind the panel's end, which kIndexTail covers
    const int64_t moved = kept < places_end - places ? kept : places_end - places;
    places += moved;
    values += moved;
    return step;
  }
};

void store(const IndexCall& call, int64_t token, int64_t panel, __m512 sum) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t row = panel * kPanelRows, left = weight.out_features - row;
  const auto rows = static_cast<__mmask16>(left < kPanelRows ? (1u << left) - 1 : 0xffffu);
  const __m512 b = call.bias != nullptr ? load_bf16(call.bias + row, rows) : _mm512_setzero_ps();
  const __m512 finite = _mm512_set1_ps(call.finite[token] != 0 ? 0.0f : __builtin_nanf(""));
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_add_ps(sum, b), finite)));
  _mm256_mask_storeu_epi16(call.y + token * weight.out_features + row, rows, narrow);
}

void panel_one(const IndexCall& call, int64_t panel) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t windows = window_count(weight);
  const uint16_t* steps = weight.steps + panel * windows;
  Cursor cursor(weight, panel);
  __m512 sums[4];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t w = 0; w < windows; ++w) {
    const Window window(call.x + w * 2 * kWindowInputs);
    const int64_t count = cursor.count(steps[w]);
    int64_t s = 0;
    for (; s + 2 <= count; s += 2) {
      add(window, cursor.next(), sums[0], sums[1]);
      add(window, cursor.next(), sums[2], sums[3]);
    }
    if (s < count) add(window, cursor.next(), sums[0], sums[1]);
  }
  store(call, 0, panel, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// tokens of one call at most kIndexTokens
void panel_many(const IndexCall& call, int64_t first, int64_t tokens, int64_t panel) {
  const BitmapIndexWeight& weight = *call.weight;
  const int64_t windows = window_count(weight);
  const uint16_t* steps = weight.steps + panel * windows;
  Cursor cursor(weight, panel);
  // of a window that keeps every weight
  Step expanded[kWindowInputs / 4];
  __m512 totals[kIndexTokens];
  for (int64_t t = 0; t < tokens; ++t) totals[t] = _mm512_setzero_ps();
  for (int64_t w = 0; w < windows; ++w) {
    int64_t count = cursor.count(steps[w]);
    count = count < kWindowInputs / 4 ? count : kWindowInputs / 4;
    for (int64_t s = 0; s < count; ++s) expanded[s] = cursor.next();
    for (int64_t t = 0; t < tokens; ++t) {
      const Window window(call.x + ((first + t) * windows + w) * 2 * kWindowInputs);
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps(), even2 = even, odd2 = odd;
      int64_t s = 0;
      for (; s + 2 <= count; s += 2) {
        add(window, expanded[s], even, odd);
        add(window, expanded[s + 1], even2, odd2);
      }
      if (s < count) add(window, expanded[s], even, odd);
      totals[t] = _mm512_add_ps(totals[t], _mm512_add_ps(_mm512_add_ps(even, odd), _mm512_add_ps(even2, odd2)));
    }
  }
  for (int64_t t = 0; t < tokens; ++t) store(call, first + t, panel, totals[t]);
}

// [tokens, windows, 2, kWindowInputs], zeros after the last input
void pack(const uint16_t* x, int64_t in_features, uint8_t* packed, uint8_t* finite, int64_t first, int64_t end) {
  const int64_t windows = (in_features + kWindowInputs - 1) / kWindowInputs;
  for (int64_t t = first; t < end; ++t) {
    __mmask32 wrong = 0;
    for (int64_t i = 0; i < windows * kWindowInputs; i += 32) {
      const int64_t left = in_features - i;
      const __mmask32 inside = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      const __m512i words = _mm512_maskz_loadu_epi16(inside, x + t * in_features + (inside != 0 ? i : 0));
      const __m512i exponent = _mm512_set1_epi16(0x7f80);
      wrong |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, exponent), exponent);
      uint8_t* target = packed + (t * windows + i / kWindowInputs) * 2 * kWindowInputs + i % kWindowInputs;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + kWindowInputs), _mm512_cvtepi16_epi8(words));
    }
    finite[t] = wrong == 0;
  }
}

void linear(const IndexCall& call, int64_t first_panel, int64_t end_panel) {
  for (int64_t first = 0; first < call.tokens; first += kIndexTokens) {
    const int64_t here = call.tokens - first < kIndexTokens ? call.tokens - first : kIndexTokens;
    for (int64_t p = first_panel; p < end_panel; ++p) {
      if (call.tokens == 1) {
        panel_one(call, p);
      } else {
        panel_many(call, first, here, p);
      }
    }
  }
}

}  // namespace

const LinearBitmapIndex kLinearBitmapIndexAvx512 = {pack, linear};

}  // namespace sparsekern

#endif
