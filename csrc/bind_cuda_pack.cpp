// The part of sparsekern._cuda that makes masks, packs and unpacks.

#include "bind_cuda.h"

namespace {

using sparsekern::cuda::Float;

Float float_of(const std::string& dtype) {
  if (dtype == "bfloat16") return Float::kBfloat16;
  if (dtype == "float16") return Float::kFloat16;
  check(dtype == "float32", "dtype must be bfloat16, float16 or float32, got " + dtype);
  return Float::kFloat32;
}

// What a weight's elements lie on; vectors are only read and written where they lie on more.
void check_address(const char* name, uintptr_t address, uintptr_t bytes) {
  check(address % bytes == 0, std::string(name) + " must lie on " + std::to_string(bytes) + " bytes");
}

void check_shape(int64_t out_features, int64_t in_features) {
  check(out_features >= 0 && in_features >= 0, "sizes must not be negative");
  int64_t size;
  check(!__builtin_mul_overflow(out_features, in_features, &size) && size <= INT64_MAX / 8, "sizes are impossible");
}

void check_24(uintptr_t dense, int64_t dense_size, Float dtype, uintptr_t values, int64_t values_size,
              uintptr_t metadata, int64_t metadata_size, uintptr_t status, int64_t status_size, int64_t needed_status,
              int64_t out_features, int64_t in_features) {
  check_shape(out_features, in_features);
  check(in_features % 4 == 0, "in_features must be a multiple of 4, got " + std::to_string(in_features));
  check_size("dense", dense_size, out_features, in_features);
  check_size("values", values_size, out_features, in_features / 2);
  check_size("metadata", metadata_size, out_features, (in_features + 15) / 16);
  check_size("status", status_size, 1, needed_status);
  const uintptr_t bytes = dtype == Float::kFloat32 ? 4 : 2;
  check_address("dense", dense, bytes);
  check_address("values", values, bytes);
  check_address("metadata", metadata, 2);
  check_address("status", status, 8);
}

void pack_24(uintptr_t dense, int64_t dense_size, const std::string& dtype, uintptr_t values, int64_t values_size,
             uintptr_t metadata, int64_t metadata_size, uintptr_t status, int64_t status_size, int64_t out_features,
             int64_t in_features, uintptr_t stream) {
  const Float type = float_of(dtype);
  check_24(dense, dense_size, type, values, values_size, metadata, metadata_size, status, status_size, 3, out_features,
           in_features);
  check_address("values", values, 8);
  raise("pack_24", sparsekern::cuda::pack_24(at<const void>(dense), type, at<void>(values), at<int16_t>(metadata),
                                             at<uint64_t>(status), out_features, in_features, at<CUstream_st>(stream)));
}

void unpack_24(uintptr_t values, int64_t values_size, const std::string& dtype, uintptr_t metadata,
               int64_t metadata_size, uintptr_t dense, int64_t dense_size, uintptr_t status, int64_t status_size,
               int64_t out_features, int64_t in_features, uintptr_t stream) {
  const Float type = float_of(dtype);
  check_24(dense, dense_size, type, values, values_size, metadata, metadata_size, status, status_size, 1, out_features,
           in_features);
  raise("unpack_24",
        sparsekern::cuda::unpack_24(at<const void>(values), type, at<const int16_t>(metadata), at<void>(dense),
                                    at<uint64_t>(status), out_features, in_features, at<CUstream_st>(stream)));
}

void check_fragments_24(uintptr_t fragments, int64_t fragments_size, uintptr_t ordered, int64_t ordered_size,
                        int64_t out_features, int64_t in_features) {
  using namespace sparsekern::cuda;
  check_shape(out_features, in_features);
  check(in_features % 4 == 0, "in_features must be a multiple of 4, got " + std::to_string(in_features));
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const int64_t chunks = (in_features + kChunkInputs - 1) / kChunkInputs;
  check_size("fragments", fragments_size, panels, chunks * kChunkValues);
  check_size("ordered", ordered_size, panels, chunks * kChunkWords);
  check_address("fragments", fragments, 16);
  check_address("ordered", ordered, 16);
}

void fragments_24(uintptr_t values, int64_t values_size, uintptr_t metadata, int64_t metadata_size, uintptr_t fragments,
                  int64_t fragments_size, uintptr_t ordered, int64_t ordered_size, uintptr_t status,
                  int64_t status_size, int64_t out_features, int64_t in_features, uintptr_t stream) {
  check_fragments_24(fragments, fragments_size, ordered, ordered_size, out_features, in_features);
  check_size("values", values_size, out_features, in_features / 2);
  check_size("metadata", metadata_size, out_features, (in_features + 15) / 16);
  check_size("status", status_size, 1, 1);
  check_address("values", values, 2);
  check_address("metadata", metadata, 2);
  raise("fragments_24",
        sparsekern::cuda::fragments_24(at<const void>(values), at<const int16_t>(metadata), at<void>(fragments),
                                       at<uint32_t>(ordered), at<uint64_t>(status), out_features, in_features,
                                       at<CUstream_st>(stream)));
}

void fragments_24_to_dense(uintptr_t fragments, int64_t fragments_size, uintptr_t ordered, int64_t ordered_size,
                           uintptr_t dense, int64_t dense_size, int64_t out_features, int64_t in_features,
                           uintptr_t stream) {
  check_fragments_24(fragments, fragments_size, ordered, ordered_size, out_features, in_features);
  check_size("dense", dense_size, out_features, in_features);
  check_address("dense", dense, 8);
  raise("fragments_24_to_dense",
        sparsekern::cuda::fragments_24_to_dense(at<const void>(fragments), at<const uint32_t>(ordered), at<void>(dense),
                                                out_features, in_features, at<CUstream_st>(stream)));
}

// `stride` weights from row to row, the dense tensor being what its owner says it is.
void check_bitmap(uintptr_t dense, Float dtype, uintptr_t bitmap, int64_t bitmap_size, int64_t out_features,
                  int64_t in_features) {
  check_shape(out_features, in_features);
  check_size("bitmap", bitmap_size, out_features, (in_features + 7) / 8);
  check_address("dense", dense, dtype == Float::kFloat32 ? 4 : 2);
}

void bitmap_bits(uintptr_t dense, int64_t stride, const std::string& dtype, uintptr_t bitmap, int64_t bitmap_size,
                 uintptr_t counts, int64_t counts_size, uintptr_t status, int64_t status_size, int64_t out_features,
                 int64_t in_features, uintptr_t stream) {
  const Float type = float_of(dtype);
  check_bitmap(dense, type, bitmap, bitmap_size, out_features, in_features);
  check(stride >= 0, "stride must not be negative, got " + std::to_string(stride));
  check_size("counts", counts_size, 1, out_features);
  check_size("status", status_size, 1, 2);
  raise("bitmap_bits", sparsekern::cuda::bitmap_bits(at<const void>(dense), stride, type, at<uint8_t>(bitmap),
                                                     at<int64_t>(counts), at<uint64_t>(status), out_features,
                                                     in_features, at<CUstream_st>(stream)));
}

void bitmap_values(uintptr_t dense, int64_t stride, const std::string& dtype, uintptr_t bitmap, int64_t bitmap_size,
                   uintptr_t row_offsets, int64_t row_offsets_size, uintptr_t values, int64_t values_size,
                   int64_t out_features, int64_t in_features, uintptr_t stream) {
  const Float type = float_of(dtype);
  check_bitmap(dense, type, bitmap, bitmap_size, out_features, in_features);
  check(stride >= 0, "stride must not be negative, got " + std::to_string(stride));
  check_size("row_offsets", row_offsets_size, 1, out_features + 1);
  check(values_size >= 0, "sizes must not be negative");
  raise("bitmap_values",
        sparsekern::cuda::bitmap_values(at<const void>(dense), stride, type, at<const uint8_t>(bitmap),
                                        at<const int64_t>(row_offsets), at<void>(values), values_size, out_features,
                                        in_features, at<CUstream_st>(stream)));
}

void bitmap_to_dense(uintptr_t values, int64_t values_size, const std::string& dtype, uintptr_t bitmap,
                     int64_t bitmap_size, uintptr_t row_offsets, int64_t row_offsets_size, uintptr_t dense,
                     int64_t dense_size, uintptr_t status, int64_t status_size, int64_t out_features,
                     int64_t in_features, uintptr_t stream) {
  const Float type = float_of(dtype);
  check_bitmap(dense, type, bitmap, bitmap_size, out_features, in_features);
  check_size("row_offsets", row_offsets_size, 1, out_features + 1);
  check_size("dense", dense_size, out_features, in_features);
  check_size("status", status_size, 1, 1);
  check(values_size >= 0, "sizes must not be negative");
  check_address("values", values, type == Float::kFloat32 ? 4 : 2);
  raise("bitmap_to_dense",
        sparsekern::cuda::bitmap_to_dense(at<const void>(values), type, values_size, at<const uint8_t>(bitmap),
                                          at<const int64_t>(row_offsets), at<void>(dense), at<uint64_t>(status),
                                          out_features, in_features, at<CUstream_st>(stream)));
}

void keep_largest(uintptr_t saliency, uintptr_t kept, int64_t kept_stride, uintptr_t mask, int64_t mask_size,
                  uintptr_t status, int64_t status_size, int64_t sets, int64_t size, uintptr_t stream) {
  check(sets >= 0, "sizes must not be negative");
  check(size == 2 || size == 4 || size == 8 || size == 16,
        "a set must have 2, 4, 8 or 16 saliencies, got " + std::to_string(size));
  check(kept_stride >= 0, "kept_stride must not be negative, got " + std::to_string(kept_stride));
  check_size("mask", mask_size, sets, size);
  check_size("status", status_size, 1, 2);
  check(on_16_bytes(saliency) && on_16_bytes(mask), "saliency and mask must lie on 16 bytes");
  raise("keep_largest", sparsekern::cuda::keep_largest(at<const float>(saliency), at<const int64_t>(kept), kept_stride,
                                                       at<bool>(mask), at<uint64_t>(status), sets, size,
                                                       at<CUstream_st>(stream)));
}

}  // namespace

