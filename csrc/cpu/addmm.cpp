// addmm: packs both operands a part of the sum at a time, then splits the blocks of the result over the threads. Each
// block is summed by one thread in one order, so the result does not depend on how many there are.

#include <cstdlib>

#include "product.h"

namespace sparsekern {

bool has_addmm() {
#if defined(__x86_64__)
  // elsewhere torch's library takes AVX-512 itself
  return has_product_avx512() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

bool addmm(float* total, int64_t total_stride, const Operand& a, const Operand& b, int64_t rows, int64_t inner,
           int64_t columns, float scale, int threads) {
#if defined(__x86_64__)
  const Product& product = kProductAvx512;
  const int64_t at_once = steps_at_once(inner);
  const int64_t row_parts = row_panels(rows), column_parts = column_panels(columns);
  const int64_t row_blocks = blocks_of(rows);
  const int64_t blocks = row_blocks * blocks_of(columns);
  float* packed_a = new_panels(row_parts * kTileRows * at_once);
  float* packed_b = new_panels(column_parts * kTileColumns * at_once);
  const bool enough = packed_a != nullptr && packed_b != nullptr;
  threads = worth_threads(threads, 2.0 * rows * inner * columns);
  for (int64_t first = 0; enough && first < inner; first += at_once) {
    const int64_t steps = inner - first < at_once ? inner - first : at_once;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < row_parts; ++panel) {
        product.pack_rows(a.data + first * a.column_stride, a.row_stride, a.column_stride, rows, steps, scale, panel,
                          panel + 1, packed_a);
      }
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < column_parts; ++panel) {
        product.pack_columns(b.data + first * b.row_stride, b.column_stride, b.row_stride, columns, steps, 1.0f, panel,
                             panel + 1, packed_b);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block % row_blocks * kBlock, column = block / row_blocks * kBlock;
        const int64_t rows_left = rows - row, columns_left = columns - column;
        product.multiply({packed_a + row * steps, packed_b + column * steps, steps, total + row * total_stride + column,
                          total_stride, rows_left < kBlock ? rows_left : kBlock,
                          columns_left < kBlock ? columns_left : kBlock,
                          // no tile is left out
                          kBlock});
      }
    }
  }
  std::free(packed_a);
  std::free(packed_b);
  return enough;
#else
  (void)total, (void)total_stride, (void)a, (void)b, (void)rows, (void)inner, (void)columns, (void)scale, (void)threads;
  return false;
#endif
}

}  // namespace sparsekern
