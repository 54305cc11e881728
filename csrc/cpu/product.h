// What gram and addmm share: C += A B in float32, from operands that were packed into panels, so that the inner loop reads
// two streams and keeps its sums in registers. One step of a panel is 32 bits wide: a float32, or a pair of bfloat16.
#pragma once

#include "../ops.h"

namespace sparsekern {

// the sums that registers hold: 8 rows by 3 vectors, 24 of AVX-512's 32 registers
constexpr int64_t kTileRows = 8;
constexpr int64_t kTileColumns = 48;
// of C, whose part of B stays in L2 while the rows of A pass: 384 columns by 256 steps are 384 KB
constexpr int64_t kBlock = 384;
// a panel of A, 8 KB, stays in L1; longer sums read and write C more seldom, and round more: 512 steps gave 1.4 times the error
constexpr int64_t kMostSteps = 256;

constexpr int64_t column_panels(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }
constexpr int64_t row_panels(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t blocks_of(int64_t size) { return (size + kBlock - 1) / kBlock; }

// How the `whole` steps of a sum are cut: into equal parts of at most kMostSteps.
constexpr int64_t steps_at_once(int64_t whole) {
  const int64_t parts = (whole + kMostSteps - 1) / kMostSteps;
  return parts == 0 ? 0 : (whole + parts - 1) / parts;
}

// A block of C and what is packed for it.
//   a         [row panels, steps, kTileRows]
//   b         [column panels, steps, kTileColumns]
//   c         [rows, columns], rows c_stride apart; rows and columns at most kBlock
//   diagonal  tiles of C that lie wholly below row = column + diagonal are left alone
struct Block {
  const float* a;
  const float* b;
  int64_t steps;
  float* c;
  int64_t c_stride;
  int64_t rows;
  int64_t columns;
  int64_t diagonal;
};

// One instruction set: the work of one thread.
struct Product {
  int64_t tokens_per_step;  // of bfloat16 x
  void (*multiply)(const Block& block);
  // x^T x: column panels first_panel to end_panel - 1 of `tokens` rows of x, both as B and as A. What does not exist
  // is zeros.
  //   x  [tokens, in_features], rows in_features apart
  void (*pack_gram)(const void* x, DType dtype, int64_t tokens, int64_t in_features, int64_t first_panel,
                    int64_t end_panel, float* a, float* b);
  // lines times scale, a line being a row of A or a column of B, as panels first_panel to end_panel - 1. One of the
  // strides is 1.
  void (*pack_rows)(const float* lines, int64_t line_stride, int64_t step_stride, int64_t count, int64_t steps,
                    float scale, int64_t first_panel, int64_t end_panel, float* packed);
  void (*pack_columns)(const float* lines, int64_t line_stride, int64_t step_stride, int64_t count, int64_t steps,
                       float scale, int64_t first_panel, int64_t end_panel, float* packed);
};

#if defined(__x86_64__)
extern const Product kProductAvx512;
extern const Product kProductAvx512Bf16;
bool has_product_avx512();
bool has_product_avx512_bf16();
#endif

// To wake a thread takes as long as this many operations.
constexpr double kOperationsPerThread = 2e6;

inline int worth_threads(int threads, double operations) {
  const double worth = 1 + operations / kOperationsPerThread;
  return worth < threads ? static_cast<int>(worth) : threads;
}

// Scratch on a cache line's border; null when there is no memory.
float* new_panels(int64_t elements);

}  // namespace sparsekern
