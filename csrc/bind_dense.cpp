// The part of sparsekern._cpu that is on dense weights in panels: checks, casts the address, calls.

#include <new>

#include "bind_cpu.h"

namespace sparsekern {
namespace {

void linear_dense_checked(const std::string& dtype, Address panels, int64_t panels_size, int64_t out_features,
                          int64_t in_features, Address x, int64_t x_size, Address bias, int64_t bias_size, Address y,
                          int64_t y_size, int64_t tokens, int threads, const std::string& isa) {
  const DenseWeight weight = {dtype_of(dtype), reinterpret_cast<const void*>(panels), out_features, in_features};
  check_threads(threads);
  check_features(out_features, in_features);
  const int64_t rows = (out_features + kPanelRows - 1) / kPanelRows * kPanelRows;
  const int64_t inputs = (in_features + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
  int64_t needed;
  check(!__builtin_mul_overflow(rows, inputs, &needed) && panels_size == needed,
        "panels must hold " + std::to_string(rows) + " by " + std::to_string(inputs) + " elements, got " +
            std::to_string(panels_size));
  const LinearOperands operands = {x, x_size, bias, bias_size, y, y_size, tokens};
  const bool anything = operands.check_sizes(out_features, in_features);
  const int set = find_set(kLinearDenseSets, isa);
  if (!anything) return;
  bool done;
  {
    py::gil_scoped_release release;
    done = linear_dense(weight, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(bias),
                        reinterpret_cast<void*>(y), tokens, set, threads);
  }
  if (!done) throw std::bad_alloc();
}

}  // namespace

void bind_dense(py::module_& module) {
  module.def("linear_dense_sets", [] { return names_of(kLinearDenseSets); }, "Those this machine has, best first.");
  module.def("linear_dense", linear_dense_checked, py::arg("dtype"), py::arg("panels"), py::arg("panels_size"),
             py::arg("out_features"), py::arg("in_features"), py::arg("x"), py::arg("x_size"), py::arg("bias"),
             py::arg("bias_size"), py::arg("y"), py::arg("y_size"), py::arg("tokens"), py::arg("threads"),
             py::arg("isa") = "");
}

}  // namespace sparsekern
