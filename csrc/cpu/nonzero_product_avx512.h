// y = x W^T + bias without the zeros of W: for each row of a block the numbers of its kept steps come from the bits of
// a word, each weight is broadcast and multiplied with up to 128 tokens of x, from L1, into sums in registers. Included
// after the target pragma; no STL here, as in panel_kinds_avx512.h.
//
//   Weight::Kind           the type of bias and y, see panel_kinds_avx512.h
//   Weight::Math           kInputs, of a block of kNonzeroSteps steps; add(sums, word of a weight, x of 16 tokens);
//                          kTwoRowsShare, of the weights kept, from which on multiply_two_rows is faster
//   weight.kept_share()    of all weights, those that are kept
//   weight.cursor(panel)   a Cursor at the first block of a panel
//   cursor.expand(tile)    goes on to the next block: its words and kept steps to `tile`
//   cursor.streams()       what the next block will be read from
#pragma once

#include "nonzero_product.h"
#include "panel_linear_avx512.h"
#include "transpose_avx512.h"

namespace sparsekern {
namespace {

// One input a step.
struct SingleSteps {
  static constexpr int64_t kInputs = kNonzeroSteps;
  // two rows seldom keep the same input: at 50 % it was 3 % slower, at 90 % 7 %
  static constexpr double kTwoRowsShare = 2;
  static __m512 add(__m512 sums, __m512i word, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(word), _mm512_castsi512_ps(x), sums);
  }
};

// What the next block of a panel is read from, so many lines of each.
struct Streams {
  static constexpr int kCount = 2;
  const char* address[kCount];
  int64_t lines[kCount];

  void ask() const {
    for (int i = 0; i < kCount; ++i) {
      for (int64_t line = 0; line < lines[i]; ++line) _mm_prefetch(address[i] + line * 64, _MM_HINT_T1);
    }
  }
};

// One block of one panel.
struct TileProduct {
  const NonzeroTile& tile;
  const uint32_t* x;        // [kNonzeroSteps, tokens of the block] and one step more, finite
  float* sums;              // [kPanelRows, tokens of the block]
  bool first;               // the first tile of the panel starts the sums
  const uint32_t* later_x;  // as much as x, from beyond L2: a panel asks for a part of kGroupPanels of it

  template <int kVectors>
  void ask(int64_t row, int64_t rows) const {
    constexpr int64_t kLines = kNonzeroSteps * kVectors / kGroupPanels;
    for (int64_t line = kLines * row / kPanelRows; line < kLines * (row + rows) / kPanelRows; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(later_x) + line * 64, _MM_HINT_T1);
    }
  }
};

template <int kChains, int kVectors>
void start_sums(__m512 (&chains)[kChains][kVectors]) {
#pragma GCC unroll 8
  for (auto& chain : chains) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) chain[v] = _mm512_setzero_ps();
  }
}

template <int kChains, int kVectors>
void add_sums(const TileProduct& p, int64_t row, const __m512 (&chains)[kChains][kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    __m512 sum = chains[0][v];
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, chains[c][v]);
    float* target = p.sums + (row * kVectors + v) * kLaneTokens;
    _mm512_store_ps(target, p.first ? sum : _mm512_add_ps(sum, _mm512_load_ps(target)));
  }
}

// The kept steps of a row, one after the other.
struct KeptSteps {
  const uint32_t* words;
  uint64_t kept;

  KeptSteps(const NonzeroTile& tile, int64_t row, uint64_t steps) : words(tile.words + row), kept(steps) {}
  int count() const { return __builtin_popcountll(kept); }
  // kNonzeroSteps, the step of zeros, when none is left
  int64_t next() {
    const uint64_t step = _tzcnt_u64(kept);
    kept = _blsr_u64(kept);
    return static_cast<int64_t>(step);
  }
  __m512i word(int64_t step) const { return _mm512_set1_epi32(static_cast<int>(words[step * kPanelRows])); }
};

