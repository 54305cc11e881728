// What the bindings of the CPU's linear ops share. They take tensors and not addresses: torch says where one lies through
// DLPack's exchange API, in some 20 ns, so that neither its headers nor its library are needed and all ops are called
// alike.
#pragma once

#include <new>

#include "bind_cpu.h"
#include "dlpack.h"

namespace sparsekern {

inline py::handle torch_tensor_type() {
  // never released: there is no moment at which nobody asks
  static const py::handle type = py::module_::import("torch").attr("Tensor").cast<py::object>().release();
  return type;
}

inline const dlpack::ExchangeApi& exchange_api() {
  static const auto* const api = [] {
    const py::object capsule = py::getattr(torch_tensor_type(), "__dlpack_c_exchange_api__", py::none());
    const auto* found = capsule.is_none() ? nullptr
                                          : static_cast<const dlpack::ExchangeApi*>(
                                                PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (found == nullptr || found->major != dlpack::kMajor || found->describe == nullptr) {
      PyErr_Clear();
      throw std::runtime_error("this torch does not describe its tensors by version 1 of DLPack's exchange API: the "
                               "CPU's linear kernels need torch 2.11 or newer");
    }
    return found;
  }();
  return *api;
}

// A tensor as it lies in memory: all of it, in order.
struct Memory {
  Address address;
  int64_t size;  // elements
  int64_t element_bytes;
  dlpack::Tensor tensor;  // its shape and strides are valid as long as nobody changes the tensor

  Memory(const char* name, py::handle object) {
    if (!describe(object, tensor, dlpack::kCpu)) refuse(name, " must be a tensor on the CPU");
    size = 1;
    bool contiguous = true;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      contiguous = contiguous && (tensor.shape[d] == 1 || tensor.strides[d] == size);
      size *= tensor.shape[d];
    }
    check(contiguous || size == 0, name, " must be contiguous");
    address = reinterpret_cast<Address>(tensor.data) + tensor.byte_offset;
    element_bytes = tensor.type_bits * tensor.type_lanes / 8;
  }

  // False for what is no tensor or has no address on such a device.
  static bool describe(py::handle object, dlpack::Tensor& tensor, int32_t device_type) {
    if (!py::isinstance(object, torch_tensor_type())) return false;
    if (exchange_api().describe(object.ptr(), &tensor) == 0) return tensor.device_type == device_type;
    PyErr_Clear();
    return false;
  }

  // Of elements that are read as bytes, words or the like.
  template <class Element>
  const Element* as(const char* name) const {
    check(element_bytes == sizeof(Element), name, " must have elements of ", static_cast<int64_t>(sizeof(Element)),
          " bytes, got ", element_bytes);
    return reinterpret_cast<const Element*>(address);
  }

  DType dtype(const char* name) const {
    if (tensor.type_code == dlpack::kBFloat && element_bytes == 2) return DType::kBFloat16;
    if (tensor.type_code == dlpack::kFloat && element_bytes == 4) return DType::kFloat32;
    if (tensor.type_code == dlpack::kFloat && element_bytes == 2) return DType::kFloat16;
    refuse(name, " must be bfloat16, float16 or float32");
  }
};

// Whether a tensor is of torch's own class, on such a device, and its values are those in memory.
inline bool is_plain(py::handle object, int32_t device_type) {
  static const py::handle is_neg = torch_tensor_type().attr("is_neg").cast<py::object>().release();
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(torch_tensor_type().ptr())) return false;
  dlpack::Tensor tensor;
  if (!Memory::describe(object, tensor, device_type)) return false;
  bool empty = false;
  for (int d = 0; d < tensor.ndim; ++d) empty = empty || tensor.shape[d] == 0;
  // zeros that torch keeps no memory for
  if (tensor.data == nullptr && !empty) return false;
  // the imaginary part of a conjugate is kept as its negative
  if (tensor.type_code != dlpack::kFloat && tensor.type_code != dlpack::kBFloat) return true;
  const auto negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg.ptr(), object.ptr()));
  if (!negative) throw py::error_already_set();
  return negative.ptr() == Py_False;
}

// The same of all that a call of a linear op is given.
inline bool are_plain(int32_t device_type, py::handle x, const py::tuple& operands, py::handle bias) {
  if (!is_plain(x, device_type) || (!bias.is_none() && !is_plain(bias, device_type))) return false;
  for (const py::handle operand : operands) {
    if (!is_plain(operand, device_type)) return false;
  }
  return true;
}

inline void check_operands(const py::tuple& operands, size_t count) {
  check(operands.size() == count, "a weight of this op has ", static_cast<int64_t>(count), " operands, got ",
        static_cast<int64_t>(operands.size()));
}

// A weight as it is saved: addresses, and the sizes of what lies there. What its rows say is for the ops themselves to check.
struct Rows {
  BitmapRows rows;

