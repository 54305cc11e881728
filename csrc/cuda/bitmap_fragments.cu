// bitmap_fragments: a bitmap to what linear_bitmap_fragments reads, and that to the dense weight, for many tokens and for
// torch's product. A warp has a segment of 16 outputs x 256 inputs, a lane 16 inputs of two rows in each of its 4 blocks.
//
// The masks are a row's bits and another's, four and four in turn. They tell how many values a lane has, and that which
// column is its own, so that the four that share rows of cells need about as many. When the quads' rows are known, each lane goes through its weights again and writes a cell whenever it has four.
//
// To dense the warp copies the segment into shared memory as it lies, and each lane writes its inputs, a block after the
// other. Every byte is read once and written once.

#include <algorithm>

#include "bitmap_fragments.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kLaneInputs = 16;  // of a block

// Four bits in every byte's low half, from 16 bits.
__device__ __forceinline__ uint32_t spread_fours(uint32_t bits) {
  bits = (bits | bits << 8) & 0x00ff00ff;
  return (bits | bits << 4) & 0x0f0f0f0f;
}

__global__ void __launch_bounds__(32 * kWarps) bitmap_fragments_masks_kernel(
    const uint8_t* __restrict__ bitmap,  // [out_features, row_bytes]
    uint32_t* __restrict__ masks,        // [panels, segments, kSegmentWords]
    int32_t* __restrict__ quads,         // [panels, segments, kLaneQuads]
    int64_t out_features, int64_t row_bytes, int64_t panel_segments, int segments) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (at >= panel_segments) return;
  const int64_t row = at / segments * kFragmentRows + lane / 4;
  const int64_t first_byte = at % segments * (kSegmentInputs / 8) + lane % 4 * (kLaneInputs / 8);
  int count = 0;
#pragma unroll
  for (int block = 0; block < kSegmentBlocks; ++block) {
    uint32_t mask = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t* row_bits = bitmap + (row + 8 * h) * row_bytes;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kLaneInputs / 8; ++i) {
        const int64_t byte = first_byte + block * (4 * kLaneInputs / 8) + i;
        if (row + 8 * h < out_features && byte < row_bytes) bits |= static_cast<uint32_t>(row_bits[byte]) << 8 * i;
      }
      mask |= spread_fours(bits) << 4 * h;
    }
    masks[at * kSegmentWords + block * 32 + lane] = mask;
    count += __popc(mask);
  }
  // how many of its half of the warp have more, or as many and come first
  int column = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int other = __shfl_sync(0xffffffff, count, i, 16);
    column += other > count || (other == count && i < lane % 16);
  }
  const int next = __shfl_xor_sync(0xffffffff, column, 1);
  auto* columns = reinterpret_cast<uint8_t*>(masks + at * kSegmentWords + kSegmentBlocks * 32);
  if (lane % 2 == 0) columns[lane / 2] = static_cast<uint8_t>(column | next << 4);
  // as many cells as the fullest of four columns needs, which is the first
  if (column % 4 == 0) quads[at * kLaneQuads + lane / 16 * 4 + column / 4] = (count + kCellValues - 1) / kCellValues;
}

// For four mask bits: the selector of prmt that brings the bytes of those kept together, and above it their number.
__device__ __forceinline__ uint32_t gather_of(unsigned bits) {
  uint32_t selector = 0x4444, kept = 0;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    if ((bits >> i & 1) == 0) continue;
    // byte 4 is of the second operand, which is zero
    selector = (selector & ~(15u << 4 * kept)) | i << 4 * kept;
    ++kept;
  }
  return selector | kept << 16;
}

__global__ void __launch_bounds__(32 * kWarps) bitmap_fragments_cells_kernel(
    const uint16_t* __restrict__ dense,       // [out_features, in_features]
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentWords]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    unsigned char* __restrict__ cells,        // [cell_rows, kQuadRowBytes]
    int64_t out_features, int64_t in_features, int64_t panel_segments, int segments, int cell_rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (at >= panel_segments) return;
  const int64_t row = at / segments * kFragmentRows + lane / 4;
  const int64_t first_input = at % segments * kSegmentInputs + lane % 4 * kLaneInputs;
  const bool aligned = (reinterpret_cast<uintptr_t>(dense) | in_features * 2) % 16 == 0;
  const uint32_t gather = gather_of(lane % 16);
  // rows that lie are cut to what there is
  const int column = column_of(masks + at * kSegmentWords, lane);
  int cell = min(max(quad_rows[at * kLaneQuads + column / 4], 0), cell_rows);
  const int last_cell = min(quad_rows[at * kLaneQuads + column / 4 + 1], cell_rows);
  uint2* cells_write = reinterpret_cast<uint2*>(cells) + column % 4;
  // what is not yet four values: their low bytes, their high bytes
  uint64_t low = 0, high = 0;
  uint32_t waiting = 0;