template <class Math, int kVectors>
void multiply_step(__m512 (&sums)[kVectors], __m512i word, const uint32_t* x) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = Math::add(sums[v], word, _mm512_load_si512(x + v * kLaneTokens));
}

// VDPBF16PS takes six cycles and two start in each: with fewer than twelve sums they wait for themselves.
template <class Math, int kVectors>
void multiply_each_row(const TileProduct& p) {
  constexpr int kChains = kVectors == 1 ? 8 : kVectors <= 3 ? 4 : kVectors <= 5 ? 3 : 2;
  for (int64_t row = 0; row < kPanelRows; ++row) {
    __m512 sums[kChains][kVectors];
    start_sums(sums);
    KeptSteps steps(p.tile, row, p.tile.kept[row]);
    p.template ask<kVectors>(row, 1);
    for (int turns = (steps.count() + kChains - 1) / kChains; turns > 0; --turns) {
#pragma GCC unroll 8
      for (auto& chain : sums) {
        const int64_t step = steps.next();
        multiply_step<Math>(chain, steps.word(step), p.x + step * (kVectors * kLaneTokens));
      }
    }
    add_sums(p, row, sums);
  }
}

// The same of two rows at a time: x is loaded once for a step that both keep. Loads are what multiply_each_row waits
// for.
template <class Math, int kVectors>
void multiply_two_rows(const TileProduct& p) {
  constexpr int kChains = kVectors == 1 ? 4 : kVectors <= 5 ? 2 : 1;
  for (int64_t row = 0; row < kPanelRows; row += 2) {
    __m512 upper[kChains][kVectors], lower[kChains][kVectors];
    start_sums(upper);
    start_sums(lower);
    const uint64_t up = p.tile.kept[row], low = p.tile.kept[row + 1];
    KeptSteps both(p.tile, row, up & low), only_up(p.tile, row, up & ~low), only_low(p.tile, row + 1, low & ~up);
    p.template ask<kVectors>(row, 2);
    const int most = only_up.count() < only_low.count() ? only_low.count() : only_up.count();
    for (int turns = (both.count() + kChains - 1) / kChains; turns > 0; --turns) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const int64_t step = both.next();
        const __m512i up_word = both.word(step), low_word = only_low.word(step);
        const uint32_t* x = p.x + step * (kVectors * kLaneTokens);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const __m512i inputs = _mm512_load_si512(x + v * kLaneTokens);
          upper[c][v] = Math::add(upper[c][v], up_word, inputs);
          lower[c][v] = Math::add(lower[c][v], low_word, inputs);
        }
      }
    }
    for (int turns = (most + kChains - 1) / kChains; turns > 0; --turns) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const int64_t up_step = only_up.next(), low_step = only_low.next();
        multiply_step<Math>(upper[c], only_up.word(up_step), p.x + up_step * (kVectors * kLaneTokens));
        multiply_step<Math>(lower[c], only_low.word(low_step), p.x + low_step * (kVectors * kLaneTokens));
      }
    }
    add_sums(p, row, upper);
    add_sums(p, row + 1, lower);
  }
}

template <class Math, int kVectors>
void multiply_tile(const TileProduct& p, bool two_rows) {
  if constexpr (Math::kTwoRowsShare <= 1) {
    if (two_rows) return multiply_two_rows<Math, kVectors>(p);
  }
  multiply_each_row<Math, kVectors>(p);
}

template <class Math>
void multiply_tile(const TileProduct& p, int64_t vectors, bool two_rows) {
  switch (vectors) {
    case 1: return multiply_tile<Math, 1>(p, two_rows);
    case 2: return multiply_tile<Math, 2>(p, two_rows);
    case 3: return multiply_tile<Math, 3>(p, two_rows);
    case 4: return multiply_tile<Math, 4>(p, two_rows);
    case 5: return multiply_tile<Math, 5>(p, two_rows);
    case 6: return multiply_tile<Math, 6>(p, two_rows);
    case 7: return multiply_tile<Math, 7>(p, two_rows);
    default: return multiply_tile<Math, 8>(p, two_rows);
  }
}

