// A bitmap weight in the order of mma.m16n8k16 (ops.h: BitmapFragments): how a warp copies a segment into shared memory
// and rebuilds fragments from it.
//
// The kept values of a lane are a run of bytes in two planes, low and high, so that one prmt puts four weights of a row
// in their places in a plane, with one selector, and zeros where none is kept. That selector, and how far the run goes
// on, come from the row's four mask bits by a shuffle: lane i of each half warp holds the answer for the bits i. Rows g
// and g + 8 are taken together where the values of the one end and those of the other begin, so that both are shifted
// alike. In shared memory each lane has a column of cells of its own; those of half a warp lie in different banks, whichever
// of its 16 columns a lane has.
#pragma once

#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {

constexpr int kCellValues = 4;                            // of a lane: 4 low bytes, 4 high bytes
constexpr int kCellRowBytes = 32 * 2 * kCellValues;       // a cell of every lane of the warp
constexpr int kQuadRowBytes = kCellRowBytes / kLaneQuads;  // as saved: a cell of every lane that has the same rows
constexpr int kMaskBytes = kSegmentWords * 4;
constexpr int kColumnsAt = kSegmentBlocks * 32 * 4;  // behind the masks themselves
// a block's values, with the cell behind the last place that is read around: as far as masks that lie can lead
constexpr int kGuardRows = kBlockWeights / kCellValues + 1;

// Shared memory of a warp for the longest run of `capacity` cells; kGuardRows follow the last warp's. The masks are what
// is read in front of the first cell.
__host__ __device__ constexpr int warp_bytes(int capacity) { return kMaskBytes + capacity * kCellRowBytes; }

// For four mask bits: the selector of prmt that spreads a window's bytes, and above it 8 bits for each one kept.
//   kEnds  the values are the window's last ones, else its first
template <bool kEnds>
__device__ __forceinline__ uint32_t spread_of(unsigned bits) {
  const uint32_t kept = __popc(bits);
  uint32_t selector = 0, next = kEnds ? 4 - kept : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool here = bits >> i & 1;
    // byte 4 is of the second operand, which is zero
    selector |= (here ? next : 4u) << 4 * i;
    next += here;
  }
  return selector | kept << 19;
}

// What a lane knows of it, for everybody's shuffles.
struct Spread {
  uint32_t ends, begins;
};

__device__ __forceinline__ Spread spread_of(int lane) {
  return {spread_of<true>(lane % 16), spread_of<false>(lane % 16)};
}

// Which of the 32 columns of cells is this lane's.
//   masks  of the segment
__device__ __forceinline__ int column_of(const void* masks, int lane) {
  const int two = static_cast<const unsigned char*>(masks)[kColumnsAt + lane / 2];
  return (two >> lane % 2 * 4 & 15) | (lane & 16);
}

// Where the cells of a quad of columns begin and end, as they are saved.
struct QuadRows {
  int begin, end;
};

//   quad_rows  from this lane's quad on, which it copies
__device__ __forceinline__ QuadRows rows_of(const int32_t* quad_rows) { return {quad_rows[0], quad_rows[1]}; }

// Asks for the masks and cells of a segment; cp.async, not committed.
//   masks  of the segment, from this lane's 16 bytes on   cells  of the weight   quad  of this lane and segment
//   there  is this segment; else its masks keep nothing, and `quad` is empty
__device__ __forceinline__ void copy_segment(unsigned char* to, const unsigned char* masks, const unsigned char* cells,
                                             QuadRows quad, bool there, int cell_rows, int capacity, int lane) {
  static_assert(kColumnsAt == 32 * 16 && kMaskBytes == kColumnsAt + 16, "a lane copies one piece, the first one two");
  ptx::cp_async_16(to + lane * 16, masks, there ? 16 : 0);
  if (lane == 0) ptx::cp_async_16(to + kColumnsAt, masks + kColumnsAt, there ? 16 : 0);
  // rows of masks that lie are cut to what there is, here and in shared memory
  const int first = min(max(quad.begin, 0), cell_rows);
  // 4 lanes copy two rows of their own quad at a time
  int rows = min(min(quad.end, cell_rows) - first, capacity) - lane % 4 / 2;
  const unsigned char* from = cells + static_cast<int64_t>(first) * kQuadRowBytes + lane % 4 * 16;
  unsigned char* cells_smem_write =
      to + kMaskBytes + lane % 4 / 2 * kCellRowBytes + lane / 4 * kQuadRowBytes + lane % 2 * 16;
  constexpr int kUnroll = 6;
  // as often for every lane: the warp stays together
#pragma unroll 1
  for (int row = 0; row < capacity; row += 2 * kUnroll) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (2 * i < rows) ptx::cp_async_16(cells_smem_write + i * 2 * kCellRowBytes, from + i * 2 * kQuadRowBytes);
    }
    rows -= 2 * kUnroll;
    cells_smem_write += kUnroll * 2 * kCellRowBytes;
    from += kUnroll * 2 * kQuadRowBytes;
  }
}

// The next 8 weights of a lane, `mask` their bits and whatever is above: 4 inputs of row g in a[0], a[2], and of row
// g + 8 in a[1], a[3].
//   run    the lane's place in its `column`, 8 for a value: kCellRowBytes a cell is 32, so that its low 5 bits are those of
//          the byte
//   cells  in shared memory
__device__ __forceinline__ void expand(uint32_t (&a)[4], uint32_t mask, Spread spread, uint32_t& run,
                                       const unsigned char* cells, int column) {
  constexpr uint32_t kAll = 0xffffffff;
  const uint32_t ends = __shfl_sync(kAll, spread.ends, static_cast<int>(mask), 16);
  const uint32_t begins = __shfl_sync(kAll, spread.begins, static_cast<int>(mask >> 4), 16);
  // where row g's values end and row g + 8's begin
  run += ends >> 16;
  const uint2* at = reinterpret_cast<const uint2*>(cells) + ((run & ~31u) | static_cast<uint32_t>(column));
  const uint2 cell_0 = at[-32], cell_1 = at[0], cell_2 = at[32];
  // the shift counts modulo 32
  const uint32_t low_ends = ptx::prmt(__funnelshift_r(cell_0.x, cell_1.x, run), 0, ends);
  const uint32_t high_ends = ptx::prmt(__funnelshift_r(cell_0.y, cell_1.y, run), 0, ends);
  const uint32_t low_begins = ptx::prmt(__funnelshift_r(cell_1.x, cell_2.x, run), 0, begins);
  const uint32_t high_begins = ptx::prmt(__funnelshift_r(cell_1.y, cell_2.y, run), 0, begins);
  run += begins >> 16;
  a[0] = ptx::prmt(low_ends, high_ends, 0x5140);
  a[1] = ptx::prmt(low_begins, high_begins, 0x5140);
  a[2] = ptx::prmt(low_ends, high_ends, 0x7362);
  a[3] = ptx::prmt(low_begins, high_begins, 0x7362);
}

}  // namespace sparsekern::cuda
