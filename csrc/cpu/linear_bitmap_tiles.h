// What linear_bitmap hands to the tiles of AMX: x, whose rows are those of a tile.
#pragma once

#include <cstring>

#include "../ops.h"
#include "tiles.h"

namespace sparsekern {

// Tokens in groups of at most as many as a tile has rows, all of the same size: the last ones may be padding.
struct TileGroups {
  int64_t tokens;
  int64_t count;
  int64_t rows;  // of each

  // inlined always: see packed_x.h
  [[gnu::always_inline]] explicit TileGroups(int64_t all)
      : tokens(all), count((all + kTileRows - 1) / kTileRows), rows((all + count - 1) / count) {}
};

constexpr int64_t kTileValues = kTileRows * kTileRowBytes / 2;
static_assert(kTileRowBytes == kBlockInputs * 2 && kTileRows == kBlockMasks, "a block of masks is a tile");
static_assert(kTileRowBytes == kPanelRows * 4, "and so are the sums of a panel");

// packed [groups.count, blocks, groups.rows, kBlockInputs] bfloat16: blocks first_block to end_block - 1 of every group.
// Tokens and inputs that do not exist are zeros.
inline void pack_x_tiles(const uint16_t* x, uint16_t* packed, const TileGroups& groups, int64_t in_features,
                         int64_t first_block, int64_t end_block) {
  const int64_t blocks = (in_features + kBlockInputs - 1) / kBlockInputs;
  for (int64_t group = 0; group < groups.count; ++group) {
    for (int64_t block = first_block; block < end_block; ++block) {
      uint16_t* tile = packed + (group * blocks + block) * groups.rows * kBlockInputs;
      const int64_t first = block * kBlockInputs;
      const int64_t inputs = in_features - first < kBlockInputs ? in_features - first : kBlockInputs;
      for (int64_t row = 0; row < groups.rows; ++row, tile += kBlockInputs) {
        const int64_t token = group * groups.rows + row;
        const int64_t here = token < groups.tokens ? inputs : 0;
        if (here > 0) std::memcpy(tile, x + token * in_features + first, static_cast<size_t>(here) * 2);
        std::memset(tile + here, 0, static_cast<size_t>(kBlockInputs - here) * 2);
      }
    }
  }
}

#if defined(__x86_64__)
// The work of one thread, on bfloat16 weights: panels first_panel to end_panel - 1.
//   x  packed by pack_x_tiles
void linear_bitmap_amx(const BitmapWeight& weight, const uint16_t* x, const TileGroups& groups, const void* bias,
                       void* y, int64_t first_panel, int64_t end_panel);
#endif

}  // namespace sparsekern
