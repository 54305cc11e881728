// sparsekern._cuda: the ops of cuda/ops.h for Python. Addresses and the stream come as integers; a launch that fails is
// raised with its rule and its remedy (cuda/launch_error.h).

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind_cuda.h"
#include "ops.h"

namespace {

template <typename Value>
void linear_bitmap(uintptr_t x, int64_t x_size, uintptr_t values, uintptr_t bitmap, int64_t bitmap_size,
                   uintptr_t row_offsets, int64_t row_offsets_size, uintptr_t bias, int64_t bias_size, uintptr_t y,
                   int64_t y_size, int64_t tokens, int64_t in_features, uintptr_t stream) {
  const int64_t out_features = row_offsets_size - 1;
  int64_t needed;
  check(tokens >= 0 && in_features >= 0 && out_features >= 0, "sizes must not be negative");
  check(!__builtin_mul_overflow(tokens, in_features, &needed) && x_size == needed,
        "x must hold tokens * in_features elements, got " + std::to_string(x_size));
  check(!__builtin_mul_overflow(tokens, out_features, &needed) && y_size == needed,
        "y must hold tokens * out_features elements, got " + std::to_string(y_size));
  check(!__builtin_mul_overflow(out_features, (in_features + 7) / 8, &needed) && bitmap_size == needed,
        "bitmap must hold out_features * ceil(in_features / 8) bytes, got " + std::to_string(bitmap_size));
  check(bias == 0 || bias_size == out_features,
        "bias must hold " + std::to_string(out_features) + " elements, got " + std::to_string(bias_size));
  raise("linear_bitmap", sparsekern::cuda::linear_bitmap(
                             at<const Value>(x), at<const Value>(values), at<const uint8_t>(bitmap),
                             at<const int64_t>(row_offsets), at<const Value>(bias), at<Value>(y), tokens, out_features,
                             in_features, at<CUstream_st>(stream)));
}

template <typename Value>
void bind_linear_bitmap(py::module_& module, const char* name) {
  module.def(name, &linear_bitmap<Value>, py::arg("x"), py::arg("x_size"), py::arg("values"), py::arg("bitmap"),
             py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"), py::arg("bias"),
             py::arg("bias_size"), py::arg("y"), py::arg("y_size"), py::arg("tokens"), py::arg("in_features"),
             py::arg("stream"));
}

int64_t linear_24_workspace(int64_t tokens, int64_t out_features, int64_t in_features) {
  check(tokens >= 0 && in_features >= 0 && out_features >= 0, "sizes must not be negative");
  int64_t bytes;
  raise("linear_24", sparsekern::cuda::linear_24_workspace(tokens, out_features, in_features, &bytes));
  return bytes;
}

// What both linear_24 kernels are given. Raises ValueError where sizes and addresses contradict each other.
void check_linear_24(int64_t x_size, uintptr_t values, int64_t values_size, uintptr_t metadata, int64_t metadata_size,
                     uintptr_t bias, int64_t bias_size, int64_t y_size, int64_t tokens, int64_t out_features,
                     int64_t in_features) {
  using namespace sparsekern::cuda;
  check(tokens >= 0 && in_features >= 0 && out_features >= 0, "sizes must not be negative");
  check(in_features % 4 == 0, "in_features must be a multiple of 4, got " + std::to_string(in_features));
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const int64_t chunks = (in_features + kChunkInputs - 1) / kChunkInputs;
  int64_t needed;
  check(!__builtin_mul_overflow(tokens, in_features, &needed) && x_size == needed,
        "x must hold tokens * in_features elements, got " + std::to_string(x_size));
  check(!__builtin_mul_overflow(tokens, out_features, &needed) && y_size == needed,
        "y must hold tokens * out_features elements, got " + std::to_string(y_size));
  check(!__builtin_mul_overflow(panels, chunks * kChunkValues, &needed) && values_size == needed,
        "values must hold panels * chunks * 2048 elements, got " + std::to_string(values_size));
  check(metadata_size == panels * chunks * kChunkWords,
        "metadata must hold panels * chunks * 128 words, got " + std::to_string(metadata_size));
  check(bias == 0 || bias_size == out_features,
        "bias must hold " + std::to_string(out_features) + " elements, got " + std::to_string(bias_size));
  check(on_16_bytes(values) && on_16_bytes(metadata), "values and metadata must lie on 16 bytes");
}

template <typename Value>
void linear_24(uintptr_t x, int64_t x_size, uintptr_t values, int64_t values_size, uintptr_t metadata,
               int64_t metadata_size, uintptr_t bias, int64_t bias_size, uintptr_t y, int64_t y_size,
               uintptr_t workspace, int64_t workspace_size, int64_t tokens, int64_t out_features, int64_t in_features,
               uintptr_t stream) {
  using namespace sparsekern::cuda;
  check_linear_24(x_size, values, values_size, metadata, metadata_size, bias, bias_size, y_size, tokens, out_features,
                  in_features);
  check(tokens <= kLinear24Tokens, "there must be 0 to 64 tokens, got " + std::to_string(tokens));
  check(on_16_bytes(workspace), "workspace must lie on 16 bytes");
  check(tokens == 0 || workspace_size >= linear_24_workspace(tokens, out_features, in_features),
        "workspace is too small: it has " + std::to_string(workspace_size) + " bytes");
  raise("linear_24",
        sparsekern::cuda::linear_24(at<const Value>(x), at<const Value>(values), at<const uint32_t>(metadata),
                                    at<const Value>(bias), at<Value>(y), at<void>(workspace), tokens, out_features,
                                    in_features, at<CUstream_st>(stream)));
}

template <typename Value>
void bind_linear_24(py::module_& module, const char* name) {
  module.def(name, &linear_24<Value>, py::arg("x"), py::arg("x_size"), py::arg("values"), py::arg("values_size"),
             py::arg("metadata"), py::arg("metadata_size"), py::arg("bias"), py::arg("bias_size"), py::arg("y"),
             py::arg("y_size"), py::arg("workspace"), py::arg("workspace_size"), py::arg("tokens"),
             py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
}

template <typename Value>
void linear_24_prefill(uintptr_t x, int64_t x_size, uintptr_t values, int64_t values_size, uintptr_t metadata,
                       int64_t metadata_size, uintptr_t bias, int64_t bias_size, uintptr_t y, int64_t y_size,
                       int64_t tokens, int64_t out_features, int64_t in_features, uintptr_t stream) {
  check_linear_24(x_size, values, values_size, metadata, metadata_size, bias, bias_size, y_size, tokens, out_features,
                  in_features);
  raise("linear_24_prefill",
        sparsekern::cuda::linear_24_prefill(at<const Value>(x), at<const Value>(values), at<const uint32_t>(metadata),
                                            at<const Value>(bias), at<Value>(y), tokens, out_features, in_features,
                                            at<CUstream_st>(stream)));
}

template <typename Value>
void bind_linear_24_prefill(py::module_& module, const char* name) {
  module.def(name, &linear_24_prefill<Value>, py::arg("x"), py::arg("x_size"), py::arg("values"),
             py::arg("values_size"), py::arg("metadata"), py::arg("metadata_size"), py::arg("bias"),
             py::arg("bias_size"), py::arg("y"), py::arg("y_size"), py::arg("tokens"), py::arg("out_features"),
             py::arg("in_features"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("ABI") = sparsekern::kAbi;
  bind_linear_bitmap<__nv_bfloat16>(module, "linear_bitmap_bf16");
  bind_linear_bitmap<__half>(module, "linear_bitmap_fp16");
  bind_linear_bitmap<float>(module, "linear_bitmap_fp32");
  module.def("linear_24_workspace", &linear_24_workspace, py::arg("tokens"), py::arg("out_features"),
             py::arg("in_features"));
  bind_linear_24<__nv_bfloat16>(module, "linear_24_bf16");
  bind_linear_24<__half>(module, "linear_24_fp16");
  bind_linear_24_prefill<__nv_bfloat16>(module, "linear_24_prefill_bf16");
  bind_linear_24_prefill<__half>(module, "linear_24_prefill_fp16");
  bind_cuda_bitmap(module);
  bind_cuda_pack(module);
}