#pragma unroll 1
  for (int block = 0; block < kSegmentBlocks; ++block) {
    const uint32_t mask = masks[at * kSegmentWords + block * 32 + lane];
    const int64_t input = first_input + block * (4 * kLaneInputs);
    uint32_t rows[2][kLaneInputs / 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint16_t* dense_read = dense + (row + 8 * h) * in_features + input;
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int64_t there = row + 8 * h < out_features ? in_features - input - 8 * piece : 0;
        uint32_t* to = rows[h] + 4 * piece;
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j] = 0;
        if (aligned && there >= 8) {
          uint32_t four[4];
          ptx::load(four, dense_read + 8 * piece);
#pragma unroll
          for (int j = 0; j < 4; ++j) to[j] = four[j];
          continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (j < there) to[j / 2] |= static_cast<uint32_t>(dense_read[8 * piece + j]) << 16 * (j % 2);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t entry = __shfl_sync(0xffffffff, gather, static_cast<int>(mask >> 4 * i), 16);
      const uint32_t* two = rows[i % 2] + i / 2 * 2;
      low |= static_cast<uint64_t>(ptx::prmt(ptx::prmt(two[0], two[1], 0x6420), 0, entry)) << 8 * waiting;
      high |= static_cast<uint64_t>(ptx::prmt(ptx::prmt(two[0], two[1], 0x7531), 0, entry)) << 8 * waiting;
      waiting += entry >> 16;
      if (waiting < kCellValues) continue;
      if (cell < last_cell) cells_write[static_cast<int64_t>(cell) * 4] = make_uint2(static_cast<uint32_t>(low), static_cast<uint32_t>(high));
      ++cell;
      low >>= 32;
      high >>= 32;
      waiting -= kCellValues;
    }
  }
  // the rest, and zeros up to where the fullest of four lanes ends
  for (; cell < last_cell; ++cell) {
    cells_write[static_cast<int64_t>(cell) * 4] = make_uint2(static_cast<uint32_t>(low), static_cast<uint32_t>(high));
    low = high = 0;
  }
}

__global__ void __launch_bounds__(32 * kWarps) bitmap_fragments_to_dense_kernel(
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentWords]
    const unsigned char* __restrict__ cells,  // [cell_rows, kQuadRowBytes]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    uint16_t* __restrict__ dense,             // [out_features, in_features]
    int64_t out_features, int64_t in_features, int64_t panel_segments, int segments, int cell_rows, int capacity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (at >= panel_segments) return;
  const int warp_smem = warp * warp_bytes(capacity);
  copy_segment(ptx::shared_memory() + warp_smem,
               reinterpret_cast<const unsigned char*>(masks) + at * kMaskBytes + lane * 16, cells,
               rows_of(quad_rows + at * kLaneQuads + lane / 4), true, cell_rows, capacity, lane);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();

  const uint32_t last_run = capacity * kCellValues * 8;
  const Spread spread = spread_of(lane);
  const int column = column_of(ptx::shared_memory() + warp_smem, lane);
  const unsigned char* mask_smem_read = ptx::shared_memory() + warp_smem + lane * 4;
  const int64_t row = at / segments * kFragmentRows + lane / 4;
  const int64_t first_input = at % segments * kSegmentInputs + lane % 4 * kLaneInputs;
  const bool aligned = (reinterpret_cast<uintptr_t>(dense) | in_features * 2) % 16 == 0;
  uint32_t run = 0;
#pragma unroll 1
  for (int block = 0; block < kSegmentBlocks; ++block) {
    const uint32_t mask = *reinterpret_cast<const uint32_t*>(mask_smem_read + block * 128);
    run = min(run, last_run);
    uint32_t rows[2][kLaneInputs / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      expand(a, mask >> 8 * i, spread, run, ptx::shared_memory() + warp_smem + kMaskBytes, column);
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

// A warp each; false where there are more than a launch can count.
bool count_blocks(int64_t panel_segments, int64_t segments, unsigned& blocks) {
  const int64_t needed = (panel_segments + kWarps - 1) / kWarps;
  blocks = static_cast<unsigned>(needed);
  return needed <= INT32_MAX && segments <= INT32_MAX;
}

}  // namespace

cudaError_t bitmap_fragments_masks(const uint8_t* bitmap, uint32_t* masks, int32_t* quads, int64_t out_features,
                                   int64_t in_features, cudaStream_t stream) {
  const BitmapFragments sizes{nullptr, nullptr, nullptr, 0, 0, out_features, in_features};
  const int64_t panel_segments = sizes.panels() * sizes.segments();
  unsigned blocks;
  if (!count_blocks(panel_segments, sizes.segments(), blocks)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return launch(bitmap_fragments_masks_kernel, blocks, 32 * kWarps, 0, stream, bitmap, masks, quads, out_features,
                (in_features + 7) / 8, panel_segments, static_cast<int>(sizes.segments()));
}

cudaError_t bitmap_fragments_cells(const void* dense, const uint32_t* masks, const int32_t* quad_rows,
                                   unsigned char* cells, int cell_rows, int64_t out_features, int64_t in_features,
                                   cudaStream_t stream) {
  const BitmapFragments sizes{nullptr, nullptr, nullptr, 0, 0, out_features, in_features};
  const int64_t panel_segments = sizes.panels() * sizes.segments();
  unsigned blocks;
  if (!count_blocks(panel_segments, sizes.segments(), blocks)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return launch(bitmap_fragments_cells_kernel, blocks, 32 * kWarps, 0, stream, static_cast<const uint16_t*>(dense),
                masks, quad_rows, cells, out_features, in_features, panel_segments,
                static_cast<int>(sizes.segments()), cell_rows);
}

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
