// linear_24 by wgmma.sp on tiles of 128 outputs x 128 tokens, bfloat16: a file of its own, for it takes a minute to compile.

#include "linear_24.cuh"
#include "ops.h"

namespace sparsekern::wgmma {

cudaError_t linear_24_small(const void* x, const void* values, const void* metadata, const void* bias, void* y,
                            int tokens, int out_features, int in_features, int multiprocessors, cudaStream_t stream) {
  // the metadata's layout has 128 inputs in an atom because the tile has as many; two blocks share what they read of x
  using Tile = Kernel<cutlass::bfloat16_t, Shape<_128, _128, _128>, Shape<_2, _1, _1>>;
  return launch<Tile>(x, values, metadata, bias, y, tokens, out_features, in_features, multiprocessors, stream);
}

}  // namespace sparsekern::wgmma
