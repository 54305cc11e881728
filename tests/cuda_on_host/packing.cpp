// Runs csrc/cuda/pack_24.cu, fragments_24.cu, bitmap_rows.cu, bitmap_fragments.cu and keep_largest.cu on the CPU.
//   op: an op of ops.h   numbers: its sizes, first the dtype, 0 to 2   tensors: what it reads, in its order

#include "operands.h"
#include "ops.h"

using namespace sparsekern::cuda;

namespace {

uint64_t* status_of(Operands& operands, int64_t size) {
  auto* status = operands.result<uint64_t>(size);
  std::fill(status, status + size, 0);
  return status;
}

int run_24(Operands& operands, Float dtype, int64_t bytes, bool pack) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2);
  if (pack) {
    const auto* dense = operands.tensor<unsigned char>();
    auto* values = operands.result<unsigned char>(out_features * (in_features / 2) * bytes);
    auto* metadata = operands.result<int16_t>(out_features * ((in_features + 15) / 16));
    auto* status = status_of(operands, 3);
    return operands.finish(pack_24(dense, dtype, values, metadata, status, out_features, in_features, nullptr));
  }
  const auto* values = operands.tensor<unsigned char>();
  const auto* metadata = operands.tensor<int16_t>();
  auto* dense = operands.result<unsigned char>(out_features * in_features * bytes);
  auto* status = status_of(operands, 1);
  return operands.finish(unpack_24(values, dtype, metadata, dense, status, out_features, in_features, nullptr));
}

int64_t fragments_of(int64_t out_features, int64_t in_features) {
  return (out_features + kPanelRows - 1) / kPanelRows * ((in_features + kChunkInputs - 1) / kChunkInputs);
}

int run_fragments_24(Operands& operands) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2);
  const int64_t parts = fragments_of(out_features, in_features);
  const auto* values = operands.tensor<unsigned char>();
  const auto* metadata = operands.tensor<int16_t>();
  auto* fragments = operands.result<uint16_t>(parts * kChunkValues);
  auto* ordered = operands.result<uint32_t>(parts * kChunkWords);
  auto* status = status_of(operands, 1);
  return operands.finish(
      fragments_24(values, metadata, fragments, ordered, status, out_features, in_features, nullptr));
}

int run_fragments_24_to_dense(Operands& operands) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2);
  const auto* fragments = operands.tensor<uint16_t>();
  const auto* ordered = operands.tensor<uint32_t>();
  auto* dense = operands.result<uint16_t>(out_features * in_features);
  return operands.finish(fragments_24_to_dense(fragments, ordered, dense, out_features, in_features, nullptr));
}

int run_masks(Operands& operands) {
  const BitmapFragments sizes{nullptr, nullptr, nullptr, 0, 0, operands.number(1), operands.number(2)};
  const int64_t parts = sizes.panels() * sizes.segments();
  const auto* bitmap = operands.tensor<uint8_t>();
  auto* masks = operands.result<uint32_t>(parts * kSegmentWords);
  auto* quads = operands.result<int32_t>(parts * kLaneQuads);
  return operands.finish(
      bitmap_fragments_masks(bitmap, masks, quads, sizes.out_features, sizes.in_features, nullptr));
}

int run_cells(Operands& operands) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2), cell_rows = operands.number(3);
  const auto* dense = operands.tensor<uint16_t>();
  const auto* masks = operands.tensor<uint32_t>();
  const auto* quad_rows = operands.tensor<int32_t>();
  auto* cells = operands.result<unsigned char>(cell_rows * 32);
  return operands.finish(bitmap_fragments_cells(dense, masks, quad_rows, cells, static_cast<int>(cell_rows),
                                                out_features, in_features, nullptr));
}

int run_bits(Operands& operands, Float dtype) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2), stride = operands.number(3);
  const auto* dense = operands.tensor<unsigned char>();
  auto* bitmap = operands.result<uint8_t>(out_features * ((in_features + 7) / 8));
  auto* counts = operands.result<int64_t>(out_features);
  auto* status = status_of(operands, 2);
  return operands.finish(
      bitmap_bits(dense, stride, dtype, bitmap, counts, status, out_features, in_features, nullptr));
}

int run_values(Operands& operands, Float dtype, int64_t bytes) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2), stride = operands.number(3);
  const int64_t kept = operands.number(4);
  const auto* dense = operands.tensor<unsigned char>();
  const auto* bitmap = operands.tensor<uint8_t>();
  const auto* row_offsets = operands.tensor<int64_t>();
  auto* values = operands.result<unsigned char>(kept * bytes);
  return operands.finish(
      bitmap_values(dense, stride, dtype, bitmap, row_offsets, values, kept, out_features, in_features, nullptr));
}

int run_to_dense(Operands& operands, Float dtype, int64_t bytes) {
  const int64_t out_features = operands.number(1), in_features = operands.number(2), kept = operands.number(3);
  const auto* values = operands.tensor<unsigned char>();
  const auto* bitmap = operands.tensor<uint8_t>();
  const auto* row_offsets = operands.tensor<int64_t>();
  auto* dense = operands.result<unsigned char>(out_features * in_features * bytes);
  auto* status = status_of(operands, 1);
  return operands.finish(
      bitmap_to_dense(values, dtype, kept, bitmap, row_offsets, dense, status, out_features, in_features, nullptr));
}

int run_keep_largest(Operands& operands) {
  const int64_t sets = operands.number(1), size = operands.number(2), kept_stride = operands.number(3);
  const auto* saliency = operands.tensor<float>();
  const auto* kept = operands.tensor<int64_t>();
  auto* mask = operands.result<bool>(sets * size);
  auto* status = status_of(operands, 2);
  return operands.finish(keep_largest(saliency, kept, kept_stride, mask, status, sets, size, nullptr));
}

}  // namespace

int main(int argc, char** argv) {
  Operands operands(argc, argv);
  const auto dtype = static_cast<Float>(operands.number(0));
  const int64_t bytes = dtype == Float::kFloat32 ? 4 : 2;
  const std::string op = operands.op();
  if (op == "pack_24" || op == "unpack_24") return run_24(operands, dtype, bytes, op == "pack_24");
  if (op == "fragments_24") return run_fragments_24(operands);
  if (op == "fragments_24_to_dense") return run_fragments_24_to_dense(operands);
  if (op == "bitmap_fragments_masks") return run_masks(operands);
  if (op == "bitmap_fragments_cells") return run_cells(operands);
  if (op == "bitmap_bits") return run_bits(operands, dtype);
  if (op == "bitmap_values") return run_values(operands, dtype, bytes);
  if (op == "bitmap_to_dense") return run_to_dense(operands, dtype, bytes);
  if (op == "keep_largest") return run_keep_largest(operands);
  on_host::fail("no such op");
}
