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

bool addmm(const Matrix& total, const ConstMatrix& a, const ConstMatrix& b, float scale, int threads) {
#if defined(__x86_64__)
  const Product& product = kProductAvx512;
  const int64_t inner = a.columns;
  const int64_t at_once = steps_at_once(inner);
  const int64_t row_parts = row_panels(total.rows), column_parts = column_panels(total.columns);
  const int64_t row_blocks = blocks_of(total.rows);
  const int64_t blocks = row_blocks * blocks_of(total.columns);
  float* rows = new_panels(row_parts * kTileRows * at_once);
  float* columns = new_panels(column_parts * kTileColumns * at_once);
  const bool enough = rows != nullptr && columns != nullptr;
  threads = worth_threads(threads, 2.0 * total.rows * inner * total.columns);
  for (int64_t first = 0; enough && first < inner; first += at_once) {
    const int64_t steps = inner - first < at_once ? inner - first : at_once;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < row_parts; ++panel) {
        product.pack_rows(a.data + first, a.stride, total.rows, steps, scale, panel, panel + 1, rows);
      }
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < column_parts; ++panel) {
        product.pack_columns(b.data + first * b.stride, b.stride, total.columns, steps, panel, panel + 1, columns);
      }
#pragma omp for schedule(dynamic, 4)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block % row_blocks * kBlock, column = block / row_blocks * kBlock;
        const int64_t rows_left = total.rows - row, columns_left = total.columns - column;
        product.multiply({rows + row * steps, columns + column * steps, steps,
                          total.data + row * total.stride + column, total.stride,
                          rows_left < kBlock ? rows_left : kBlock, columns_left < kBlock ? columns_left : kBlock,
                          // no tile is left out
                          kBlock});
      }
    }
  }
  std::free(rows);
  std::free(columns);
  return enough;
#else
  (void)total, (void)a, (void)b, (void)scale, (void)threads;
  return false;
#endif
}

}  // namespace sparsekern
