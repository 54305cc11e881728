// The part of sparsekern._cpu that is on dense weights in panels: checks, asks the tensors where they lie, calls.

#include "bind_linear.h"

namespace sparsekern {
namespace {

// The only operand is the panels.
void linear_dense_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                          py::handle bias, py::handle y, int threads, const std::string& isa) {
  check_threads(threads);
  check_features(out_features, in_features);
  check_operands(operands, 1);
  const Memory panels("panels", operands[0]);
  const DenseWeight weight = {panels.dtype("panels"), reinterpret_cast<const void*>(panels.address), out_features,
                              in_features};
  const int64_t rows = panels_of(out_features) * kPanelRows, inputs = blocks_of(in_features) * kBlockInputs;
  int64_t needed;
  check(!__builtin_mul_overflow(rows, inputs, &needed) && panels.size == needed, "panels must hold ", rows, " by ", inputs,
        " elements, got ", panels.size);
  const LinearTensors tensors(x, bias, y, weight.dtype, out_features, in_features);
  const int set = find_set(kLinearDenseSets, isa);
  call_linear(tensors, [&](auto... call) { return linear_dense(weight, call..., set, threads); });
}

}  // namespace

void bind_dense(py::module_& module) {
  module.def("linear_dense_sets", [] { return names_of(kLinearDenseSets); }, "Those this machine has, best first.");
  module.def("linear_dense", linear_dense_checked, py::arg("operands"), py::arg("out_features"), py::arg("in_features"),
             py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"), py::arg("isa") = "");
}

}  // namespace sparsekern
