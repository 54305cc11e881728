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

inline std::string in_words(const std::string& part) { return part; }
inline std::string in_words(int64_t part) { return std::to_string(part); }

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  throw py::value_error((in_words(parts) + ...));
}

// The message is put together when it is needed: a call makes hundreds of checks.
template <class... Parts>
void check(bool right, const Parts&... parts) {
  if (__builtin_expect(!right, 0)) refuse(parts...);
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

// 2^40 inputs or outputs cannot be an honest request, and their product would overflow
constexpr int64_t kMostFeatures = int64_t{1} << 40;

inline void check_features(int64_t out_features, int64_t in_features) {
  check(out_features >= 0 && out_features < kMostFeatures, "out_features is impossible: ", out_features);
  check(in_features >= 0 && in_features < kMostFeatures, "in_features is impossible: ", in_features);
}

inline void check_size(const char* name, int64_t size, int64_t rows, int64_t columns) {
  int64_t needed;
  const bool overflow = __builtin_mul_overflow(rows, columns, &needed);
  check(!overflow && size == needed, name, " must hold ", rows, " * ", columns, " elements, got ", size);
}

// Where each panel starts among `last` of something: from 0 to the last, never back.
inline void check_offsets(const char* name, const int64_t* offsets, int64_t panels, int64_t last, const char* things) {
  check(offsets[0] == 0 && offsets[panels] == last, name, " must run from 0 to the ", last, " ", things, ", got ",
        offsets[0], " to ", offsets[panels]);
  for (int64_t panel = 0; panel < panels; ++panel) {
    check(offsets[panel] <= offsets[panel + 1], name, " must not fall, panel ", panel, " does");
  }
}

constexpr int64_t panels_of(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }
constexpr int64_t blocks_of(int64_t in_features) { return (in_features + kBlockInputs - 1) / kBlockInputs; }

// What Python sees of a row or panel: -1 when none is wrong.
inline int64_t row_or_none(int64_t row) { return row == kNoRow ? -1 : row; }

inline void check_threads(int threads) { check(threads > 0, "threads must be positive, got ", threads); }

}  // namespace sparsekern
