// obs_sweep on AVX-512: thirty-two registers of sixteen floats.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")

#include "obs_sweep.h"

namespace sparsekern {
namespace {

constexpr int kLanes = 16;
constexpr int kPanel = 8;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

}  // namespace
}  // namespace sparsekern

#include "obs_sweep_tile.h"

namespace sparsekern {

const ObsSweepTile kObsSweepAvx512 = {kTileRows, sweep_tile};

}  // namespace sparsekern

#endif
