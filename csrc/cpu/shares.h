// How the panels of a weight are shared out among threads.
#pragma once

#include <cstdint>

namespace sparsekern {

// A second thread is worth while from this much on. Measured on Zen 5 with threads that still spin, as libgomp's do for
// some 10 ms after their last work: a parallel region costs 1.6 us, the second thread begins after 1.0; half of a bitmap
// with one token is as fast as all of it at 60 to 70 KB from the cache, and earlier from memory. Once they sleep, a region
// costs 50 us.
constexpr int64_t kBytesPerThread = 65536;

inline int worth_threads(int threads, int64_t bytes) {
  const int64_t worth = 1 + bytes / kBytesPerThread;
  return worth < threads ? static_cast<int>(worth) : threads;
}

// The first panel of a part, when `parts` parts of panels first to end - 1 shall read as many bytes each. bytes(a, b) are
// those of panels a to b - 1.
template <class Bytes>
int64_t first_panel_of_part(int64_t first, int64_t end, int part, int parts, Bytes&& bytes) {
  if (part == parts) return end;
  const int64_t target = bytes(first, end) / parts * part;
  int64_t low = first, high = end;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bytes(first, middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls run(first, end) for parts of panels first_panel to end_panel - 1 that read as many bytes each, each on its own
// thread; bytes(a, b) as above.
template <class Bytes, class Run>
void share_out(int threads, int64_t first_panel, int64_t end_panel, Bytes&& bytes, Run&& run) {
  threads = worth_threads(threads, bytes(first_panel, end_panel));
  if (threads <= 1) {
    run(first_panel, end_panel);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; ++part) {
    run(first_panel_of_part(first_panel, end_panel, part, threads, bytes),
        first_panel_of_part(first_panel, end_panel, part + 1, threads, bytes));
  }
}

// Calls pack(part, parts) for every part, unless nothing has to be packed, and run(part, parts) when all are packed, each
// part on its own thread. With one thread it starts no parallel region.
template <class Pack, class Run>
void pack_and_run(int threads, bool packs, Pack&& pack, Run&& run) {
  if (threads <= 1) {
    if (packs) pack(0, 1);
    run(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    if (packs) {
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) pack(part, threads);
    }
#pragma omp for schedule(static, 1) nowait
    for (int part = 0; part < threads; ++part) run(part, threads);
  }
}

}  // namespace sparsekern
