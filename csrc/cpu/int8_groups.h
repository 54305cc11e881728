// How the int8 products share out their work: tokens in groups, whose x is rounded first, and parts of the weight.
#pragma once

#include <cstdlib>

#include "linear_bitmap_int8.h"
#include "shares.h"

namespace sparsekern {

// Calls pack(group) for every group of tokens, whose rows are group_bytes long, then linear(groups, count, part, parts) for
// every part, each on its own thread; `bytes` is what all parts read of the weight. Returns false when there is no memory.
template <class Pack, class Linear>
bool linear_in_groups(int64_t tokens, int64_t group_bytes, int64_t bytes, int threads, Pack&& pack, Linear&& linear) {
  const int64_t count = (tokens + kGroupTokens - 1) / kGroupTokens;
  // one line more: aligned_alloc never gets zero bytes
  auto* rows = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(count * group_bytes + 64)));
  auto* groups = static_cast<Int8Group*>(std::calloc(static_cast<size_t>(count), sizeof(Int8Group)));
  const bool memory = rows != nullptr && groups != nullptr;
  if (memory) {
    for (int64_t g = 0; g < count; ++g) {
      groups[g].rows = rows + g * group_bytes;
      groups[g].first_token = tokens * g / count;
      groups[g].tokens = tokens * (g + 1) / count - groups[g].first_token;
    }
    // every group of tokens after the first reads the weight again, from the cache
    threads = worth_threads(threads, bytes * count);
    if (threads <= 1) {
      for (int64_t g = 0; g < count; ++g) pack(groups[g]);
      linear(groups, count, 0, 1);
    } else {
      // a single group is rounded before the others wake up
      if (count == 1) pack(groups[0]);
#pragma omp parallel num_threads(threads)
      {
        if (count > 1) {
#pragma omp for schedule(static)
          for (int64_t g = 0; g < count; ++g) pack(groups[g]);
        }
#pragma omp for schedule(static, 1) nowait
        for (int part = 0; part < threads; ++part) linear(groups, count, part, threads);
      }
    }
  }
  std::free(rows);
  std::free(groups);
  return memory;
}

}  // namespace sparsekern
