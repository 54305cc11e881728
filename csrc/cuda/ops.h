// Every CUDA op, with the layout of what it reads and writes. Raw device pointers, sizes and a stream; each returns the
// launch error and leaves y unwritten when there is one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// What a weight's elements are, where their bits alone matter.
enum class Float { kBfloat16, kFloat16, kFloat32 };

// pack_24: a dense weight to 2:4 as formats/semi_structured.py saves it.
//   dense     [out_features, in_features], in_features a multiple of 4; any alignment, fastest on 16 bytes with
//             in_features a multiple of 8
//   values    [out_features, in_features / 2], every element written, -0.0 as +0.0; on 8 bytes
//   metadata  [out_features, ceil(in_features / 16)], every word written
//   status    [3] zeros; then how many weights are not finite, how many groups hold more than two nonzeros, and the
//             number of groups less the first such group's number, counted along the rows. Where any is not 0 the
//             values mean nothing
cudaError_t pack_24(const void* dense, Float dtype, void* values, int16_t* metadata, uint64_t* status,
                    int64_t out_features, int64_t in_features, cudaStream_t stream);

// unpack_24: its inverse.
//   values    as above, of any alignment, fastest on 16 bytes with in_features a multiple of 8
//   dense     [out_features, in_features], every element written
//   status    [1] 0; then 1 where the two positions of some group do not rise, or are others than 0 and 1 behind the
//             last input. Whatever they are, nothing else is read or written
cudaError_t unpack_24(const void* values, Float dtype, const int16_t* metadata, void* dense, uint64_t* status,
                      int64_t out_features, int64_t in_features, cudaStream_t stream);

// A dense weight to a bitmap as formats/bitmap.py saves it, in two steps: the second needs the sum of the first's counts.
//   dense        [out_features, in_features], rows `stride` weights apart; any alignment, fastest where every row lies on
//                16 bytes and in_features is a multiple of 8
//   bitmap       [out_features, ceil(in_features / 8)], low bit first; bitmap_bits writes every byte, 1 where not +-0.0
//   counts       [out_features], kept weights of each row
//   row_offsets  [out_features + 1], the sum of the counts before each row
//   values       [kept], every element written
//   status       [2] zeros; then how many weights are not finite, and the number of the bitmap's bytes less that of the
//                first byte whose eight weights hold one. Where any is not 0 the rest means nothing
cudaError_t bitmap_bits(const void* dense, int64_t stride, Float dtype, uint8_t* bitmap, int64_t* counts,
                        uint64_t* status, int64_t out_features, int64_t in_features, cudaStream_t stream);
cudaError_t bitmap_values(const void* dense, int64_t stride, Float dtype, const uint8_t* bitmap,
                          const int64_t* row_offsets, void* values, int64_t kept, int64_t out_features,
                          int64_t in_features, cudaStream_t stream);

// The inverse of both, which also checks what it reads.
//   values   [kept] of any alignment
//   dense    [out_features, in_features], every element written, zeros as +0.0
//   status   [1] 0; then 1 where Bitmap.validate would refuse. Whatever bitmap and row_offsets hold, nothing else is read
//            or written
cudaError_t bitmap_to_dense(const void* values, Float dtype, int64_t kept, const uint8_t* bitmap,
                            const int64_t* row_offsets, void* dense, uint64_t* status, int64_t out_features,
                            int64_t in_features, cudaStream_t stream);

// keep_largest: of each of `sets` small sets the largest saliencies, ties to the lower index.
//   saliency  [sets, size], size 2, 4, 8 or 16; on 16 bytes
//   kept      one count a set, 0..size, kept_stride apart: 0 where one serves all
//   mask      [sets, size], every element written; on 16 bytes
//   status    [2] zeros; then how many saliencies are NaN, and 1 where a count is impossible. Where any is not 0 the mask
//             means nothing
cudaError_t keep_largest(const float* saliency, const int64_t* kept, int64_t kept_stride, bool* mask, uint64_t* status,
                         int64_t sets, int64_t size, cudaStream_t stream);

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

// fragments_24: from a weight of 2-byte elements as pack_24 writes it to that order, which here is called fragments and
// ordered.
//   values, metadata  as in pack_24, of any alignment of their elements, fastest on 16 bytes with in_features a multiple
//                     of 16
//   status            [1] 0; then 1 as unpack_24 sets it
cudaError_t fragments_24(const void* values, const int16_t* metadata, void* fragments, uint32_t* ordered,
                         uint64_t* status, int64_t out_features, int64_t in_features, cudaStream_t stream);

// dense [out_features, in_features] of 2-byte elements, on 8 bytes, in_features a multiple of 4; every one written
cudaError_t fragments_24_to_dense(const void* fragments, const uint32_t* ordered, void* dense, int64_t out_features,
                                  int64_t in_features, cudaStream_t stream);

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
//   masks      [panels, segments, kSegmentWords]: first [kSegmentBlocks, 32 lanes], bit 8 i + 4 h + j is row g + 8 h,
//              input 16 t + 4 i + j; then 4 bits a lane, low bits first, its column among the 16 of its half of the warp,
//              which are in the order of how much their lanes keep, most first
//   cells      [cell_rows, 4 columns, 2, 4] bytes, 4 kept values of a lane: their low bytes, their high bytes
//   quad_rows  [panels * segments * kLaneQuads + 1], where the cells of columns 4 q .. 4 q + 3 of a segment begin
//   capacity   the most rows of cells that any quad of a segment has
// All lie on 16 bytes.
constexpr int64_t kFragmentRows = 16;
constexpr int64_t kSegmentInputs = 256;
constexpr int kSegmentBlocks = 4;
constexpr int kBlockWeights = 32;  // of a lane
constexpr int kLaneQuads = 8;
constexpr int kSegmentWords = kSegmentBlocks * 32 + 4;

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

// From a bitmap to that order, in two steps: the second needs the sum of the first's quads.
//   bitmap     as bitmap_bits writes it
//   masks      as above; bitmap_fragments_masks writes every word, and of quads
//   quads      [panels * segments * kLaneQuads], how many rows of cells each needs
//   dense      [out_features, in_features] of 2-byte elements, looked at where the masks keep something
//   cells      [cell_rows, 4 columns, 2, 4] bytes, every one written that quad_rows leads to
cudaError_t bitmap_fragments_masks(const uint8_t* bitmap, uint32_t* masks, int32_t* quads, int64_t out_features,
                                   int64_t in_features, cudaStream_t stream);
cudaError_t bitmap_fragments_cells(const void* dense, const uint32_t* masks, const int32_t* quad_rows,
                                   unsigned char* cells, int cell_rows, int64_t out_features, int64_t in_features,
                                   cudaStream_t stream);

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
