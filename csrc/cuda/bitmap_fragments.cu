// bitmap_fragments: the dense weight from what linear_bitmap_fragments reads, for many tokens and for torch's product.
//
// A warp rebuilds one segment of 16 outputs x 512 inputs: it copies the segment into shared memory as it lies, and each
// lane writes the 16 inputs that it has of two rows, a block of 64 inputs after the other. Every byte is read once and
// written once.

#include <algorithm>

#include "bitmap_fragments.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kLaneInputs = 16;  // of a block

__global__ void __launch_bounds__(32 * kWarps) bitmap_fragments_to_dense_kernel(
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentBlocks, 32]
    const unsigned char* __restrict__ cells,  // [cell_rows, kQuadRowBytes]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    uint16_t* __restrict__ dense,             // [out_features, in_features]
    int64_t out_features, int64_t in_features, int64_t panel_segments, int segments, int cell_rows, int capacity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (at >= panel_segments) return;
  const int warp_smem = warp * warp_bytes(capacity);
  copy_segment(ptx::shared_memory() + warp_smem, masks + at * (kMaskBytes / 4), cells, quad_rows + at * kLaneQuads,
               cell_rows, capacity, lane);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();

  const uint32_t first_run = (warp_smem + kMaskBytes) / 8, last_run = first_run + capacity * kCellValues * 8;
  const uint32_t column = lane * 2 * kCellValues, spread = spread_of(lane % 16);
  const unsigned char* mask_smem_read = ptx::shared_memory() + warp_smem + lane * 4;
  const int64_t row = at / segments * kFragmentRows + lane / 4;
  const int64_t first_input = at % segments * kSegmentInputs + lane % 4 * kLaneInputs;
  const bool aligned = (reinterpret_cast<uintptr_t>(dense) | in_features * 2) % 16 == 0;
  uint32_t run = first_run;
#pragma unroll 1
  for (int block = 0; block < kSegmentBlocks; ++block) {
    const uint32_t mask = *reinterpret_cast<const uint32_t*>(mask_smem_read + block * 128);
    run = min(run, last_run);
    uint32_t rows[2][kLaneInputs / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      expand(a, mask >> 8 * i, spread, run, column);
#pragma unroll
      for (int j = 0; j < 4; ++j) rows[j % 2][2 * i + j / 2] = a[j];
    }
    const int64_t input = first_input + block * (4 * kLaneInputs);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= out_features) continue;
      uint16_t* dense_write = dense + (row + 8 * h) * in_features + input;
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const uint32_t* from = rows[h] + 4 * piece;
        const int64_t there = in_features - input - 8 * piece;
        if (aligned && there >= 8) {
          *reinterpret_cast<uint4*>(dense_write + 8 * piece) = make_uint4(from[0], from[1], from[2], from[3]);
          continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (j < there) dense_write[8 * piece + j] = static_cast<uint16_t>(from[j / 2] >> 16 * (j % 2));
        }
      }
    }
  }
}

}  // namespace

cudaError_t bitmap_fragments_to_dense(const BitmapFragments& weight, void* dense, cudaStream_t stream) {
  const int64_t panel_segments = weight.panels() * weight.segments();
  if (panel_segments == 0) return cudaSuccess;
  if (weight.segments() > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t blocks = (panel_segments + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(bitmap_fragments_to_dense_kernel, dim3(static_cast<unsigned>(blocks)), 32 * kWarps,
                kWarps * warp_bytes(weight.capacity) + kGuardRows * kCellRowBytes, stream, weight.masks, weight.cells,
                weight.quad_rows, static_cast<uint16_t*>(dense), weight.out_features, weight.in_features,
                panel_segments, static_cast<int>(weight.segments()), weight.cell_rows, weight.capacity);
}

}  // namespace sparsekern::cuda
