// linear_24 by wgmma.sp: which tile serves. The small one where the large one would leave multiprocessors idle.

#include "ops.h"

namespace sparsekern::wgmma {

cudaError_t linear_24(const void* x, const void* values, const void* metadata, const void* bias, void* y, int tokens,
                      int out_features, int in_features, cudaStream_t stream) {
  if (tokens == 0 || out_features == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  const int64_t large_tiles = (int64_t{tokens} + 127) / 128 * ((int64_t{out_features} + 255) / 256);
  const auto multiply = large_tiles < multiprocessors ? linear_24_small : linear_24_large;
  return multiply(x, values, metadata, bias, y, tokens, out_features, in_features, multiprocessors, stream);
}

}  // namespace sparsekern::wgmma
