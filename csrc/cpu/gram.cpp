// gram: packs the tokens, then splits the blocks of the upper triangle over the threads. Each block is summed by one
// thread in one order, so the result does not depend on how many there are.

#include <cstdlib>

#include "product.h"

namespace sparsekern {
namespace {

#if defined(__x86_64__)
bool has_avx512() { return has_product_avx512(); }
bool has_avx512_bf16() { return has_product_avx512_bf16(); }
#endif

// in the order of kGramSets
const Product* const kProducts[] = {
#if defined(__x86_64__)
    &kProductAvx512Bf16,
    &kProductAvx512,
#endif
    nullptr,
};

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Block number `block` of the upper triangle, column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
Block block_of(int64_t block, const float* a, const float* b, int64_t steps, float* total, int64_t in_features) {
  int64_t column = 0;
  while ((column + 1) * (column + 2) / 2 <= block) ++column;
  const int64_t row = block - column * (column + 1) / 2;
  const int64_t rows = in_features - row * kBlock, columns = in_features - column * kBlock;
  return {a + row * kBlock * steps,
          b + column * kBlock * steps,
          steps,
          total + row * kBlock * in_features + column * kBlock,
          in_features,
          rows < kBlock ? rows : kBlock,
          columns < kBlock ? columns : kBlock,
          (column - row) * kBlock};
}

}  // namespace

const InstructionSet kGramSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16},
    {"avx512", has_avx512},
#endif
    {nullptr, nullptr},
};

float* new_panels(int64_t elements) {
  // one line more: aligned_alloc wants a multiple of the line, and never zero bytes
  return static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((elements * 4 + 64) / 64 * 64)));
}

bool gram(const void* x, DType dtype, float* total, int64_t tokens, int64_t in_features, int set, int threads) {
  const Product& product = *kProducts[set];
  const int64_t tokens_per_step = dtype == DType::kBFloat16 ? product.tokens_per_step : 1;
  const int64_t at_once = steps_at_once((tokens + tokens_per_step - 1) / tokens_per_step) * tokens_per_step;
  const int64_t panels = column_panels(in_features);
  const int64_t blocks = blocks_of(in_features) * (blocks_of(in_features) + 1) / 2;
  const int64_t size = panels * kTileColumns * at_once / tokens_per_step;
  float* a = new_panels(size);
  float* b = new_panels(size);
  const bool enough = a != nullptr && b != nullptr;
  threads = worth_threads(threads, static_cast<double>(tokens) * in_features * in_features);
  for (int64_t first = 0; enough && first < tokens; first += at_once) {
    const int64_t here = tokens - first < at_once ? tokens - first : at_once;
    const int64_t steps = (here + tokens_per_step - 1) / tokens_per_step;
    const char* rows = static_cast<const char*>(x) + first * in_features * element_bytes(dtype);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < panels; ++panel) {
        product.pack_gram(rows, dtype, here, in_features, panel, panel + 1, a, b);
      }
      // which thread takes them is the machine's affair
#pragma omp for schedule(dynamic, 1)
      for (int64_t block = 0; block < blocks; ++block) {
        product.multiply(block_of(block, a, b, steps, total, in_features));
      }
    }
  }
  std::free(a);
  std::free(b);
  return enough;
}

}  // namespace sparsekern
