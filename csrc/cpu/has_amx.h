// Whether this process may use the tiles of AMX. __builtin_cpu_supports does not know: it answers no on machines that
// have them, and Linux gives their registers only to a process that has asked.

#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsekern {

#if defined(SPARSEKERN_TILES_IN_CXX)

inline bool has_amx_bf16() { return true; }

#elif defined(__x86_64__) && defined(__linux__)

inline bool ask_for_tiles() {
  constexpr unsigned kOsxsave = 1u << 27;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr unsigned kTileConfigAndData = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kAmxBf16 | kAmxTile)) != 0) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((~low & kTileConfigAndData) != 0) return false;
  // once, for all threads, those to come too, and for children
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

inline bool has_amx_bf16() {
  static const bool has = ask_for_tiles();
  return has;
}

#else

inline bool has_amx_bf16() { return false; }

#endif

}  // namespace sparsekern
