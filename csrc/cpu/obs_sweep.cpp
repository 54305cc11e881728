// obs_sweep: chooses the instruction set and splits the tiles of rows over the threads. The work itself is in
// obs_sweep_tile.h.

#include "obs_sweep.h"

#include <cstdlib>

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
#endif

// in the order of kObsSweepSets
const ObsSweepTile* const kTiles[] = {
#if defined(__x86_64__)
    &kObsSweepAvx512,
    &kObsSweepAvx2,
#endif
    &kObsSweepPortable,
};

// To wake a thread takes as long as this many multiply-adds of one.
constexpr int64_t kWorkPerThread = 1 << 18;

}  // namespace

const InstructionSet kObsSweepSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512},
    {"avx2", has_avx2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

bool obs_sweep(const ObsSweep& sweep, int set, int threads) {
  const ObsSweepTile& tile = *kTiles[set];
  const int64_t tiles = (sweep.rows + tile.rows - 1) / tile.rows;
  const int64_t worth = 1 + sweep.rows * sweep.block * sweep.block / 2 / kWorkPerThread;
  if (worth < threads) threads = static_cast<int>(worth);
  const int64_t scratch_bytes = sweep_scratch_bytes(sweep.block);
  void* scratch = std::aligned_alloc(64, static_cast<size_t>(scratch_bytes * threads));
  if (scratch == nullptr) return false;
  const auto part = [&](int thread) {
    void* mine = static_cast<char*>(scratch) + scratch_bytes * thread;
    for (int64_t i = tiles * thread / threads; i < tiles * (thread + 1) / threads; ++i) {
      const int64_t first = i * tile.rows;
      tile.sweep(sweep, first, sweep.rows - first < tile.rows ? sweep.rows - first : tile.rows, mine);
    }
  };
  if (threads <= 1) {
    part(0);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) part(thread);
  }
  std::free(scratch);
  return true;
}

}  // namespace sparsekern
