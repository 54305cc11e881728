// The part of sparsekern._cuda that is about bitmap weights in the order of the tensor cores.

#include "bind_cuda.h"

namespace {

using sparsekern::cuda::BitmapFragments;

// What every function here is given of the weight, checked.
BitmapFragments weight_of(uintptr_t masks, int64_t masks_size, uintptr_t cells, int64_t cell_rows, uintptr_t quad_rows,
                          int64_t quad_rows_size, int64_t capacity, int64_t out_features, int64_t in_features) {
  using namespace sparsekern::cuda;
  check(out_features >= 0 && in_features >= 0, "sizes must not be negative");
  check(out_features <= INT32_MAX - kFragmentRows && in_features <= INT32_MAX - kSegmentInputs,
        "sizes must be smaller than 2^31");
  check(cell_rows >= 0 && cell_rows <= INT32_MAX, "there must be fewer than 2^31 rows of cells");
  constexpr int64_t kMost = kSegmentBlocks * kBlockWeights / 4;
  check(capacity >= 0 && capacity <= kMost,
        "capacity must lie in 0.." + std::to_string(kMost) + ", got " + std::to_string(capacity));
  const BitmapFragments weight{at<const uint32_t>(masks),
                               at<const unsigned char>(cells),
                               at<const int32_t>(quad_rows),
                               static_cast<int>(cell_rows),
                               static_cast<int>(capacity),
                               out_features,
                               in_features};
  const int64_t parts = weight.panels() * weight.segments();
  check_size("masks", masks_size, parts, kSegmentWords);
  check(quad_rows_size == parts * kLaneQuads + 1,
        "quad_rows must hold panels * segments * 8 + 1 elements, got " + std::to_string(quad_rows_size));
  check(on_16_bytes(masks) && on_16_bytes(cells), "masks and cells must lie on 16 bytes");
  return weight;
}

int64_t workspace_bytes(const BitmapFragments& weight, int64_t tokens) {
  int64_t bytes;
  raise("linear_bitmap_fragments", sparsekern::cuda::linear_bitmap_fragments_workspace(weight, tokens, &bytes));
  return bytes;
}

int64_t linear_bitmap_fragments_workspace(int64_t tokens, int64_t capacity, int64_t out_features, int64_t in_features) {
  check(out_features >= 0 && in_features >= 0, "sizes must not be negative");
  const BitmapFragments weight{nullptr, nullptr, nullptr, 0, static_cast<int>(capacity), out_features, in_features};
  return workspace_bytes(weight, tokens);
}

template <typename Value>
void linear_bitmap_fragments(uintptr_t x, int64_t x_size, uintptr_t masks, int64_t masks_size, uintptr_t cells,
                             int64_t cell_rows, uintptr_t quad_rows, int64_t quad_rows_size, int64_t capacity,
                             uintptr_t bias, int64_t bias_size, uintptr_t y, int64_t y_size, uintptr_t workspace,
                             int64_t workspace_size, int64_t tokens, int64_t out_features, int64_t in_features,
                             uintptr_t stream) {
  const BitmapFragments weight = weight_of(masks, masks_size, cells, cell_rows, quad_rows, quad_rows_size, capacity,
                                           out_features, in_features);
  check(tokens >= 0 && tokens <= sparsekern::cuda::kBitmapFragmentsTokens,
        "there must be 0 to 64 tokens, got " + std::to_string(tokens));
  check_size("x", x_size, tokens, in_features);
  check_size("y", y_size, tokens, out_features);
  check(bias == 0 || bias_size == out_features,
        "bias must hold " + std::to_string(out_features) + " elements, got " + std::to_string(bias_size));
  check(on_16_bytes(workspace) && workspace_size >= workspace_bytes(weight, tokens),
        "workspace is too small or not on 16 bytes: it has " + std::to_string(workspace_size) + " bytes");
  raise("linear_bitmap_fragments",
        sparsekern::cuda::linear_bitmap_fragments(weight, at<const Value>(x), at<const Value>(bias), at<Value>(y),
                                                  at<void>(workspace), tokens, at<CUstream_st>(stream)));
}

void bitmap_fragments_masks(uintptr_t bitmap, int64_t bitmap_size, uintptr_t masks, int64_t masks_size, uintptr_t quads,
                            int64_t quads_size, int64_t out_features, int64_t in_features, uintptr_t stream) {
  // what a weight without cells is given, and its quads as all its rows of cells but the end
  weight_of(masks, masks_size, 0, 0, quads, quads_size + 1, 0, out_features, in_features);
  check_size("bitmap", bitmap_size, out_features, (in_features + 7) / 8);
  raise("bitmap_fragments",
        sparsekern::cuda::bitmap_fragments_masks(at<const uint8_t>(bitmap), at<uint32_t>(masks), at<int32_t>(quads),
                                                 out_features, in_features, at<CUstream_st>(stream)));
}

void bitmap_fragments_cells(uintptr_t dense, int64_t dense_size, uintptr_t masks, int64_t masks_size, uintptr_t cells,
                            int64_t cell_rows, uintptr_t quad_rows, int64_t quad_rows_size, int64_t out_features,
                            int64_t in_features, uintptr_t stream) {
  weight_of(masks, masks_size, cells, cell_rows, quad_rows, quad_rows_size, 0, out_features, in_features);
  check_size("dense", dense_size, out_features, in_features);
  raise("bitmap_fragments",
        sparsekern::cuda::bitmap_fragments_cells(at<const void>(dense), at<const uint32_t>(masks),
                                                 at<const int32_t>(quad_rows), at<unsigned char>(cells),
                                                 static_cast<int>(cell_rows), out_features, in_features,
                                                 at<CUstream_st>(stream)));
}

void bitmap_fragments_to_dense(uintptr_t masks, int64_t masks_size, uintptr_t cells, int64_t cell_rows,
                               uintptr_t quad_rows, int64_t quad_rows_size, int64_t capacity, uintptr_t dense,
                               int64_t dense_size, int64_t out_features, int64_t in_features, uintptr_t stream) {
  const BitmapFragments weight = weight_of(masks, masks_size, cells, cell_rows, quad_rows, quad_rows_size, capacity,
                                           out_features, in_features);
  check_size("dense", dense_size, out_features, in_features);
  raise("bitmap_fragments",
        sparsekern::cuda::bitmap_fragments_to_dense(weight, at<void>(dense), at<CUstream_st>(stream)));
}

template <typename Value>
void bind_linear_bitmap_fragments(py::module_& module, const char* name) {
  module.def(name, &linear_bitmap_fragments<Value>, py::arg("x"), py::arg("x_size"), py::arg("masks"),
             py::arg("masks_size"), py::arg("cells"), py::arg("cell_rows"), py::arg("quad_rows"),
             py::arg("quad_rows_size"), py::arg("capacity"), py::arg("bias"), py::arg("bias_size"), py::arg("y"),
             py::arg("y_size"), py::arg("workspace"), py::arg("workspace_size"), py::arg("tokens"),
             py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
}

}  // namespace

void bind_cuda_bitmap(py::module_& module) {
  module.def("linear_bitmap_fragments_workspace", &linear_bitmap_fragments_workspace, py::arg("tokens"),
             py::arg("capacity"), py::arg("out_features"), py::arg("in_features"));
  bind_linear_bitmap_fragments<__nv_bfloat16>(module, "linear_bitmap_fragments_bf16");
  bind_linear_bitmap_fragments<__half>(module, "linear_bitmap_fragments_fp16");
  module.def("bitmap_fragments_masks", &bitmap_fragments_masks, py::arg("bitmap"), py::arg("bitmap_size"),
             py::arg("masks"), py::arg("masks_size"), py::arg("quads"), py::arg("quads_size"), py::arg("out_features"),
             py::arg("in_features"), py::arg("stream"));
  module.def("bitmap_fragments_cells", &bitmap_fragments_cells, py::arg("dense"), py::arg("dense_size"),
             py::arg("masks"), py::arg("masks_size"), py::arg("cells"), py::arg("cell_rows"), py::arg("quad_rows"),
             py::arg("quad_rows_size"), py::arg("out_features"), py::arg("in_features"), py::arg("stream"));
  module.def("bitmap_fragments_to_dense", &bitmap_fragments_to_dense, py::arg("masks"), py::arg("masks_size"),
             py::arg("cells"), py::arg("cell_rows"), py::arg("quad_rows"), py::arg("quad_rows_size"),
             py::arg("capacity"), py::arg("dense"), py::arg("dense_size"), py::arg("out_features"),
             py::arg("in_features"), py::arg("stream"));
}
