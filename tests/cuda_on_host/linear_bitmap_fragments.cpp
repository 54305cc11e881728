// Runs csrc/cuda/linear_bitmap_fragments.cu and bitmap_fragments.cu on the CPU.
//   op: bf16 or fp16, and "dense" for the expansion
//   numbers: tokens out_features in_features cell_rows capacity   tensors: x masks cells quad_rows bias

#include "operands.h"
#include "ops.h"

using sparsekern::cuda::BitmapFragments;

BitmapFragments weight_of(Operands& operands) {
  BitmapFragments weight;
  weight.masks = operands.tensor<uint32_t>();
  weight.cells = operands.tensor<unsigned char>();
  weight.quad_rows = operands.tensor<int32_t>();
  weight.cell_rows = static_cast<int>(operands.number(3));
  weight.capacity = static_cast<int>(operands.number(4));
  weight.out_features = operands.number(1);
  weight.in_features = operands.number(2);
  return weight;
}

template <typename Value>
int run(Operands& operands) {
  const int64_t tokens = operands.number(0);
  const auto* x = operands.tensor<Value>();
  const BitmapFragments weight = weight_of(operands);
  const auto* bias = operands.tensor<Value>();
  auto* y = operands.result<Value>(tokens * weight.out_features);
  int64_t bytes = 0;
  const cudaError_t error = sparsekern::cuda::linear_bitmap_fragments_workspace(weight, tokens, &bytes);
  if (error != cudaSuccess) return operands.finish(error);
  void* workspace = bytes == 0 ? nullptr : operands.workspace(bytes);
  return operands.finish(sparsekern::cuda::linear_bitmap_fragments(weight, x, bias, y, workspace, tokens, nullptr));
}

int main(int argc, char** argv) {
  Operands operands(argc, argv);
  if (operands.op() == "bf16") return run<__nv_bfloat16>(operands);
  if (operands.op() == "fp16") return run<__half>(operands);
  const BitmapFragments weight = weight_of(operands);
  auto* dense = operands.result<uint16_t>(weight.out_features * weight.in_features);
  return operands.finish(sparsekern::cuda::bitmap_fragments_to_dense(weight, dense, nullptr));
}
