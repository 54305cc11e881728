// What the bindings of the CPU's linear ops share. They take tensors and not addresses: a tensor is asked by its own
// methods where it lies, so that neither torch's headers nor its library are needed, and all ops are called alike.
#pragma once

#include <new>

#include "bind_cpu.h"

namespace sparsekern {

// Attributes and methods of a tensor. Never freed, as strings that are interned are not.
struct TensorNames {
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* nbytes = PyUnicode_InternFromString("nbytes");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
};

inline const TensorNames& tensor_names() {
  static const TensorNames names;
  return names;
}

inline py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

inline py::object get(py::handle tensor, PyObject* attribute) {
  return owned(PyObject_GetAttr(tensor.ptr(), attribute));
}

inline py::object ask(py::handle tensor, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(tensor.ptr(), method));
}

inline int64_t number(const py::object& object) {
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// A tensor as it lies in memory: all of it, in order.
struct Memory {
  Address address;
  int64_t bytes;

  Memory(const char* name, py::handle tensor) {
    const TensorNames& names = tensor_names();
    check(get(tensor, names.is_cpu).is(py::handle(Py_True)) &&
              ask(tensor, names.is_contiguous).is(py::handle(Py_True)),
          name, " must be contiguous and on the CPU");
    address = static_cast<Address>(number(ask(tensor, names.data_ptr)));
    bytes = number(get(tensor, names.nbytes));
  }

  // As elements of that many bytes, whatever type the tensor says they have; -1 when they are not whole.
  int64_t count(int64_t element_bytes) const { return bytes % element_bytes == 0 ? bytes / element_bytes : -1; }

  template <class Element>
  const Element* as() const {
    return reinterpret_cast<const Element*>(address);
  }
};

inline DType dtype_of(py::handle tensor) {
  const auto type_of = [](const char* name) {
    return py::module_::import("torch").attr(name).cast<py::object>().release();
  };
  static const py::handle bfloat16 = type_of("bfloat16"), float32 = type_of("float32"), float16 = type_of("float16");
  const py::object dtype = get(tensor, tensor_names().dtype);
  if (dtype.is(bfloat16)) return DType::kBFloat16;
  if (dtype.is(float32)) return DType::kFloat32;
  if (dtype.is(float16)) return DType::kFloat16;
  throw py::value_error("dtype must be bfloat16, float16 or float32, got " + std::string(py::str(dtype)));
}

inline void check_operands(const py::tuple& operands, size_t count) {
  check(operands.size() == count, "a weight of this op has ", static_cast<int64_t>(count), " operands, got ",
        static_cast<int64_t>(operands.size()));
}

// What an int8 weight's kind says, which has no elements: its dtype is that of x, and its second size the inputs of a group,
// 0 when all share a scale.
struct Int8Kind {
  DType dtype;
  int64_t group_size;  // a multiple of `multiple`
  int64_t groups;

  Int8Kind(py::handle kind, int64_t in_features, int64_t multiple) : dtype(dtype_of(kind)) {
    const py::object sizes = get(kind, tensor_names().shape);
    check(PyObject_Length(sizes.ptr()) == 2, "kind must have two dimensions");
    group_size = number(owned(PySequence_GetItem(sizes.ptr(), 1)));
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
    const int64_t bytes = value_bytes(dtype);
    const Memory x_memory("x", x_tensor), y_memory("y", y_tensor);
    const int64_t x_size = x_memory.count(bytes), y_size = y_memory.count(bytes);
    tokens = out_features == 0 ? 0 : y_size / out_features;
    check(y_size >= 0 && y_size == tokens * out_features, "y must hold tokens * out_features elements, got ", y_size);
    int64_t needed;
    const bool overflow = __builtin_mul_overflow(tokens, in_features, &needed);
    // where there are no outputs, nobody knows how many tokens there are
    check(out_features == 0 || (!overflow && x_size == needed), "x must hold tokens * in_features elements, got ",
          x_size);
    x = x_memory.as<void>();
    y = reinterpret_cast<void*>(y_memory.address);
    bias = nullptr;
    if (bias_tensor.is_none()) return;
    const Memory bias_memory("bias", bias_tensor);
    const int64_t bias_size = bias_memory.count(bytes);
    check(bias_size == out_features, "bias must hold ", out_features, " elements, got ", bias_size);
    bias = bias_memory.as<void>();
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
