// linear_bitmap on AMX-BF16 and AVX-512 VBMI2, bfloat16 weights. A mask expanded is a row of a tile in the order that
// TDPBF16PS wants of its second operand, a block of masks a whole one: 16 input pairs by 16 outputs. x is the first operand,
// a row a token, so that few tokens are few rows and little work; the sums are [tokens, outputs].
//
//   up to 64 tokens  a block is expanded into L1 while the tiles multiply the one before it with every group of tokens
//   more             a chunk of two panels is expanded into L2, then multiplied with two groups at a time
//
// Every thread configures the tiles for its part and releases them. No STL here: see linear_bitmap_avx512.h.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512dq,popcnt,bmi2")

#include "expand_words_vbmi2.h"
#include "linear_bitmap_tiles.h"

namespace sparsekern {
namespace {

constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kFewGroups = 4;
// the chunk of two panels, the sums of these tokens and their x of the chunk stay in L2
constexpr int64_t kChunkBlocks = 32;
constexpr int64_t kSlabGroups = 32;

// tmm0 to 3 are sums, these hold x and weights
constexpr int kX = 4, kWeights = 6;

inline TileConfig config_of(int64_t rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = static_cast<uint8_t>(tile < kWeights ? rows : kTileRows);
  }
  return config;
}

// A panel's masks and values, from its first block on.
struct Cursor {
  const uint32_t* masks;
  const uint16_t* values;
  const uint16_t* end;

  Cursor(const BitmapWeight& weight, int64_t blocks, int64_t panel)
      : masks(weight.masks + panel * blocks * kBlockMasks),
        values(static_cast<const uint16_t*>(weight.values) + weight.panel_offsets[panel]),
        end(static_cast<const uint16_t*>(weight.values) + weight.panel_offsets[panel + 1]) {}

  // The next block, a tile [kBlockMasks, kPanelRows, 2].
  void expand(uint16_t* tile) {
    prefetch(masks);
#pragma GCC unroll 16
    for (int64_t q = 0; q < kBlockMasks; ++q) {
      if (q % kGuardMasks == 0) values = values < end ? values : end;
      // two masks of bfloat16 are a line or less
      if (q % 2 == 0) prefetch(values);
      const uint32_t mask = masks[q];
      _mm512_store_si512(tile + q * kPanelRows * 2, expand_words(mask, values));
      values += __builtin_popcount(mask);
    }
    masks += kBlockMasks;
  }

