// linear_bitmap_index: splits x into bytes, and the panels over the threads so that each reads as many weights. The work
// itself is in linear_bitmap_index_avx512.cpp.

#include "linear_bitmap_index.h"

#include <cstdlib>

#include "has_avx512.h"
#include "shares.h"

namespace sparsekern {

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
  threads = worth_threads(threads, weight.value_offsets[panels] * 3 * tokens);
  const auto pack = [&](int64_t part, int64_t parts) {
    kernel.pack(source, weight.in_features, packed, finite, tokens * part / parts, tokens * (part + 1) / parts);
  };
  // a lone token is split before the others wake up
  if (tokens == 1) pack(0, 1);
  pack_and_run(threads, tokens != 1, pack, [&](int part, int parts) {
    kernel.linear(call, first_index_panel(weight, part, parts), first_index_panel(weight, part + 1, parts));
  });
  std::free(packed);
  return true;
#else
  (void)weight, (void)x, (void)bias, (void)y, (void)tokens, (void)threads;
  return false;
#endif
}

}  // namespace sparsekern
