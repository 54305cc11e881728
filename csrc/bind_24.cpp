// The part of sparsekern._cpu that is on 2:4 weights: checks, casts the address, calls.

#include <new>

#include "bind_cpu.h"

namespace sparsekern {
namespace {

void linear_24_checked(Address values, int64_t values_size, Address positions, int64_t positions_size,
                       int64_t out_features, int64_t in_features, Address x, int64_t x_size, Address bias,
                       int64_t bias_size, Address y, int64_t y_size, int64_t tokens, int threads,
                       const std::string& isa) {
  const Weight24 weight = {reinterpret_cast<const void*>(values), reinterpret_cast<const uint64_t*>(positions),
                           out_features, in_features};
  check_threads(threads);
  check_features(out_features, in_features);
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const int64_t groups = (in_features + kBlockInputs - 1) / kBlockInputs * kGroups24;
  int64_t needed;
  check(!__builtin_mul_overflow(panels, groups * kPanelRows * 2, &needed) && values_size == needed,
        "values must hold " + std::to_string(panels) + " panels of " + std::to_string(groups * kPanelRows * 2) +
            " elements, got " + std::to_string(values_size));
  check(positions_size == panels * groups, "positions must hold " + std::to_string(panels) + " panels of " +
                                               std::to_string(groups) + " words, got " +
                                               std::to_string(positions_size));
  const LinearOperands operands = {x, x_size, bias, bias_size, y, y_size, tokens};
  const bool anything = operands.check_sizes(out_features, in_features);
  const int set = find_set(kLinear24Sets, isa);
  if (!anything) return;
  bool done;
  {
    py::gil_scoped_release release;
    done = linear_24(weight, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(bias),
                     reinterpret_cast<void*>(y), tokens, set, threads);
  }
  if (!done) throw std::bad_alloc();
}

}  // namespace

void bind_24(py::module_& module) {
  module.def("linear_24_sets", [] { return names_of(kLinear24Sets); }, "Those this machine has, best first.");
  module.def("linear_24", linear_24_checked, py::arg("values"), py::arg("values_size"), py::arg("positions"),
             py::arg("positions_size"), py::arg("out_features"), py::arg("in_features"), py::arg("x"),
             py::arg("x_size"), py::arg("bias"), py::arg("bias_size"), py::arg("y"), py::arg("y_size"),
             py::arg("tokens"), py::arg("threads"), py::arg("isa") = "");
}

}  // namespace sparsekern
