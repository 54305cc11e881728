// linear_bitmap_index: splits x into bytes, and the panels over the threads so that each reads as many weights. The work
// itself is in linear_bitmap_index_avx512.cpp.

#include "linear_bitmap_index.h"

#include <cstdlib>

#include "has_avx512.h"

namespace sparsekern {
namespace {

constexpr int64_t kBytesPerThread = 65536;

}  // namespace

bool has_linear_bitmap_index() {
#if defined(__x86_64__)
  return has_avx512_vbmi2() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool linear_bitmap_index(const BitmapIndexWeight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                         int threads) {
#if defined(__x86_64__)
  const LinearBitmapIndex& kernel = kLinearBitmapIndexAvx512;
  const int64_t panels = panels_of(weight.out_features), windows = window_count(weight);
  const int64_t bytes = tokens * windows * 2 * kWindowInputs;
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((bytes + tokens + 64) / 64 * 64 + 64)));
  if (packed == nullptr) return false;
  uint8_t* finite = packed + bytes;
  const auto* source = static_cast<const uint16_t*>(x);
  const IndexCall call = {&weight, packed, finite, static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y), tokens};
  const int64_t worth = 1 + weight.value_offsets[panels] * 3 * tokens / kBytesPerThread;
  threads = worth < threads ? static_cast<int>(worth) : threads;
  if (threads <= 1) {
    kernel.pack(source, weight.in_features, packed, finite, 0, tokens);
    kernel.linear(call, 0, panels);
  } else {
    if (tokens == 1) kernel.pack(source, weight.in_features, packed, finite, 0, 1);
#pragma omp parallel num_threads(threads)
    {
      if (tokens > 1) {
#pragma omp for schedule(static, 1)
        for (int part = 0; part < threads; ++part) {
          kernel.pack(source, weight.in_features, packed, finite, tokens * part / threads, tokens * (part + 1) / threads);
        }
      }
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        kernel.linear(call, first_index_panel(weight, part, threads), first_index_panel(weight, part + 1, threads));
      }
    }
  }
  std::free(packed);
  return true;
#else
  (void)weight, (void)x, (void)bias, (void)y, (void)tokens, (void)threads;
  return false;
#endif
}

}  // namespace sparsekern
