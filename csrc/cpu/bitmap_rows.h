// What the instruction sets of bitmap_rows share, and the check that comes before every read of a packed weight.
#pragma once

#include "../ops.h"

namespace sparsekern {

// The work of one thread: rows first to end - 1. All but `bits` return the first row that is wrong, or kNoRow, and touch
// neither the values nor what is written of a row before its bits were counted.
struct BitmapRowsKernel {
  int64_t (*check)(const BitmapRows& packed, int64_t first, int64_t end);
  int64_t (*to_dense)(const BitmapRows& packed, void* dense, int64_t first, int64_t end);
  // returns how many weights are not finite; writes the ones of row o to row_offsets[o + 1]
  int64_t (*bits)(const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int64_t first, int64_t end);
  int64_t (*values)(const DenseRows& dense, const BitmapRows& packed, void* values, int64_t first, int64_t end);
};

extern const BitmapRowsKernel kBitmapRowsPortable;
#if defined(__x86_64__)
extern const BitmapRowsKernel kBitmapRowsAvx512;
#endif

// To wake a thread takes as long as moving this much.
constexpr int64_t kRowsBytesPerThread = 65536;

inline int worth_rows_threads(int threads, int64_t bytes) {
  const int64_t worth = 1 + bytes / kRowsBytesPerThread;
  return worth < threads ? static_cast<int>(worth) : threads;
}

inline int64_t packed_bytes(const BitmapRows& packed) {
  return packed.kept * value_bytes(packed.dtype) + packed.out_features * bitmap_row_bytes(packed.in_features);
}

namespace {

// The first of rows first to end - 1 whose offsets leave the values or fall, whose ones are not as many as they say, or
// that has ones after the last input. ones(bits, bytes) counts.
template <class Ones>
int64_t first_wrong_row(const BitmapRows& packed, int64_t first, int64_t end, Ones&& ones) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const int used = static_cast<int>(packed.in_features % 8);
  for (int64_t row = first; row < end; ++row) {
    const int64_t start = packed.row_offsets[row];
    const int64_t stop = packed.row_offsets[row + 1];
    if (start < 0 || stop < start || stop > packed.kept) return row;
    const uint8_t* bits = packed.bitmap + row * bytes;
    if (used != 0 && bits[bytes - 1] >> used != 0) return row;
    if (ones(bits, bytes) != stop - start) return row;
  }
  return kNoRow;
}

}  // namespace
}  // namespace sparsekern