void bind_cuda_pack(py::module_& module) {
  module.def("pack_24", &pack_24, py::arg("dense"), py::arg("dense_size"), py::arg("dtype"), py::arg("values"),
             py::arg("values_size"), py::arg("metadata"), py::arg("metadata_size"), py::arg("status"),
             py::arg("status_size"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("unpack_24", &unpack_24, py::arg("values"), py::arg("values_size"), py::arg("dtype"), py::arg("metadata"),
             py::arg("metadata_size"), py::arg("dense"), py::arg("dense_size"), py::arg("status"),
             py::arg("status_size"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("fragments_24", &fragments_24, py::arg("values"), py::arg("values_size"), py::arg("metadata"),
             py::arg("metadata_size"), py::arg("fragments"), py::arg("fragments_size"), py::arg("ordered"),
             py::arg("ordered_size"), py::arg("status"), py::arg("status_size"), py::arg("out_features"),
             py::arg("in_features"), py::arg("stream"));
  module.def("fragments_24_to_dense", &fragments_24_to_dense, py::arg("fragments"), py::arg("fragments_size"),
             py::arg("ordered"), py::arg("ordered_size"), py::arg("dense"), py::arg("dense_size"),
             py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("bitmap_bits", &bitmap_bits, py::arg("dense"), py::arg("stride"), py::arg("dtype"), py::arg("bitmap"),
             py::arg("bitmap_size"), py::arg("counts"), py::arg("counts_size"), py::arg("status"),
             py::arg("status_size"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("bitmap_values", &bitmap_values, py::arg("dense"), py::arg("stride"), py::arg("dtype"), py::arg("bitmap"),
             py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"), py::arg("values"),
             py::arg("values_size"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("bitmap_to_dense", &bitmap_to_dense, py::arg("values"), py::arg("values_size"), py::arg("dtype"),
             py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"),
             py::arg("dense"), py::arg("dense_size"), py::arg("status"), py::arg("status_size"),
             py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("keep_largest", &keep_largest, py::arg("saliency"), py::arg("kept"), py::arg("kept_stride"),
             py::arg("mask"), py::arg("mask_size"), py::arg("status"), py::arg("status_size"), py::arg("sets"),
             py::arg("size"), py::arg("stream"));
}