  static void prefetch(const void* address) {
    _mm_prefetch(static_cast<const char*>(address) + kPrefetchBytes, _MM_HINT_T0);
  }
};

// y[first_token.., the panel's rows] = sums + bias, rounded to nearest, ties to even. sums [kTileRows, kPanelRows]
inline void store_sums(const BitmapWeight& weight, const float* sums, const TileGroups& groups, const void* bias, void* y,
                       int64_t panel, int64_t group) {
  const int64_t row = panel * kPanelRows;
  const int64_t left = weight.out_features - row;
  const auto rows = static_cast<__mmask16>(left < kPanelRows ? (1u << left) - 1 : 0xffffu);
  __m512 b = _mm512_setzero_ps();
  if (bias != nullptr) {
    const __m256i words = _mm256_maskz_loadu_epi16(rows, static_cast<const uint16_t*>(bias) + row);
    b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  for (int64_t i = 0; i < groups.rows; ++i) {
    const int64_t token = group * groups.rows + i;
    if (token >= groups.tokens) return;
    const __m512 wide = _mm512_add_ps(_mm512_load_ps(sums + i * kPanelRows), b);
    const __m512i bits = _mm512_castps_si512(wide);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    // rounding up the bits of a NaN could make it infinite
    const __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
    auto* target = static_cast<uint16_t*>(y) + token * weight.out_features + row;
    _mm256_mask_storeu_epi16(target, rows, _mm512_cvtepi32_epi16(high));
  }
}

inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}

// One block with the x of kGroups groups, x_group apart. With few groups the blocks take turns between two sets of sums,
// so that no product waits for the one before it.
template <int kGroups, int kTurn>
inline void multiply_block(const uint16_t* tile, const uint16_t* x, int64_t x_group) {
  constexpr int kFirst = kGroups <= 2 ? kTurn * kGroups : 0;
  load_tile<kWeights + kTurn>(tile, kTileRowBytes);
  load_tile<kX>(x, kTileRowBytes);
  multiply_tiles<kFirst, kX, kWeights + kTurn>();
  if constexpr (kGroups > 1) {
    load_tile<kX + 1>(x + x_group, kTileRowBytes);
    multiply_tiles<kFirst + 1, kX + 1, kWeights + kTurn>();
  }
  if constexpr (kGroups > 2) {
    load_tile<kX>(x + 2 * x_group, kTileRowBytes);
    multiply_tiles<2, kX, kWeights + kTurn>();
  }
  if constexpr (kGroups > 3) {
    load_tile<kX + 1>(x + 3 * x_group, kTileRowBytes);
    multiply_tiles<3, kX + 1, kWeights + kTurn>();
  }
}

template <int kGroups>
void panel_few(const BitmapWeight& weight, int64_t blocks, const uint16_t* x, const TileGroups& groups,
               const void* bias, void* y, int64_t panel) {
  alignas(64) uint16_t tiles[2][kTileValues];
  alignas(64) float sums[kFewGroups][kTileRows * kPanelRows];
  const int64_t x_block = groups.rows * kBlockInputs;
  Cursor cursor(weight, blocks, panel);
  zero_sums();
  if (blocks > 0) cursor.expand(tiles[0]);
  for (int64_t block = 0; block < blocks; block += 2, x += 2 * x_block) {
    if (block + 1 < blocks) cursor.expand(tiles[1]);
    multiply_block<kGroups, 0>(tiles[0], x, blocks * x_block);
    if (block + 2 < blocks) cursor.expand(tiles[0]);
    if (block + 1 < blocks) multiply_block<kGroups, 1>(tiles[1], x + x_block, blocks * x_block);
  }
  store_tile<0>(sums[0], kTileRowBytes);
  store_tile<1>(sums[1], kTileRowBytes);
  store_tile<2>(sums[2], kTileRowBytes);
  store_tile<3>(sums[3], kTileRowBytes);
  for (int64_t group = 0; group < kGroups; ++group) {
    if (kGroups <= 2) {
      for (int64_t i = 0; i < groups.rows * kPanelRows; ++i) sums[group][i] += sums[kGroups + group][i];
    }
    store_sums(weight, sums[group], groups, bias, y, panel, group);
  }
}

// `count` expanded blocks of kPanels panels with the x of kGroups groups. totals [kGroups, kPanels, kTileRows,
// kPanelRows], read unless `fresh`.
template <int kPanels, int kGroups>
void multiply_chunk(const uint16_t (*tiles)[kChunkBlocks * kTileValues], int64_t count, const uint16_t* x,
                    int64_t x_block, int64_t x_group, float* totals, bool fresh) {
  constexpr int64_t kSums = kTileRows * kPanelRows;
  if (fresh) {
    zero_sums();
  } else {
    load_tile<0>(totals, kTileRowBytes);
    if constexpr (kPanels > 1) load_tile<1>(totals + kSums, kTileRowBytes);
    if constexpr (kGroups > 1) load_tile<2>(totals + kPanels * kSums, kTileRowBytes);
    if constexpr (kGroups > 1 && kPanels > 1) load_tile<3>(totals + 3 * kSums, kTileRowBytes);
  }
  for (int64_t block = 0; block < count; ++block, x += x_block) {
    load_tile<kWeights>(tiles[0] + block * kTileValues, kTileRowBytes);
    if constexpr (kPanels > 1) load_tile<kWeights + 1>(tiles[1] + block * kTileValues, kTileRowBytes);
    load_tile<kX>(x, kTileRowBytes);
    multiply_tiles<0, kX, kWeights>();
    if constexpr (kPanels > 1) multiply_tiles<1, kX, kWeights + 1>();
    if constexpr (kGroups > 1) {
      load_tile<kX + 1>(x + x_group, kTileRowBytes);
      multiply_tiles<2, kX + 1, kWeights>();
      if constexpr (kPanels > 1) multiply_tiles<3, kX + 1, kWeights + 1>();
    }
  }
  store_tile<0>(totals, kTileRowBytes);
  if constexpr (kPanels > 1) store_tile<1>(totals + kSums, kTileRowBytes);
  if constexpr (kGroups > 1) store_tile<2>(totals + kPanels * kSums, kTileRowBytes);
  if constexpr (kGroups > 1 && kPanels > 1) store_tile<3>(totals + 3 * kSums, kTileRowBytes);
}

// Groups first_group to end_group - 1, kSlabGroups at most.
template <int kPanels>
void panels_many(const BitmapWeight& weight, int64_t blocks, const uint16_t* x, const TileGroups& groups,
                 const void* bias, void* y, int64_t panel, int64_t first_group, int64_t end_group) {
  constexpr int64_t kSums = kTileRows * kPanelRows;
  alignas(64) uint16_t tiles[kPanels][kChunkBlocks * kTileValues];
  alignas(64) float totals[kSlabGroups * kPanels * kSums];
  const int64_t x_block = groups.rows * kBlockInputs, x_group = blocks * x_block;
  Cursor cursors[2] = {Cursor(weight, blocks, panel), Cursor(weight, blocks, panel + kPanels - 1)};
  // once at least: without any block the sums are zeros
  for (int64_t first = 0; first == 0 || first < blocks; first += kChunkBlocks) {
    const int64_t count = blocks - first < kChunkBlocks ? blocks - first : kChunkBlocks;
    for (int p = 0; p < kPanels; ++p) {
      for (int64_t block = 0; block < count; ++block) cursors[p].expand(tiles[p] + block * kTileValues);
    }
    for (int64_t group = first_group; group < end_group; group += 2) {
      const auto run = group + 1 < end_group ? multiply_chunk<kPanels, 2> : multiply_chunk<kPanels, 1>;
      run(tiles, count, x + group * x_group + first * x_block, x_block, x_group,
          totals + (group - first_group) * kPanels * kSums, first == 0);
    }
  }
  const float* sums = totals;
  for (int64_t group = first_group; group < end_group; ++group) {
    for (int p = 0; p < kPanels; ++p, sums += kSums) store_sums(weight, sums, groups, bias, y, panel + p, group);
  }
}

}  // namespace

void linear_bitmap_amx(const BitmapWeight& weight, const uint16_t* x, const TileGroups& groups, const void* bias,
                       void* y, int64_t first_panel, int64_t end_panel) {
  const int64_t blocks = (weight.in_features + kBlockInputs - 1) / kBlockInputs;
  configure_tiles(config_of(groups.rows));
  if (groups.count <= kFewGroups) {
    const auto run = groups.count == 1   ? panel_few<1>
                     : groups.count == 2 ? panel_few<2>
                     : groups.count == 3 ? panel_few<3>
                                         : panel_few<4>;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) run(weight, blocks, x, groups, bias, y, panel);
  } else {
    for (int64_t group = 0; group < groups.count; group += kSlabGroups) {
      const int64_t end_group = group + kSlabGroups < groups.count ? group + kSlabGroups : groups.count;
      int64_t panel = first_panel;
      for (; panel + 1 < end_panel; panel += 2) {
        panels_many<2>(weight, blocks, x, groups, bias, y, panel, group, end_group);
      }
      if (panel < end_panel) panels_many<1>(weight, blocks, x, groups, bias, y, panel, group, end_group);
    }
  }
  release_tiles();
}

}  // namespace sparsekern

#endif
