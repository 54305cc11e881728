// Runs csrc/cuda/linear_24_prefill.cu on the CPU.
//   op: bf16 or fp16   numbers: tokens out_features in_features   tensors: x values metadata bias

#include "operands.h"
#include "ops.h"

template <typename Value>
int run(Operands& operands) {
  const int64_t tokens = operands.number(0), out_features = operands.number(1), in_features = operands.number(2);
  const auto* x = operands.tensor<Value>();
  const auto* values = operands.tensor<Value>();
  const auto* metadata = operands.tensor<uint32_t>();
  const auto* bias = operands.tensor<Value>();
  auto* y = operands.result<Value>(tokens * out_features);
  return operands.finish(sparsekern::cuda::linear_24_prefill(x, values, metadata, bias, y, tokens, out_features,
                                                             in_features, nullptr));
}

int main(int argc, char** argv) {
  Operands operands(argc, argv);
  if (operands.op() == "bf16") return run<__nv_bfloat16>(operands);
  return run<__half>(operands);
}
