// What the bindings of the CPU module share: checks, and the instruction sets by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace sparsekern {

// What is on packed and on dense weights; the rest is bound in bind_cpu.cpp.
void bind_bitmap(py::module_& module);
void bind_bitmap_index(py::module_& module);
void bind_bitmap_int8(py::module_& module);
void bind_dense(py::module_& module);
void bind_24(py::module_& module);

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

// What use() has set: the first of kInstructionSets that is not better than what may be used. Python's lock is held
// where it is read and written.
inline int first_allowed = 0;

inline int rank_of(const std::string& name) {
  int rank = 0;
  for (const char* set : kInstructionSets) {
    if (name == set) return rank;
    ++rank;
  }
  throw std::logic_error("kInstructionSets does not name " + name);
}

inline bool is_allowed(const InstructionSet& set) { return first_allowed == 0 || rank_of(set.name) >= first_allowed; }

inline bool is_chosen(const InstructionSet& set) {
  if (!is_allowed(set)) return false;
  return set.preferred == nullptr || set.preferred() || rank_of(set.name) == first_allowed;
}

// The named one of `sets`, or the best that this machine has and use() allows.
inline int find_set(const InstructionSet* sets, const std::string& name) {
  for (int set = 0; sets[set].name != nullptr; ++set) {
    if (!sets[set].supported()) continue;
    if (name.empty() ? is_chosen(sets[set]) : name == sets[set].name) return set;
  }
  std::string here;
  for (const InstructionSet* set = sets; set->name != nullptr; ++set) {
    if (set->supported()) here += (here.empty() ? "" : ", ") + std::string(set->name);
  }
  throw py::value_error("this machine does not have the instruction set " + name + ", only " + here);
}

inline void check_features(int64_t out_features, int64_t in_features) {
  // 2^40 inputs or outputs cannot be an honest request, and their product would overflow
  constexpr int64_t kMost = int64_t{1} << 40;
  check(out_features >= 0 && out_features < kMost, "out_features is impossible: " + std::to_string(out_features));
  check(in_features >= 0 && in_features < kMost, "in_features is impossible: " + std::to_string(in_features));
}

// What a linear op is given beside its weight: addresses, and the sizes of what lies there.
struct LinearOperands {
  Address x;
  int64_t x_size;
  Address bias;
  int64_t bias_size;
  Address y;
  int64_t y_size;
  int64_t tokens;

  // Returns whether there is anything to do.
  bool check_sizes(int64_t out_features, int64_t in_features) const {
    check(tokens >= 0, "tokens must not be negative, got " + std::to_string(tokens));
    int64_t x_needed, y_needed;
    check(!__builtin_mul_overflow(tokens, in_features, &x_needed) && x_size == x_needed,
          "x must hold tokens * in_features elements, got " + std::to_string(x_size));
    check(!__builtin_mul_overflow(tokens, out_features, &y_needed) && y_size == y_needed,
          "y must hold tokens * out_features elements, got " + std::to_string(y_size));
    check(bias == 0 || bias_size == out_features,
          "bias must hold " + std::to_string(out_features) + " elements, got " + std::to_string(bias_size));
    return y_needed != 0;
  }
};

inline void check_threads(int threads) { check(threads > 0, "threads must be positive, got " + std::to_string(threads)); }

}  // namespace sparsekern
