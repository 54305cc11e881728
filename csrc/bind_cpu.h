// What the bindings of the CPU module share: checks, and the instruction sets by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace sparsekern {

// Everything on packed weights; the rest is bound in bind_cpu.cpp.
void bind_bitmap(py::module_& module);

using Address = std::uintptr_t;

inline void check(bool right, const std::string& message) {
  if (!right) throw py::value_error(message);
}

inline DType dtype_of(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype must be bfloat16, float16 or float32, got " + name);
}

// Those this machine has.
inline py::tuple names_of(const InstructionSet* sets) {
  py::list names;
  for (const InstructionSet* set = sets; set->name != nullptr; ++set) {
    if (set->supported()) names.append(set->name);
  }
  return py::tuple(names);
}

// The first of `sets` that this machine has, or the named one.
inline int find_set(const InstructionSet* sets, const std::string& name) {
  for (int set = 0; sets[set].name != nullptr; ++set) {
    if ((name.empty() || name == sets[set].name) && sets[set].supported()) return set;
  }
  throw py::value_error("this machine does not have the instruction set " + name);
}

inline void check_threads(int threads) { check(threads > 0, "threads must be positive, got " + std::to_string(threads)); }

}  // namespace sparsekern
