// obs_sweep on AVX2 and FMA: sixteen registers of eight floats.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")

#include "obs_sweep.h"

namespace sparsekern {
namespace {

constexpr int kLanes = 8;
constexpr int kPanel = 4;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;

}  // namespace
}  // namespace sparsekern

#include "obs_sweep_tile.h"

namespace sparsekern {

const ObsSweepTile kObsSweepAvx2 = {kTileRows, sweep_tile};

}  // namespace sparsekern

#endif
