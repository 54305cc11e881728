// sparsekern._wgmma: the op of wgmma/ops.h for Python. Addresses and the stream come as integers; a launch that fails is
// raised with its rule and its remedy (cuda/launch_error.h).

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch_error.h"
#include "ops.h"
#include "wgmma/ops.h"

namespace py = pybind11;

namespace {

void check(bool right, const std::string& message) {
  if (!right) throw py::value_error(message);
}

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

void linear_24(uintptr_t x, int64_t x_size, uintptr_t values, int64_t values_size, uintptr_t metadata,
               int64_t metadata_bytes, uintptr_t bias, int64_t bias_size, uintptr_t y, int64_t y_size, int64_t tokens,
               int64_t out_features, int64_t in_features, uintptr_t stream) {
  using namespace sparsekern::wgmma;
  for (const int64_t size : {tokens, out_features, in_features}) {
    check(size >= 0 && size <= int64_t{1} << 30, "sizes must be 0 to 2^30, got " + std::to_string(size));
  }
  check(in_features > 0 && in_features % kInputsMultiple == 0,
        "in_features must be a positive multiple of 16, got " + std::to_string(in_features));
  check(out_features % kOutputsMultiple == 0,
        "out_features must be a multiple of 8, got " + std::to_string(out_features));
  check(x_size == tokens * in_features, "x must hold tokens * in_features elements, got " + std::to_string(x_size));
  check(y_size == tokens * out_features, "y must hold tokens * out_features elements, got " + std::to_string(y_size));
  check(values_size == out_features * (in_features / 2),
        "values must hold out_features * in_features / 2 elements, got " + std::to_string(values_size));
  const int64_t atoms =
      (out_features + kAtomRows - 1) / kAtomRows * ((in_features + kAtomInputs - 1) / kAtomInputs);
  check(metadata_bytes == atoms * kAtomBytes,
        "metadata must hold " + std::to_string(atoms * kAtomBytes) + " bytes, got " + std::to_string(metadata_bytes));
  check(bias == 0 || bias_size == out_features,
        "bias must hold " + std::to_string(out_features) + " elements, got " + std::to_string(bias_size));
  check((x | values | metadata | bias | y) % 16 == 0, "x, values, metadata, bias and y must lie on 16 bytes");
  const cudaError_t error = sparsekern::wgmma::linear_24(
      at(x), at(values), at(metadata), at(bias), reinterpret_cast<void*>(y), static_cast<int>(tokens),
      static_cast<int>(out_features), static_cast<int>(in_features), reinterpret_cast<CUstream_st*>(stream));
  if (error != cudaSuccess) throw std::runtime_error(sparsekern::cuda::launch_error("linear_24_wgmma", error));
}

}  // namespace

PYBIND11_MODULE(_wgmma, module) {
  module.attr("ABI") = sparsekern::kAbi;
  module.def("linear_24_bf16", &linear_24, py::arg("x"), py::arg("x_size"), py::arg("values"), py::arg("values_size"),
             py::arg("metadata"), py::arg("metadata_bytes"), py::arg("bias"), py::arg("bias_size"), py::arg("y"),
             py::arg("y_size"), py::arg("tokens"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
}
