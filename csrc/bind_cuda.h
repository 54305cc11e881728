// What the files that bind sparsekern._cuda share: the runtime's errors in words, sizes that fit.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch_error.h"
#include "cuda/ops.h"

namespace py = pybind11;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check(bool right, const std::string& message) {
  if (!right) throw py::value_error(message);
}

inline void raise(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(sparsekern::cuda::launch_error(op, error));
}

inline bool on_16_bytes(uintptr_t address) { return address % 16 == 0; }

// Throws unless `name` holds a * b elements.
inline void check_size(const char* name, int64_t size, int64_t a, int64_t b) {
  int64_t needed;
  check(!__builtin_mul_overflow(a, b, &needed) && size == needed,
        std::string(name) + " must hold " + std::to_string(a) + " * " + std::to_string(b) + " elements, got " +
            std::to_string(size));
}

// bind_cuda_bitmap.cpp
void bind_cuda_bitmap(py::module_& module);
// bind_cuda_pack.cpp
void bind_cuda_pack(py::module_& module);
