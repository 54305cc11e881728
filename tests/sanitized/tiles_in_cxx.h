// csrc/cpu/tiles.h in plain C++, so that what is written with tiles runs on any processor and under the sanitizers. Each
// thread has its own tiles; what a processor answers with an exception ends the program with a line.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILERELEASE, TILEZERO,
// TILELOADD, TILESTORED, TDPBF16PS.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace sparsekern {
namespace {

struct Tiles {
  TileConfig config;
  unsigned char data[kTiles][kTileRows][kTileRowBytes];
};

inline Tiles& tiles() {
  static thread_local Tiles own = {};
  return own;
}

inline void tiles_expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "a processor with tiles would refuse: %s\n", what);
  std::abort();
}

inline void configure_tiles(const TileConfig& config) {
  tiles_expect(config.palette <= 1, "a palette that there is not");
  for (unsigned char byte : config.reserved) tiles_expect(byte == 0, "a reserved byte that is not zero");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    tiles_expect(tile < kTiles || (rows == 0 && bytes == 0), "a tile that there is not");
    tiles_expect(rows <= kTileRows && bytes <= kTileRowBytes, "a tile too large");
    tiles_expect((rows == 0) == (bytes == 0), "rows without bytes, or bytes without rows");
  }
  // a processor would not mind; but it saves and restores the tiles of a thread until they are released
  if (tiles().config.palette != 0 && config.palette != 0) {
    std::fprintf(stderr, "tiles are configured that were not released after their last use\n");
    std::abort();
  }
  tiles().config = config;
  std::memset(tiles().data, 0, sizeof tiles().data);
}

inline void release_tiles() { tiles() = {}; }

inline void tiles_expect_used(int tile) {
  tiles_expect(tiles().config.palette == 1, "tiles that are not configured");
  tiles_expect(tiles().config.rows[tile] != 0, "a tile that is not configured");
}

template <int kTile>
inline void zero_tile() {
  static_assert(0 <= kTile && kTile < kTiles, "there are eight");
  tiles_expect_used(kTile);
  std::memset(tiles().data[kTile], 0, sizeof tiles().data[kTile]);
}

template <int kTile>
inline void load_tile(const void* source, int64_t stride) {
  zero_tile<kTile>();
  const TileConfig& config = tiles().config;
  for (int row = 0; row < config.rows[kTile]; ++row) {
    std::memcpy(tiles().data[kTile][row], static_cast<const char*>(source) + row * stride, config.row_bytes[kTile]);
  }
}

template <int kTile>
inline void store_tile(void* target, int64_t stride) {
  static_assert(0 <= kTile && kTile < kTiles, "there are eight");
  tiles_expect_used(kTile);
  const TileConfig& config = tiles().config;
  for (int row = 0; row < config.rows[kTile]; ++row) {
    std::memcpy(static_cast<char*>(target) + row * stride, tiles().data[kTile][row], config.row_bytes[kTile]);
  }
}

// Subnormal numbers are zero, whatever MXCSR says.
inline float tiles_flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float tiles_bfloat16(const unsigned char* source) {
  uint16_t half;
  std::memcpy(&half, source, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return tiles_flush(wide);
}

// The even and the odd products are summed apart, each by fused multiply-adds, then added to each other and to the sum.
template <int kSum, int kA, int kB>
inline void multiply_tiles() {
  static_assert(kSum != kA && kA != kB && kSum != kB, "three tiles, or it is no instruction");
  for (int tile : {kSum, kA, kB}) tiles_expect_used(tile);
  const TileConfig& config = tiles().config;
  for (int tile : {kSum, kA, kB}) tiles_expect(config.row_bytes[tile] % 4 == 0, "rows that are not of dwords");
  tiles_expect(config.rows[kSum] == config.rows[kA], "sums that have not the rows of a");
  tiles_expect(config.row_bytes[kSum] == config.row_bytes[kB], "sums that have not the columns of b");
  tiles_expect(config.row_bytes[kA] / 4 == config.rows[kB], "a with other pairs than b");
  auto& data = tiles().data;
  for (int m = 0; m < config.rows[kSum]; ++m) {
    for (int n = 0; n < config.row_bytes[kSum] / 4; ++n) {
      float apart[2] = {0.0f, 0.0f};
      for (int k = 0; k < config.rows[kB]; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float a = tiles_bfloat16(data[kA][m] + 4 * k + 2 * half);
          const float b = tiles_bfloat16(data[kB][k] + 4 * n + 2 * half);
          apart[half] = tiles_flush(std::fma(a, b, apart[half]));
        }
      }
      float sum;
      std::memcpy(&sum, data[kSum][m] + 4 * n, sizeof sum);
      sum = tiles_flush(tiles_flush(sum) + tiles_flush(apart[0] + apart[1]));
      std::memcpy(data[kSum][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace
}  // namespace sparsekern
