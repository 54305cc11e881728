// The part of sparsekern._cpu that is on 2:4 weights: checks, asks the tensors where they lie, calls.

#include "bind_linear.h"

namespace sparsekern {
namespace {

// The operands are values and positions.
void linear_24_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                       py::handle bias, py::handle y, int threads, const std::string& isa) {
  check_threads(threads);
  check_features(out_features, in_features);
  check_operands(operands, 2);
  const Memory values("values", operands[0]), positions("positions", operands[1]);
  const Weight24 weight = {values.as<uint16_t>("values"), positions.as<uint64_t>("positions"), out_features, in_features};
  check(values.dtype("values") == DType::kBFloat16, "values must be bfloat16");
  const int64_t panels = panels_of(out_features), groups = blocks_of(in_features) * kGroups24;
  int64_t needed;
  check(!__builtin_mul_overflow(panels, groups * kPanelRows * 2, &needed) && values.size == needed,
        "values must hold ", panels, " panels of ", groups * kPanelRows * 2, " elements, got ", values.size);
  check(positions.size == panels * groups, "positions must hold ", panels, " panels of ", groups, " words, got ",
        positions.size);
  const LinearTensors tensors(x, bias, y, DType::kBFloat16, out_features, in_features);
  const int set = find_set(kLinear24Sets, isa);
  call_linear(tensors, [&](auto... call) { return linear_24(weight, call..., set, threads); });
}

}  // namespace

void bind_24(py::module_& module) {
  module.def("linear_24_sets", [] { return names_of(kLinear24Sets); }, "Those this machine has, best first.");
  module.def("linear_24", linear_24_checked, py::arg("operands"), py::arg("out_features"), py::arg("in_features"),
             py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"), py::arg("isa") = "");
}

}  // namespace sparsekern
