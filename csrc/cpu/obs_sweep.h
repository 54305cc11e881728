// What the instruction sets of obs_sweep share.
#pragma once

#include "../ops.h"

namespace sparsekern {

// rows that a tile has at most
constexpr int64_t kMostTileRows = 32;

// the tile, its errors, and half as much for saliencies
constexpr int64_t sweep_scratch_bytes(int64_t block) { return block * kMostTileRows * 10; }

// Rows first_row to first_row + rows - 1, at most `rows` of the set.
//   scratch  [sweep_scratch_bytes(block)], aligned to 64
struct ObsSweepTile {
  int64_t rows;
  void (*sweep)(const ObsSweep& sweep, int64_t first_row, int64_t rows, void* scratch);
};

extern const ObsSweepTile kObsSweepPortable;
#if defined(__x86_64__)
extern const ObsSweepTile kObsSweepAvx2;
extern const ObsSweepTile kObsSweepAvx512;
#endif

// A list of lanes that the compiler can count through.
template <int... kLane>
struct Lanes {};

}  // namespace sparsekern
