// linear_bitmap_int8_index: rounds x to integers, and splits the panels over the threads so that each reads as many weights.
// The work itself is in linear_bitmap_int8_index_avx512.cpp.

#include "linear_bitmap_int8_index.h"

#include "has_avx512.h"
#include "int8_groups.h"

namespace sparsekern {

bool has_linear_bitmap_int8_index() {
#if defined(__x86_64__)
  return has_avx512_vbmi2() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool linear_bitmap_int8_index(const BitmapIndexWeight& weight, const Int8Scales& scales, const void* x,
                              const void* bias, void* y, int64_t tokens, int threads) {
#if defined(__x86_64__)
  const LinearBitmapInt8Index& kernel = kLinearBitmapInt8IndexAvx512;
  const Int8IndexCall call = {&weight, &scales, bias, y};
  const int64_t kept = weight.value_offsets[panels_of(weight.out_features)];
  return linear_in_groups(
      tokens, window_count(weight) * kMostByteRows * kWindowInputs, kept * 2, threads,
      [&](Int8Group& group) { kernel.pack(x, scales.dtype, weight.in_features, group); },
      [&](const Int8Group* groups, int64_t count, int part, int parts) {
        kernel.linear(call, groups, count, first_index_panel(weight, part, parts),
                      first_index_panel(weight, part + 1, parts));
      });
#else
  (void)weight, (void)scales, (void)x, (void)bias, (void)y, (void)tokens, (void)threads;
  return false;
#endif
}

}  // namespace sparsekern
