// Runs csrc/cuda/linear_bitmap.cu on the CPU: sizes from the command line, tensors from stdin, y to stdout.
//   linear_bitmap TYPE tokens out_features in_features kept has_bias
// stdin holds x, values, bitmap, row_offsets and bias; each lies in its own allocation, so that the address sanitizer
// sees a read past its end.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "linear_bitmap.cu.h"  // the kernel's own source, launches rewritten by the test

template <typename T>
std::unique_ptr<T[]> read(int64_t size) {
  std::unique_ptr<T[]> tensor(new T[size]);
  if (std::fread(tensor.get(), sizeof(T), size, stdin) != static_cast<size_t>(size)) std::exit(2);
  return tensor;
}

template <typename Value>
int run(int64_t tokens, int64_t out_features, int64_t in_features, int64_t kept, bool has_bias) {
  const auto x = read<Value>(tokens * in_features);
  const auto values = read<Value>(kept);
  const auto bitmap = read<uint8_t>(out_features * ((in_features + 7) / 8));
  const auto row_offsets = read<int64_t>(out_features + 1);
  const auto bias = read<Value>(has_bias ? out_features : 0);
  const int64_t size = tokens * out_features;
  std::unique_ptr<Value[]> y(new Value[size]);
  // all ones is NaN in every type: an element that is not written shows
  std::memset(static_cast<void*>(y.get()), 0xff, size * sizeof(Value));
  const cudaError_t error =
      sparsekern::cuda::linear_bitmap(x.get(), values.get(), bitmap.get(), row_offsets.get(),
                                      has_bias ? bias.get() : nullptr, y.get(), tokens, out_features, in_features, nullptr);
  if (error != cudaSuccess) return 3;
  return std::fwrite(y.get(), sizeof(Value), size, stdout) == static_cast<size_t>(size) ? 0 : 4;
}

int main(int, char** argv) {
  const std::string type = argv[1];
  const auto size = [argv](int i) { return std::strtoll(argv[i], nullptr, 10); };
  const auto run_type = type == "bf16" ? run<__nv_bfloat16> : type == "fp16" ? run<__half> : run<float>;
  return run_type(size(2), size(3), size(4), size(5), size(6) != 0);
}
