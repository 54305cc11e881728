// obs_sweep on whatever the compiler takes for its baseline: registers of four floats.

#include "obs_sweep.h"

namespace sparsekern {
namespace {

constexpr int kLanes = 4;
constexpr int kPanel = 4;
using AllLanes = Lanes<0, 1, 2, 3>;

}  // namespace
}  // namespace sparsekern

#include "obs_sweep_tile.h"

namespace sparsekern {

const ObsSweepTile kObsSweepPortable = {kTileRows, sweep_tile};

}  // namespace sparsekern
