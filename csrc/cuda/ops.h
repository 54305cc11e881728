// Every CUDA op, with the layout of what it reads and writes. Raw device pointers, sizes and a stream; each returns the
// launch error and leaves y unwritten when there is one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// A 2:4 weight in the order of mma.sp.m16n8k32, as ops/fragments_24.py makes it: panels of kPanelRows outputs by chunks
// of kChunkInputs inputs, a chunk being kChunkTiles tiles of 16 outputs x 32 inputs; zeros fill the last of each.
//   values    [panels, chunks, kChunkTiles, 32 lanes, 8], 16 bytes are a lane's A fragment of a tile
//   metadata  [panels, chunks, 32 lanes, 4], register r serves tile 2r with sparsity selector 0, tile 2r + 1 with 1
// Both lie on 16 bytes.
constexpr int64_t kPanelRows = 16;
constexpr int64_t kChunkInputs = 256;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kChunkTiles = kChunkInputs / kTileInputs;
constexpr int64_t kChunkValues = kPanelRows * kChunkInputs / 2;
constexpr int64_t kChunkWords = 32 * 4;  // of metadata

// linear_24: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], W 2:4 in the order above, 0 to kLinear24Tokens tokens.
//   x          [tokens, in_features], in_features a multiple of 4; any alignment, fastest on 16 bytes with in_features a
//              multiple of 8
//   bias       [out_features] or null
//   y          [tokens, out_features], every element written
//   workspace  as many bytes as linear_24_workspace says for the current device, on 16 bytes; no other launch may use it
//              meanwhile; null where that is 0
// Accumulates in float32, the same bits every time. Inputs at pruned positions are not multiplied. Needs sm_80 or newer.
constexpr int64_t kLinear24Tokens = 64;

cudaError_t linear_24_workspace(int64_t tokens, int64_t out_features, int64_t in_features, int64_t* bytes);
cudaError_t linear_24(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint32_t* metadata,
                      const __nv_bfloat16* bias, __nv_bfloat16* y, void* workspace, int64_t tokens,
                      int64_t out_features, int64_t in_features, cudaStream_t stream);
cudaError_t linear_24(const __half* x, const __half* values, const uint32_t* metadata, const __half* bias, __half* y,
                      void* workspace, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream);

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

// linear_24_prefill: y[t, o] = sum_i x[t, i] W[o, i] + bias[o] for many tokens, W in the order of mma.sp.
//   x                  [tokens, in_features], fastest where every row lies on 16 bytes
//   values, metadata   as above
//   bias               [out_features] or null
//   y                  [tokens, out_features], every element written
// Accumulates in float32. What is not kept is not multiplied: NaN and inf in x reach y through kept weights only.
// At most kLinear24PrefillInputs in_features, 2^30 tokens and out_features. The same bits every time.
constexpr int64_t kLinear24PrefillInputs = int64_t{1} << 23;

cudaError_t linear_24_prefill(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint32_t* metadata,
                              const __nv_bfloat16* bias, __nv_bfloat16* y, int64_t tokens, int64_t out_features,
                              int64_t in_features, cudaStream_t stream);
cudaError_t linear_24_prefill(const __half* x, const __half* values, const uint32_t* metadata, const __half* bias,
                              __half* y, int64_t tokens, int64_t out_features, int64_t in_features,
                              cudaStream_t stream);

// A bitmap weight in the order of mma.m16n8k16, as ops/bitmap_fragments.py makes it: panels of kFragmentRows outputs by
// segments of kSegmentInputs inputs, a segment being kSegmentBlocks blocks of 64. Lane 4 g + t of a warp has the rows g
// and g + 8 of the panel and, of a block, the inputs 16 t .. 16 t + 15; for each 4 of them first row g, then row g + 8.
//   masks      [panels, segments, kSegmentBlocks, 32 lanes], bit 8 i + 4 h + j is row g + 8 h, input 16 t + 4 i + j
//   cells      [cell_rows, 4 lanes, 2, 4] bytes, 4 kept values of a lane: their low bytes, their high bytes
//   quad_rows  [panels * segments * kLaneQuads + 1], where the cells of lanes 4 q .. 4 q + 3 of a segment begin
//   capacity   the most rows of cells that any quad of a segment has
// All lie on 16 bytes.
constexpr int64_t kFragmentRows = 16;
constexpr int64_t kSegmentInputs = 512;
constexpr int kSegmentBlocks = 8;
constexpr int kBlockWeights = 32;  // of a lane
constexpr int kLaneQuads = 8;

struct BitmapFragments {
  const uint32_t* masks;
  const unsigned char* cells;
  const int32_t* quad_rows;
  int cell_rows;
  int capacity;
  int64_t out_features;
  int64_t in_features;

  int64_t panels() const { return (out_features + kFragmentRows - 1) / kFragmentRows; }
  int64_t segments() const { return (in_features + kSegmentInputs - 1) / kSegmentInputs; }
};

// dense [out_features, in_features] of 2-byte elements, every one written
cudaError_t bitmap_fragments_to_dense(const BitmapFragments& weight, void* dense, cudaStream_t stream);

// linear_bitmap_fragments: y[t, o] = sum_i x[t, i] W[o, i] + bias[o] for at most kBitmapFragmentsTokens tokens.
//   x          [tokens, in_features]
//   bias       [out_features] or null
//   y          [tokens, out_features], every element written
//   workspace  as many bytes as linear_bitmap_fragments_workspace says; what it holds does not matter
// Accumulates in float32, in an order that depends on sizes and card alone.
constexpr int64_t kBitmapFragmentsTokens = 64;

cudaError_t linear_bitmap_fragments_workspace(const BitmapFragments& weight, int64_t tokens, int64_t* bytes);
cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __nv_bfloat16* x, const __nv_bfloat16* bias,
                                    __nv_bfloat16* y, void* workspace, int64_t tokens, cudaStream_t stream);
cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __half* x, const __half* bias, __half* y,
                                    void* workspace, int64_t tokens, cudaStream_t stream);

}  // namespace sparsekern::cuda
