// The tile registers of AMX, one function an instruction. A processor that has them is not needed to run what is written
// with them: with SPARSEKERN_TILES_IN_CXX the same functions are plain C++, in tests/sanitized/.
//
// Inline assembly, because the intrinsics take a tile's number as a written digit, and because those of GCC 12 do not tell
// the compiler that they read and write memory.
#pragma once

#include <cstdint>

namespace sparsekern {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// What LDTILECFG reads. A tile that is not used has neither rows nor bytes.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace sparsekern

#if defined(SPARSEKERN_TILES_IN_CXX)
#include "tiles_in_cxx.h"
#else

namespace sparsekern {
namespace {

inline void configure_tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

// The processor saves no tiles of a thread that has released them.
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows of `source` are stride bytes apart.
template <int kTile>
inline void load_tile(const void* source, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* target, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(kTile) : "memory");
}

// sum[m, n] += a[m, 2 k] b[k, 2 n] + a[m, 2 k + 1] b[k, 2 n + 1] over all k; sum float32, a and b bfloat16
template <int kSum, int kA, int kB>
inline void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace sparsekern

#endif
