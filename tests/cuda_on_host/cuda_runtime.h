// What the simple kernels of csrc/cuda need of CUDA, on the CPU: a grid is a loop over its threads, one after the other.
// For kernels whose threads share nothing: there is no shared memory, no barrier and no shuffle here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__

struct dim3 {
  unsigned x, y = 1, z = 1;
};
inline dim3 threadIdx{}, blockIdx{}, blockDim{};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// stands for kernel<<<blocks, threads, 0, stream>>>(args...)
template <typename... Parameters, typename... Args>
void launch_on_host(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Args... args) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(args...);
  }
}

struct __half {
  uint16_t bits;
};
__attribute__((target("f16c"))) inline float __half2float(__half value) { return _cvtsh_ss(value.bits); }
__attribute__((target("f16c"))) inline __half __float2half_rn(float value) {
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