  Rows(DType dtype, Address values, int64_t values_size, Address bitmap, int64_t bitmap_size,
       Address row_offsets, int64_t row_offsets_size, int64_t out_features, int64_t in_features)
      : rows{dtype,
             reinterpret_cast<const void*>(values),
             reinterpret_cast<const uint8_t*>(bitmap),
             reinterpret_cast<const int64_t*>(row_offsets),
             values_size,
             out_features,
             in_features} {
    check_features(out_features, in_features);
    check(values_size >= 0, "values_size must not be negative, got ", values_size);
    int64_t bytes;
    check(!__builtin_mul_overflow(out_features, bitmap_row_bytes(in_features), &bytes) && bitmap_size == bytes,
          "bitmap must hold out_features rows of ", bitmap_row_bytes(in_features), " bytes, got ", bitmap_size,
          " in all");
    check(row_offsets_size == out_features + 1, "row_offsets must hold ", out_features + 1, " offsets, got ",
          row_offsets_size);
    check(rows.row_offsets[0] == 0 && rows.row_offsets[out_features] == values_size,
          "row_offsets must run from 0 to the ", values_size, " values, got ", rows.row_offsets[0], " to ",
          rows.row_offsets[out_features]);
  }
};

// Throws unless `dense` holds the rows of panels first to end - 1.
inline void check_panels(int64_t dense_size, int64_t first, int64_t end, int64_t out_features, int64_t in_features) {
  const int64_t panels = panels_of(out_features);
  check(0 <= first && first <= end && end <= panels, "panels must lie in 0..", panels, ", got ", first, "..", end);
  const int64_t end_row = end * kPanelRows < out_features ? end * kPanelRows : out_features;
  check_size("dense", dense_size, first < end ? end_row - first * kPanelRows : 0, in_features);
}

// What an int8 weight's kind says, which has no elements: its dtype is that of x, and its second size the inputs of a group,
// 0 when all share a scale.
struct Int8Kind {
  DType dtype;
  int64_t group_size;  // a multiple of `multiple`
  int64_t groups;

  Int8Kind(const Memory& kind, int64_t in_features, int64_t multiple) : dtype(kind.dtype("kind")) {
    check(kind.tensor.ndim == 2, "kind must have two dimensions, got ", kind.tensor.ndim);
    group_size = kind.tensor.shape[1];
    // one group, which may end after the last input
    if (group_size <= 0 || group_size >= in_features) {
      const int64_t blocks = (in_features + multiple - 1) / multiple;
      group_size = (blocks > 0 ? blocks : 1) * multiple;
    }
    check(dtype != DType::kFloat16, "dtype must be bfloat16 or float32, got float16");
    check(group_size % multiple == 0, "group_size must be a multiple of ", multiple, ", got ", group_size);
    // a row without inputs has a scale too
    groups = in_features == 0 ? 1 : (in_features + group_size - 1) / group_size;
  }
};

// x [tokens, in_features], bias [out_features] or None, y [tokens, out_features], of the dtype: the sizes are checked.
struct LinearTensors {
  const void* x;
  const void* bias;
  void* y;
  int64_t tokens;

  LinearTensors(py::handle x_tensor, py::handle bias_tensor, py::handle y_tensor, DType dtype, int64_t out_features,
                int64_t in_features) {
    const Memory x_memory = of_dtype("x", x_tensor, dtype), y_memory = of_dtype("y", y_tensor, dtype);
    tokens = out_features == 0 ? 0 : y_memory.size / out_features;
    check(y_memory.size == tokens * out_features, "y must hold tokens * out_features elements, got ", y_memory.size);
    int64_t needed;
    const bool overflow = __builtin_mul_overflow(tokens, in_features, &needed);
    // where there are no outputs, nobody knows how many tokens there are
    check(out_features == 0 || (!overflow && x_memory.size == needed),
          "x must hold tokens * in_features elements, got ", x_memory.size);
    x = reinterpret_cast<const void*>(x_memory.address);
    y = reinterpret_cast<void*>(y_memory.address);
    bias = nullptr;
    if (bias_tensor.is_none()) return;
    const Memory bias_memory = of_dtype("bias", bias_tensor, dtype);
    check(bias_memory.size == out_features, "bias must hold ", out_features, " elements, got ", bias_memory.size);
    bias = reinterpret_cast<const void*>(bias_memory.address);
  }

  static Memory of_dtype(const char* name, py::handle tensor, DType dtype) {
    const Memory memory(name, tensor);
    const bool bfloat = memory.tensor.type_code == dlpack::kBFloat, floats = memory.tensor.type_code == dlpack::kFloat;
    if ((dtype == DType::kBFloat16 ? !bfloat : !floats) || memory.element_bytes != value_bytes(dtype)) {
      const char* wanted = dtype == DType::kBFloat16 ? "bfloat16" : dtype == DType::kFloat16 ? "float16" : "float32";
      refuse(name, " must have the weight's dtype torch.", wanted, ", got ",
             std::string(py::str(tensor.attr("dtype"))));
    }
    return memory;
  }
};

// y = x W^T + bias. multiply(x, bias, y, tokens) returns false when there is no memory.
template <class Multiply>
void call_linear(const LinearTensors& tensors, Multiply&& multiply) {
  if (tensors.tokens == 0) return;
  bool done;
  {
    py::gil_scoped_release release;
    done = multiply(tensors.x, tensors.bias, tensors.y, tensors.tokens);
  }
  if (!done) throw std::bad_alloc();
}

}  // namespace sparsekern
