// bitmap_rows: chooses the instruction set and hands rows to the threads, a few at a time, because rows are not equally
// full. The work itself is in bitmap_rows_<set>.cpp.

#include "bitmap_rows.h"

#include "has_avx512.h"
#include "huge_pages.h"

namespace sparsekern {
namespace {

bool always() { return true; }

// in the order of kBitmapRowsSets
const BitmapRowsKernel* const kKernels[] = {
#if defined(__x86_64__)
    &kBitmapRowsAvx512,
#endif
    &kBitmapRowsPortable,
};

// as many rows as make a task worth its start
int64_t rows_per_task(int64_t rows, int64_t bytes) {
  const int64_t per_row = rows > 0 ? bytes / rows + 1 : 1;
  return 1 + kRowsBytesPerThread / per_row;
}

// The least of what work(first, end) returns for all rows.
template <class Work>
int64_t least(int64_t rows, int64_t bytes, int threads, Work&& work) {
  threads = worth_rows_threads(threads, bytes);
  if (threads <= 1) return work(int64_t{0}, rows);
  const int64_t step = rows_per_task(rows, bytes);
  int64_t found = kNoRow;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : found)
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t here = work(first, first + step < rows ? first + step : rows);
    if (here < found) found = here;
  }
  return found;
}

int64_t dense_bytes(const DenseRows& dense) {
  return dense.out_features * dense.in_features * value_bytes(dense.dtype);
}

}  // namespace

const InstructionSet kBitmapRowsSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512_vbmi2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

int64_t check_bitmap(const BitmapRows& packed, int set, int threads) {
  const BitmapRowsKernel& kernel = *kKernels[set];
  const int64_t bytes = packed.out_features * bitmap_row_bytes(packed.in_features);
  return least(packed.out_features, bytes, threads,
               [&](int64_t first, int64_t end) { return kernel.check(packed, first, end); });
}

int64_t bitmap_to_dense(const BitmapRows& packed, void* dense, int set, int threads) {
  const BitmapRowsKernel& kernel = *kKernels[set];
  prefer_huge_pages(dense, packed.out_features * packed.in_features * value_bytes(packed.dtype));
  return least(packed.out_features, packed_bytes(packed), threads,
               [&](int64_t first, int64_t end) { return kernel.to_dense(packed, dense, first, end); });
}

int64_t dense_to_bits(const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int set, int threads) {
  const BitmapRowsKernel& kernel = *kKernels[set];
  const int64_t rows = dense.out_features, bytes = dense_bytes(dense);
  const int64_t step = rows_per_task(rows, bytes);
  int64_t not_finite = 0;
  threads = worth_rows_threads(threads, bytes);
  if (threads <= 1) {
    not_finite = kernel.bits(dense, bitmap, row_offsets, 0, rows);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : not_finite)
    for (int64_t first = 0; first < rows; first += step) {
      not_finite += kernel.bits(dense, bitmap, row_offsets, first, first + step < rows ? first + step : rows);
    }
  }
  row_offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) row_offsets[row + 1] += row_offsets[row];
  return not_finite;
}

int64_t dense_to_values(const DenseRows& dense, const BitmapRows& packed, void* values, int set, int threads) {
  const BitmapRowsKernel& kernel = *kKernels[set];
  prefer_huge_pages(values, packed.kept * value_bytes(packed.dtype));
  return least(dense.out_features, dense_bytes(dense), threads,
               [&](int64_t first, int64_t end) { return kernel.values(dense, packed, values, first, end); });
}

}  // namespace sparsekern
