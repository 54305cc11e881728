// Whether this machine has what the kernels that expand and compress are compiled for.
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
#endif

}  // namespace sparsekern
