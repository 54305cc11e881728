// How a Python tensor is described in C without Python being asked for each property: the part of DLPack's exchange API,
// version 1, that is read here. torch has it since 2.10, as torch.Tensor.__dlpack_c_exchange_api__.
//
// Source: https://dmlc.github.io/dlpack/latest/c_api.html, whose layout this repeats.
#pragma once

#include <cstdint>

namespace sparsekern::dlpack {

constexpr uint32_t kMajor = 1;
// the name of the capsule that holds an ExchangeApi
constexpr const char* kCapsule = "dlpack_exchange_api";

constexpr int32_t kCpu = 1;     // of the device types
constexpr uint8_t kFloat = 2;   // type codes
constexpr uint8_t kBFloat = 4;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;    // the tensor's own, like strides
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48, "as DLTensor");

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // describes a tensor that the caller keeps alive; not 0 and a Python error when it cannot
  int (*describe)(void* tensor, Tensor* out);
  void* current_work_stream;
};

}  // namespace sparsekern::dlpack
