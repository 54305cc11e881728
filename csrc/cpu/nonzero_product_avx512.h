// y = x W^T + bias without the zeros of W: for each row of a block the numbers of its kept steps come from the bits of
// a word, each weight is broadcast and multiplied with up to 128 tokens of x, from L1, into sums in registers. Included
// after the target pragma; no STL here, as in panel_kinds_avx512.h.
//
//   Weight::Kind           the type of bias and y, see panel_kinds_avx512.h
//   Weight::Math           kInputs, of a block of kNonzeroSteps steps; add(sums, word of a weight, x of 16 tokens)
//   weight.cursor(panel)   a Cursor at the first block of a panel
//   cursor.expand(tile)    goes on to the next block: its words and kept steps to `tile`
#pragma once

#include "nonzero_product.h"
#include "panel_linear_avx512.h"
#include "transpose_avx512.h"

namespace sparsekern {
namespace {

// One input a step.
struct SingleSteps {
  static constexpr int64_t kInputs = kNonzeroSteps;
  static __m512 add(__m512 sums, __m512i word, const uint32_t* x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(word), _mm512_load_ps(x), sums);
  }
};

// sums [kPanelRows, kVectors * kLaneTokens] of one tile; the first one starts them.
//   x      [kNonzeroSteps, kVectors * kLaneTokens] and one step more, finite
//   later  as much as x, of which this asks for the part of one panel of kGroupPanels: it comes from beyond L2
template <class Math, int kVectors>
void multiply_tile(const NonzeroTile& tile, const uint32_t* x, const uint32_t* later, float* sums, bool first) {
  constexpr int64_t kLines = kNonzeroSteps * kVectors / kGroupPanels;
  // VDPBF16PS takes six cycles and two start in each: with fewer than twelve sums they wait for themselves
  constexpr int kChains = kVectors == 1 ? 8 : kVectors <= 3 ? 4 : kVectors <= 5 ? 3 : 2;
  for (int64_t row = 0; row < kPanelRows; ++row, sums += kVectors * kLaneTokens) {
    __m512 chain[kChains][kVectors];
#pragma GCC unroll 8
    for (auto& sum : chain) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_setzero_ps();
    }
    const uint32_t* words = tile.words + row;
    uint64_t kept = tile.kept[row];
    for (int64_t line = kLines * row / kPanelRows; line < kLines * (row + 1) / kPanelRows; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(later) + line * 64, _MM_HINT_T1);
    }
    for (int turns = (__builtin_popcountll(kept) + kChains - 1) / kChains; turns > 0; --turns) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        // 64, the step of zeros, when no bit is left
        const uint64_t step = _tzcnt_u64(kept);
        kept = _blsr_u64(kept);
        const __m512i word = _mm512_set1_epi32(static_cast<int>(words[step * kPanelRows]));
        const uint32_t* inputs = x + step * (kVectors * kLaneTokens);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) chain[c][v] = Math::add(chain[c][v], word, inputs + v * kLaneTokens);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      __m512 sum = chain[0][v];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, chain[c][v]);
      float* target = sums + v * kLaneTokens;
      _mm512_store_ps(target, first ? sum : _mm512_add_ps(sum, _mm512_load_ps(target)));
    }
  }
}

template <class Math>
void multiply_tile(const NonzeroTile& tile, const uint32_t* x, const uint32_t* later, int64_t vectors, float* sums,
                   bool first) {
  const auto run = vectors == 1   ? multiply_tile<Math, 1>
                   : vectors == 2 ? multiply_tile<Math, 2>
                   : vectors == 3 ? multiply_tile<Math, 3>
                   : vectors == 4 ? multiply_tile<Math, 4>
                   : vectors == 5 ? multiply_tile<Math, 5>
                   : vectors == 6 ? multiply_tile<Math, 6>
                   : vectors == 7 ? multiply_tile<Math, 7>
                                  : multiply_tile<Math, 8>;
  run(tile, x, later, sums, first);
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
            multiply_tile<Math>(scratch.tiles[panel], x_of(block, tile), later, size, sums_of(block, panel), tile == 0);
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
