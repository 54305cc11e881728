// The optional module sparsekern._wgmma: what it computes, and the layout of what it reads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::wgmma {

// Of CUTLASS's sparse layout for sm_90 and 16-bit types: metadata is laid out in atoms of 64 outputs x 128 inputs.
constexpr int64_t kAtomRows = 64;
constexpr int64_t kAtomInputs = 128;
constexpr int64_t kAtomBytes = kAtomRows * kAtomInputs / 8;
constexpr int64_t kInputsMultiple = 16;  // a row of values fills whole 16 bytes
constexpr int64_t kOutputsMultiple = 8;  // and so does one of y

// linear_24: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], all bfloat16, W 2:4. Needs compute capability 9.0.
//   x         [tokens, in_features], on 16 bytes
//   values    [out_features, in_features / 2], as formats/semi_structured.py saves them, on 16 bytes
//   metadata  [ceil(in_features / 128), ceil(out_features / 64), kAtomBytes], as ops/wgmma_24.py says, on 16 bytes
//   bias      [out_features] or null
//   y         [tokens, out_features], every element written, on 16 bytes
// Accumulates in float32.
cudaError_t linear_24(const void* x, const void* values, const void* metadata, const void* bias, void* y, int tokens,
                      int out_features, int in_features, cudaStream_t stream);

// One tile each: 256 outputs x 128 tokens, 128 x 128.
cudaError_t linear_24_large(const void* x, const void* values, const void* metadata, const void* bias, void* y,
                            int tokens, int out_features, int in_features, int multiprocessors, cudaStream_t stream);
cudaError_t linear_24_small(const void* x, const void* values, const void* metadata, const void* bias, void* y,
                            int tokens, int out_features, int in_features, int multiprocessors, cudaStream_t stream);

}  // namespace sparsekern::wgmma
