// linear_bitmap: the simple form, made to be right on every card. It reads the format as it is saved.
//
// One thread owns one output row and kTokens tokens: it walks the row's bitmap bit by bit, takes the row's next value at
// each one, and multiplies it into one accumulator a token. Threads share nothing. Neighbours own neighbouring rows, so
// they ask for the same x at about the same time and store y side by side; each reads its own run of values, which only
// the cache makes bearable.

#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kTokens = 4;  // per thread: a weight that was decoded serves them all
constexpr int kThreads = 128;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename Value>
__global__ void linear_bitmap_kernel(
    const Value* __restrict__ x,              // [tokens, in_features]
    const Value* __restrict__ values,         // [kept]
    const uint8_t* __restrict__ bitmap,       // [out_features, ceil(in_features / 8)]
    const int64_t* __restrict__ row_offsets,  // [out_features + 1]
    const Value* __restrict__ bias,           // [out_features] or null
    Value* __restrict__ y,                    // [tokens, out_features]
    int64_t tokens, int64_t out_features, int64_t in_features) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread % out_features;
  const int64_t first_token = thread / out_features * kTokens;
  if (first_token >= tokens) return;

  const int64_t row_bytes = (in_features + 7) / 8;
  const uint8_t* bitmap_read = bitmap + row * row_bytes;
  const Value* value_read = values + row_offsets[row];
  const Value* x_read[kTokens];
  float sum[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    // past the last token: the last one again, never stored
    const int64_t token = first_token + t < tokens ? first_token + t : tokens - 1;
    x_read[t] = x + token * in_features;
    sum[t] = 0.0f;
  }

  for (int64_t input = 0; input < in_features; ++input) {
    const bool kept = bitmap_read[input / 8] >> (input % 8) & 1;
    // a pruned weight is multiplied too: NaN and inf in x reach every output, as in the dense product
    const float weight = kept ? to_float(*value_read++) : 0.0f;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sum[t] += to_float(x_read[t][input]) * weight;
  }

  const float row_bias = bias == nullptr ? 0.0f : to_float(bias[row]);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (first_token + t < tokens) store(y + (first_token + t) * out_features + row, sum[t] + row_bias);
  }
}

template <typename Value>
cudaError_t multiply(const Value* x, const Value* values, const uint8_t* bitmap, const int64_t* row_offsets,
                     const Value* bias, Value* y, int64_t tokens, int64_t out_features, int64_t in_features,
                     cudaStream_t stream) {
  const int64_t threads = (tokens + kTokens - 1) / kTokens * out_features;
  if (threads == 0) return cudaSuccess;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(linear_bitmap_kernel<Value>, static_cast<unsigned>(blocks), kThreads, 0, stream, x, values, bitmap,
                row_offsets, bias, y, tokens, out_features, in_features);
}

}  // namespace

cudaError_t linear_bitmap(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint8_t* bitmap,
                          const int64_t* row_offsets, const __nv_bfloat16* bias, __nv_bfloat16* y, int64_t tokens,
                          int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return multiply(x, values, bitmap, row_offsets, bias, y, tokens, out_features, in_features, stream);
}

cudaError_t linear_bitmap(const __half* x, const __half* values, const uint8_t* bitmap, const int64_t* row_offsets,
                          const __half* bias, __half* y, int64_t tokens, int64_t out_features, int64_t in_features,
                          cudaStream_t stream) {
  return multiply(x, values, bitmap, row_offsets, bias, y, tokens, out_features, in_features, stream);
}

cudaError_t linear_bitmap(const float* x, const float* values, const uint8_t* bitmap, const int64_t* row_offsets,
                          const float* bias, float* y, int64_t tokens, int64_t out_features, int64_t in_features,
                          cudaStream_t stream) {
  return multiply(x, values, bitmap, row_offsets, bias, y, tokens, out_features, in_features, stream);
}

}  // namespace sparsekern::cuda
