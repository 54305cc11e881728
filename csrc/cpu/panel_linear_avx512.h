// y = x W^T + bias over panels of weights, whatever they are stored as: a Weight says how to get at its tiles. Two panels
// by up to twelve tokens are multiplied at once; more tokens make more passes over the two panels, from the cache.
//
// The two panels are one of the first half of a thread's panels and one of the second: so each half is read from its
// beginning to its end without a gap, and what lies ahead in memory is what is read next. Of two neighbours, each reads
// on where the other began: on Zen 5, two threads and 50 % sparsity, 87 % of the memory's bandwidth and not 97 %.
//
// Included after the target pragma; no STL here, as in panel_kinds_avx512.h.
//
//   Weight::Kind                   how a tile is multiplied, see panel_kinds_avx512.h
//   weight.cursor(panel, passes, pass)  a Cursor at the first tile of a panel
//   cursor.block()                 asks memory for what comes later, before each kBlockMasks tiles
//   cursor.steps()                 the same, and goes on to the next kSteps tiles
//   cursor.next(step)              one of these, in registers; each once, in order
#pragma once

#include "panel_kinds_avx512.h"

namespace sparsekern {
namespace {

// tiles between two looks at the masks
constexpr int kSteps = 4;
// measured on Zen 5, one thread: 9 GB/s without, 25 at 2 KB ahead, 28 to 32 at 4 KB, 36 at 8 KB, no more at 16 KB
constexpr int64_t kAheadBytes = 8192;

inline void ask(const void* address, int64_t bytes_ahead) {
  _mm_prefetch(static_cast<const char*>(address) + bytes_ahead, _MM_HINT_T0);
}

// Of two panels that are read several times, each pass asks for its part of the two that follow, into L2.
inline void ask_for_lines(const char* address, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line) _mm_prefetch(address + line * 64, _MM_HINT_T1);
}

// Passes over two panels before the next two: the x of so many tokens, 8 KB each at 4096 inputs, stays in L2.
constexpr int64_t kPasses = 8;

// Where the outputs go. The mask of a panel has a bit for each row that exists.
template <class Kind>
struct Outputs {
  const void* bias;
  void* y;
  int64_t out_features;

  __mmask16 rows(int64_t panel) const {
    const int64_t left = out_features - panel * kPanelRows;
    return static_cast<__mmask16>(left < kPanelRows ? (1u << left) - 1 : 0xffffu);
  }
  __m512 start(int64_t panel) const {
    return bias == nullptr ? _mm512_setzero_ps() : Kind::load_bias(bias, panel * kPanelRows, rows(panel));
  }
  void store(int64_t panel, int64_t token, __m512 sums) const {
    Kind::store(y, token * out_features + panel * kPanelRows, sums, rows(panel));
  }
};

template <int kTokens>
struct Group {
  static constexpr int kSize = kTokens;
};

template <class Function>
void with_group(int64_t size, Function&& function) {
  switch (size) {
    case 1: return function(Group<1>{});
    case 2: return function(Group<2>{});
    case 3: return function(Group<3>{});
    case 4: return function(Group<4>{});
    case 6: return function(Group<6>{});
    case 8: return function(Group<8>{});
    case 10: return function(Group<10>{});
    default: return function(Group<12>{});
  }
}

// A pass over kPanels panels, `first_panel` and every `apart`th after it: number `pass` of `passes`. x is that of the
// group, of which `tokens` exist.
template <class Weight, int kPanels, int kGroup, class Kind = typename Weight::Kind>
void multiply(const Weight& weight, int64_t pairs, const typename Kind::X* x, const Outputs<Kind>& outputs,
              int64_t first_panel, int64_t apart, int64_t passes, int64_t pass, int64_t first_token, int64_t tokens) {
  // VDPBF16PS takes six cycles and two start in each: with fewer than twelve sums they wait for themselves. The same for
  // a lone panel, so that how panels are shared out changes no bit
  constexpr int kChains = kGroup <= 2 ? 4 : kGroup <= 4 ? 2 : 1;
  typename Kind::Sum sums[kPanels][kChains][kGroup];
  typename Weight::Cursor cursors[kPanels];
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    cursors[panel] = weight.cursor(first_panel + panel * apart, passes, pass);
#pragma GCC unroll 4
    for (auto& chain : sums[panel]) {
#pragma GCC unroll 16
      for (auto& sum : chain) sum = Kind::zero();
    }
  }
  for (int64_t pair = 0; pair < pairs; pair += kBlockMasks) {
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) cursors[panel].block();
    for (int64_t i = 0; i < kBlockMasks; i += kSteps) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) cursors[panel].steps();
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step) {
        typename Kind::Weights w[kPanels];
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel) w[panel] = Kind::weights(cursors[panel].next(step));
#pragma GCC unroll 16
        for (int token = 0; token < kGroup; ++token) {
#pragma GCC unroll 2
          for (int panel = 0; panel < kPanels; ++panel) {
            Kind::add(sums[panel][step % kChains][token], w[panel], x + token * 2);
          }
        }
        x += kGroup * 2;
      }
    }
  }
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    const __m512 bias = outputs.start(first_panel + panel * apart);
#pragma GCC unroll 16
    for (int token = 0; token < kGroup; ++token) {
      __m512 sum = Kind::total(sums[panel][0][token]);
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum = _mm512_add_ps(sum, Kind::total(sums[panel][chain][token]));
      if (token < tokens) {
        outputs.store(first_panel + panel * apart, first_token + token, _mm512_add_ps(sum, bias));
      }
    }
  }
}

template <class Weight, int kPanels, class Kind = typename Weight::Kind>
void panels_times_groups(const Weight& weight, int64_t pairs, const typename Kind::X* x, const Groups& groups,
                         int64_t first_group, int64_t end_group, const Outputs<Kind>& outputs, int64_t first_panel,
                         int64_t apart) {
  for (int64_t group = first_group; group < end_group; ++group) {
    const int64_t first = groups.first(group);
    with_group(groups.size(group), [&](auto known) {
      constexpr int kGroup = decltype(known)::kSize;
      multiply<Weight, kPanels, kGroup>(weight, pairs, x + first * pairs * 2, outputs, first_panel, apart,
                                        end_group - first_group, group - first_group, first, groups.tokens - first);
    });
  }
}

// The work of one thread: panels first_panel to end_panel - 1.
template <class Weight, class Kind = typename Weight::Kind>
void linear_panels(const Weight& weight, int64_t pairs, const void* packed_x, const Groups& groups,
                   const Outputs<Kind>& outputs, int64_t first_panel, int64_t end_panel) {
  const auto* x = static_cast<const typename Kind::X*>(packed_x);
  for (int64_t group = 0; group < groups.count; group += kPasses) {
    const int64_t end_group = group + kPasses < groups.count ? group + kPasses : groups.count;
    const int64_t half = Kind::kPanels > 1 ? (end_panel - first_panel) / 2 : 0;
    if constexpr (Kind::kPanels > 1) {
      for (int64_t panel = first_panel; panel < first_panel + half; ++panel) {
        panels_times_groups<Weight, 2>(weight, pairs, x, groups, group, end_group, outputs, panel, half);
      }
    }
    for (int64_t panel = first_panel + 2 * half; panel < end_panel; ++panel) {
      panels_times_groups<Weight, 1>(weight, pairs, x, groups, group, end_group, outputs, panel, 0);
    }
  }
}

}  // namespace
}  // namespace sparsekern
