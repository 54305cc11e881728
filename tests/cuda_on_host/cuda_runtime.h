// What csrc/cuda uses of the CUDA runtime and of CUDA C++, on the CPU: qualifiers, vector types, intrinsics, warp-wide
// functions, atomics. The threads are those of fibers.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <tuple>
#include <type_traits>

#include "fibers.h"

// there is no __shared__: ptx::shared_memory() is all there is
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

// ---- vector types
#define SPARSEKERN_VECTOR(type, element, bytes2, bytes4)                                                      \
  struct alignas(bytes2) type##2 {                                                                            \
    element x, y;                                                                                             \
  };                                                                                                          \
  struct alignas(bytes4) type##4 {                                                                            \
    element x, y, z, w;                                                                                       \
  };                                                                                                          \
  inline type##2 make_##type##2(element x, element y) { return {x, y}; }                                      \
  inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
SPARSEKERN_VECTOR(int, int, 8, 16)
SPARSEKERN_VECTOR(uint, unsigned, 8, 16)
SPARSEKERN_VECTOR(float, float, 8, 16)
SPARSEKERN_VECTOR(short, short, 4, 8)
SPARSEKERN_VECTOR(ushort, unsigned short, 4, 8)
SPARSEKERN_VECTOR(char, signed char, 2, 4)
SPARSEKERN_VECTOR(uchar, unsigned char, 2, 4)
#undef SPARSEKERN_VECTOR
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};

// ---- the runtime
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
};
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxRegistersPerMultiprocessor,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth,
  cudaDevAttrClockRate,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
namespace on_host {
// a small Hopper; a test may ask for another card
inline int multiprocessors = 4;
inline int shared_bytes_per_block = 227 * 1024;
inline int shared_bytes_per_multiprocessor = 228 * 1024;
inline int compute_major = 9, compute_minor = 0;
// what was launched; only_counted: and nothing of it was run
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
};
inline std::vector<Launch> launches;
inline bool only_counted = false;
}  // namespace on_host
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // a driver asks the card for its clocks, which takes longer than a launch
  static int clocks_read = 0;
  const bool slow = attribute == cudaDevAttrClockRate || attribute == cudaDevAttrMemoryClockRate;
  if (slow && ++clocks_read > 2) on_host::fail("the card's clocks are read again");
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = on_host::multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = on_host::shared_bytes_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = on_host::shared_bytes_per_multiprocessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 64 * 1024; break;
    // an H200's
    case cudaDevAttrMemoryClockRate: *value = 3201000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 6144; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrComputeCapabilityMajor: *value = on_host::compute_major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = on_host::compute_minor; break;
  }
  return cudaSuccess;
}

namespace sparsekern::cuda {

// Runs the grid, and comes back when it has ended.
template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Args... args) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (shared_bytes > static_cast<size_t>(on_host::shared_bytes_per_block)) return cudaErrorInvalidValue;
  on_host::launches.push_back({grid, block, shared_bytes});
  if (on_host::only_counted) return cudaSuccess;
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(args)...);
  on_host::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}

}  // namespace sparsekern::cuda

// ---- bits
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned value) { return bits_as<float>(value); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __int_as_float(int value) { return bits_as<float>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(value) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> std::min(shift, 32u));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}

// ---- barriers, fences
inline void __syncthreads() { on_host::wait_at_barrier(); }
inline void __syncwarp(unsigned mask = on_host::kAllLanes) {
  on_host::meet(mask, "__syncwarp", nullptr, nullptr, [](const on_host::Meeting&) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles: T of 4 or 8 bytes, as the results of all lanes are of one moment
namespace on_host {
template <typename T, typename Source>
T shuffle(unsigned mask, const char* name, T value, Source source) {
  T result = value;
  const int from = source(static_cast<int>(lane()));
  struct In {
    T value;
    int from;
  } in{value, from};
  meet(mask, name, &in, &result, [](const Meeting& all) {
    T moved[32];
    for (int i = 0; i < 32; ++i) {
      if (!(all.came >> i & 1)) continue;
      const int from = static_cast<const In*>(all.in[i])->from;
      if (!(all.came >> from & 1)) fail("a shuffle reads from a lane that is not in its mask");
      moved[i] = static_cast<const In*>(all.in[from])->value;
    }
    for (int i = 0; i < 32; ++i) {
      if (all.came >> i & 1) *static_cast<T*>(all.out[i]) = moved[i];
    }
  });
  return result;
}
}  // namespace on_host
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return on_host::shuffle(mask, "__shfl_sync", value,
                          [=](int lane) { return (lane & ~(width - 1)) | (from & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return on_host::shuffle(mask, "__shfl_xor_sync", value, [=](int lane) {
    const int from = lane ^ bits;
    // into a later segment: the lane keeps its own
    return from / width > lane / width ? lane : from;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return on_host::shuffle(mask, "__shfl_down_sync", value, [=](int lane) {
    const int from = lane + static_cast<int>(by);
    return from / width == lane / width ? from : lane;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return on_host::shuffle(mask, "__shfl_up_sync", value, [=](int lane) {
    const int from = lane - static_cast<int>(by);
    return from >= 0 && from / width == lane / width ? from : lane;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  on_host::meet(mask, "__ballot_sync", &predicate, &result, [](const on_host::Meeting& all) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
      if (all.came >> i & 1 && *static_cast<const int*>(all.in[i])) votes |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (all.came >> i & 1) *static_cast<unsigned*>(all.out[i]) = votes;
    }
  });
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == (mask & on_host::existing_lanes());
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  unsigned result = 0;
  on_host::meet(mask, "__reduce_add_sync", &value, &result, [](const on_host::Meeting& all) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) {
      if (all.came >> i & 1) sum += *static_cast<const unsigned*>(all.in[i]);
    }
    for (int i = 0; i < 32; ++i) {
      if (all.came >> i & 1) *static_cast<unsigned*>(all.out[i]) = sum;
    }
  });
  return result;
}

// ---- atomics: fibers give way only where they meet
template <typename T>
T atomicExch(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = value;
  on_host::block->told = true;
  return old;
}
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  return atomicExch(at, static_cast<T>(*at + value));
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
  return atomicExch(at, std::max(*at, value));
}
template <typename T>
T atomicMin(T* at, std::common_type_t<T> value) {
  return atomicExch(at, std::min(*at, value));
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> value) {
  return atomicExch(at, *at | value);
}
template <typename T>
T atomicCAS(T* at, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return atomicExch(at, *at == compare ? value : *at);
}
inline unsigned atomicInc(unsigned* at, unsigned last) { return atomicExch(at, *at >= last ? 0 : *at + 1); }
