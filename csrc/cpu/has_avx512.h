// Whether this machine has what the kernels on packed and on dense weights are compiled for.
#pragma once

namespace sparsekern {

#if defined(__x86_64__)
// every processor with VBMI2 has the others
inline bool has_avx512_vbmi2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("popcnt");
}

inline bool has_avx512bw() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi2");
}

// f16c came with them, and compilers cannot all ask for it
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

// Where there is VDPBF16PS: whether it is faster than a shift, an and and two fused multiply-adds, which take as many
// inputs. On Zen 5 it is: 512 x 512 at 16 tokens, in the cache, in 35 us and not 51. Intel's processors, which take two
// cycles on both ports for it, gain nothing: by the name of the maker, because to measure at load takes longer.
inline bool dot_is_faster() {
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
}
#endif

}  // namespace sparsekern
