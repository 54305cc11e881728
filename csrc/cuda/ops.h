// Every CUDA op, with the layout of what it reads and writes. Raw device pointers, sizes and a stream; each returns the
// launch error and leaves y unwritten when there is one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// linear_bitmap: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], W as formats/bitmap.py saves it.
//   x            [tokens, in_features]
//   values       [kept], the kept weights row by row
//   bitmap       [out_features, ceil(in_features / 8)], bit i % 8 of byte i / 8 = input i is kept, low bit first
//   row_offsets  [out_features + 1], values[row_offsets[o]] is the first of row o
//   bias         [out_features] or null
//   y            [tokens, out_features], every element written
// Accumulates in float32.
cudaError_t linear_bitmap(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint8_t* bitmap,
                          const int64_t* row_offsets, const __nv_bfloat16* bias, __nv_bfloat16* y, int64_t tokens,
                          int64_t out_features, int64_t in_features, cudaStream_t stream);
cudaError_t linear_bitmap(const __half* x, const __half* values, const uint8_t* bitmap, const int64_t* row_offsets,
                          const __half* bias, __half* y, int64_t tokens, int64_t out_features, int64_t in_features,
                          cudaStream_t stream);
cudaError_t linear_bitmap(const float* x, const float* values, const uint8_t* bitmap, const int64_t* row_offsets,
                          const float* bias, float* y, int64_t tokens, int64_t out_features, int64_t in_features,
                          cudaStream_t stream);

}  // namespace sparsekern::cuda
