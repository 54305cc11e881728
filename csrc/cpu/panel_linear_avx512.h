// y = x W^T + bias over panels of weights, whatever they are stored as: a Weight says how to get at its tiles. Included
// after the target pragma; no STL here, as in panel_kinds_avx512.h.
//
//   Weight::Kind            how a tile is multiplied, see panel_kinds_avx512.h
//   weight.cursor(panel)    a Cursor at the first tile of a panel
//   cursor.next(tile)       copies the next tile, [kRegisters], and asks for what comes later; after kGuardMasks calls at
//                           the latest cursor.guard() is called
//   cursor.tiles(n, space)  the address of the next n tiles, which may be in `space`, and moves on
//   cursor.ahead()          what is read after that; ahead_bytes of it a tile
#pragma once

#include "panel_kinds_avx512.h"

namespace sparsekern {
namespace {

// expanded weights of the panels that are multiplied together, and beside them the x of a group, fit into L1
constexpr int64_t kChunkBytes = 16384;
// tokens whose sums stay in L2, and for which a weight is expanded once
constexpr int64_t kWideGroups = 16;

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
void with_lone_group(int64_t size, Function&& function) {
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

// One of several: see Groups.
template <class Function>
void with_group(int64_t size, Function&& function) {
  switch (size) {
    case 6: return function(Group<6>{});
    case 8: return function(Group<8>{});
    case 10: return function(Group<10>{});
    default: return function(Group<12>{});
  }
}

// Few tokens: the weights go from the register straight into the sums.
template <class Weight, int kGroup, class Kind = typename Weight::Kind>
void panel_direct(typename Weight::Cursor cursor, int64_t pairs, const typename Kind::X* x,
                  const Outputs<Kind>& outputs, int64_t panel, int64_t tokens) {
  // a lone sum would wait for itself: the fused multiply-add takes four cycles
  constexpr int kChains = kGroup == 1 ? 4 : kGroup <= 4 ? 2 : 1;
  static_assert(kChains <= kGuardMasks, "see kTailBytes");
  typename Kind::Sum sums[kChains][kGroup];
#pragma GCC unroll 4
  for (auto& chain : sums) {
#pragma GCC unroll 16
    for (auto& sum : chain) sum = Kind::zero();
  }
  for (int64_t pair = 0; pair < pairs; pair += kChains) {
    cursor.guard();
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      __m512i tile[Kind::kRegisters];
      cursor.next(tile);
      const typename Kind::Weights w = Kind::weights(tile);
#pragma GCC unroll 16
      for (int token = 0; token < kGroup; ++token) Kind::add(sums[chain][token], w, x + token * 2);
      x += kGroup * 2;
    }
  }
  const __m512 bias = outputs.start(panel);
#pragma GCC unroll 16
  for (int token = 0; token < kGroup; ++token) {
    __m512 sum = Kind::total(sums[0][token]);
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) sum = _mm512_add_ps(sum, Kind::total(sums[chain][token]));
    if (token < tokens) outputs.store(panel, token, _mm512_add_ps(sum, bias));
  }
}

// Adds what `count` tiles of kPanels panels contribute to totals [kPanels, kGroup, kPanelRows]; `ahead` is asked for
// meanwhile, ahead_bytes a tile.
template <class Kind, int kPanels, int kGroup>
void multiply(const __m512i* const* tiles, int64_t count, const typename Kind::X* x, float* totals,
              int64_t panel_totals, const char* ahead, int64_t ahead_bytes) {
  typename Kind::Sum sums[kPanels][kGroup];
  const __m512i* here[kPanels];
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
    here[panel] = tiles[panel];
#pragma GCC unroll 16
    for (auto& sum : sums[panel]) sum = Kind::zero();
  }
  for (int64_t pair = 0; pair < count; ++pair) {
    _mm_prefetch(ahead, _MM_HINT_T0);
    ahead += ahead_bytes;
    typename Kind::Weights w[kPanels];
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) w[panel] = Kind::weights(here[panel] + pair * Kind::kRegisters);
#pragma GCC unroll 16
    for (int token = 0; token < kGroup; ++token) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) Kind::add(sums[panel][token], w[panel], x + token * 2);
    }
    x += kGroup * 2;
  }
#pragma GCC unroll 2
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 16
    for (int token = 0; token < kGroup; ++token) {
      float* total = totals + panel * panel_totals + token * kPanelRows;
      _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), Kind::total(sums[panel][token])));
    }
  }
}

// More tokens than registers: a chunk of kPanels panels is multiplied with group after group. Groups first_group to
// end_group - 1.
template <class Weight, int kPanels, class Kind = typename Weight::Kind>
void panels_wide(const Weight& weight, int64_t pairs, const typename Kind::X* x, const Groups& groups,
                 int64_t first_group, int64_t end_group, const Outputs<Kind>& outputs, int64_t first_panel) {
  // the same for a lone panel, so that how panels are shared out changes no bit
  constexpr int64_t kChunk = kChunkBytes / 64 / Kind::kRegisters / Kind::kPanels;
  constexpr int64_t kTotals = kWideGroups * kMaxGroup * kPanelRows;
  alignas(64) __m512i space[kPanels][kChunk * Kind::kRegisters];
  alignas(64) float totals[kPanels * kTotals];
  const int64_t first_token = groups.first(first_group);
  const int64_t end_token = groups.first(end_group);
  typename Weight::Cursor cursors[kPanels];
  for (int panel = 0; panel < kPanels; ++panel) {
    const __m512 bias = outputs.start(first_panel + panel);
    float* total = totals + panel * kTotals;
    for (int64_t token = first_token; token < end_token; ++token, total += kPanelRows) _mm512_store_ps(total, bias);
    cursors[panel] = weight.cursor(first_panel + panel);
  }
  for (int64_t first = 0; first < pairs; first += kChunk) {
    const int64_t count = pairs - first < kChunk ? pairs - first : kChunk;
    const __m512i* tiles[kPanels];
    for (int panel = 0; panel < kPanels; ++panel) tiles[panel] = cursors[panel].tiles(count, space[panel]);
    for (int64_t group = first_group; group < end_group; ++group) {
      const int64_t turn = group - first_group;
      // the first groups ask for the next chunk, a panel each; the others for what is here
      const typename Weight::Cursor& next = cursors[turn < kPanels ? turn : 0];
      const int64_t ahead_bytes = turn < kPanels ? next.ahead_bytes : 0;
      const int64_t size = groups.size(group);
      with_group(size, [&](auto known) {
        constexpr int kGroup = decltype(known)::kSize;
        multiply<Kind, kPanels, kGroup>(tiles, count, x + (groups.first(group) * pairs + first * size) * 2,
                                        totals + (groups.first(group) - first_token) * kPanelRows, kTotals,
                                        next.ahead(), ahead_bytes);
      });
    }
  }
  for (int panel = 0; panel < kPanels; ++panel) {
    const float* total = totals + panel * kTotals;
    for (int64_t token = first_token; token < end_token && token < groups.tokens; ++token, total += kPanelRows) {
      outputs.store(first_panel + panel, token, _mm512_load_ps(total));
    }
  }
}

// The work of one thread: panels first_panel to end_panel - 1.
template <class Weight, class Kind = typename Weight::Kind>
void linear_panels(const Weight& weight, int64_t pairs, const void* packed_x, const Groups& groups,
                   const Outputs<Kind>& outputs, int64_t first_panel, int64_t end_panel) {
  const auto* x = static_cast<const typename Kind::X*>(packed_x);
  if (groups.count == 1) {
    with_lone_group(groups.size(0), [&](auto known) {
      constexpr int kGroup = decltype(known)::kSize;
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        panel_direct<Weight, kGroup>(weight.cursor(panel), pairs, x, outputs, panel, groups.tokens);
      }
    });
    return;
  }
  for (int64_t group = 0; group < groups.count; group += kWideGroups) {
    const int64_t end_group = group + kWideGroups < groups.count ? group + kWideGroups : groups.count;
    int64_t panel = first_panel;
    if constexpr (Kind::kPanels > 1) {
      for (; panel + 1 < end_panel; panel += 2) {
        panels_wide<Weight, 2>(weight, pairs, x, groups, group, end_group, outputs, panel);
      }
    }
    for (; panel < end_panel; ++panel) {
      panels_wide<Weight, 1>(weight, pairs, x, groups, group, end_group, outputs, panel);
    }
  }
}

}  // namespace
}  // namespace sparsekern