// sums [kPanelRows, vectors * kLaneTokens], rounded, to y.
template <class Kind>
void store_sums(const float* sums, int64_t vectors, const Outputs<Kind>& outputs, int64_t panel, int64_t first_token,
                int64_t tokens) {
  const __m512 bias = outputs.start(panel);
  for (int64_t first = 0; first < vectors * kLaneTokens && first_token + first < tokens; first += kLaneTokens) {
    __m512i square[kLaneTokens];
#pragma GCC unroll 16
    for (int64_t row = 0; row < kPanelRows; ++row) {
      square[row] = _mm512_load_si512(sums + row * vectors * kLaneTokens + first);
    }
    transpose_dwords(square);
    const int64_t left = tokens - first_token - first;
    for (int64_t token = 0; token < (left < kLaneTokens ? left : kLaneTokens); ++token) {
      const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(square[token]), bias);
      outputs.store(panel, first_token + first + token, sum);
    }
  }
}

// The work of one thread: panels first_panel to end_panel - 1.
//   x  [vectors of all blocks], of each block [steps, its tokens], and one step more
template <class Weight>
void nonzero_panels(const Weight& weight, int64_t in_features, const uint32_t* x, const TokenBlocks& blocks,
                    const Outputs<typename Weight::Kind>& outputs, int64_t first_panel, int64_t end_panel,
                    NonzeroScratch& scratch) {
  using Math = typename Weight::Math;
  const int64_t tiles = divide_up(in_features, Math::kInputs);
  const bool two_rows = weight.kept_share() >= Math::kTwoRowsShare;
  for (auto& tile : scratch.tiles) _mm512_store_si512(tile.words + kNonzeroSteps * kPanelRows, _mm512_setzero_si512());
  const auto x_of = [&](int64_t block, int64_t tile) {
    return x + (blocks.first_vector(block) * tiles + tile * blocks.size(block)) * kNonzeroSteps * kLaneTokens;
  };
  const int64_t turns = divide_up(blocks.count, kGroupBlocks);
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t first_block = blocks.count * turn / turns, end_block = blocks.count * (turn + 1) / turns;
    for (int64_t group = first_panel; group < end_panel; group += kGroupPanels) {
      const int64_t panels = end_panel - group < kGroupPanels ? end_panel - group : kGroupPanels;
      const auto sums_of = [&](int64_t block, int64_t panel) {
        const int64_t before = (blocks.first_vector(block) - blocks.first_vector(first_block)) * panels;
        return scratch.sums + (before + panel * blocks.size(block)) * kLaneTokens * kPanelRows;
      };
      typename Weight::Cursor cursors[kGroupPanels];
      for (int64_t panel = 0; panel < panels; ++panel) cursors[panel] = weight.cursor(group + panel);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t panel = 0; panel < panels; ++panel) cursors[panel].expand(scratch.tiles[panel]);
        for (int64_t block = first_block; block < end_block; ++block) {
          const int64_t size = blocks.size(block);
          const uint32_t* later = block + 1 < end_block ? x_of(block + 1, tile) : x_of(first_block, tile + 1);
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t after = group + kGroupPanels + panel;
            // of the next block, or of the same panel of the next group
            const Streams weights = block > first_block  ? Streams{}
                                    : tile + 1 < tiles   ? cursors[panel].streams()
                                    : after < end_panel  ? weight.cursor(after).streams()
                                                         : Streams{};
            weights.ask();
            float* sums = sums_of(block, panel);
            multiply_tile<Math>({scratch.tiles[panel], x_of(block, tile), sums, tile == 0, later}, size, two_rows);
            later += kNonzeroSteps / kGroupPanels * size * kLaneTokens;
          }
        }
      }
      for (int64_t block = first_block; block < end_block; ++block) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          store_sums(sums_of(block, panel), blocks.size(block), outputs, group + panel,
                     blocks.first_vector(block) * kLaneTokens, blocks.tokens);
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparsekern
