// The part of sparsekern._cpu that is on packed weights: checks, casts the address, calls.

#include "bind_linear.h"

namespace sparsekern {
namespace {

py::tuple instruction_sets() { return names_of(kLinearBitmapSets); }

std::string isa() { return kLinearBitmapSets[find_set(kLinearBitmapSets, "")].name; }

// Returns what to give it to undo it.
std::string use(const std::string& isa) {
  const std::string before = first_allowed == 0 ? "" : kInstructionSets[first_allowed];
  first_allowed = isa.empty() ? 0 : rank_of(kLinearBitmapSets[find_set(kLinearBitmapSets, isa)].name);
  return before;
}

// A packed weight that lies where its tensors say: masks, values, panel_offsets.
struct Weight {
  BitmapWeight weight;
  int64_t panels;

  Weight(const py::tuple& operands, int64_t out_features, int64_t in_features) {
    check_features(out_features, in_features);
    check_operands(operands, 3);
    const Memory masks("masks", operands[0]), values("values", operands[1]), offsets("panel_offsets", operands[2]);
    weight = {values.dtype("values"),
              masks.as<uint32_t>("masks"),
              reinterpret_cast<const void*>(values.address),
              offsets.as<int64_t>("panel_offsets"),
              out_features,
              in_features};
    panels = panels_of(out_features);
    const int64_t blocks = blocks_of(in_features);
    int64_t needed;
    const bool overflow = __builtin_mul_overflow(panels, blocks * kBlockMasks, &needed);
    check(!overflow && masks.size == needed, "masks must hold panels * blocks * 16 words, got ", masks.size, " for ",
          panels, " panels of ", blocks, " blocks");
    check(offsets.size == panels + 1, "panel_offsets must hold ", panels + 1, " offsets, got ", offsets.size);
    const int64_t kept = values.size - kTailBytes / values.element_bytes;
    check_offsets("panel_offsets", weight.panel_offsets, panels, kept, "kept values");
  }
};

DenseRows dense_rows(const std::string& dtype, Address weight, int64_t row_stride, int64_t out_features,
                     int64_t in_features) {
  check_features(out_features, in_features);
  // 0: one row that stands for all
  check(row_stride >= 0, "row_stride must not be negative, got ", row_stride);
  return {dtype_of(dtype), reinterpret_cast<const void*>(weight), row_stride, out_features, in_features};
}

int64_t check_bitmap_checked(const Rows& packed, int threads, const std::string& isa) {
  check_threads(threads);
  const int set = find_set(kBitmapRowsSets, isa);
  py::gil_scoped_release release;
  return row_or_none(check_bitmap(packed.rows, set, threads));
}

int64_t bitmap_to_dense_checked(const Rows& packed, Address dense, int64_t dense_size, int threads,
                                const std::string& isa) {
  check_threads(threads);
  int64_t needed;
  check(!__builtin_mul_overflow(packed.rows.out_features, packed.rows.in_features, &needed) && dense_size == needed,
        "dense must hold out_features * in_features elements, got ", dense_size);
  const int set = find_set(kBitmapRowsSets, isa);
  py::gil_scoped_release release;
  return row_or_none(bitmap_to_dense(packed.rows, reinterpret_cast<void*>(dense), set, threads));
}

int64_t dense_to_bits_checked(const std::string& dtype, Address weight, int64_t row_stride, int64_t out_features,
                              int64_t in_features, Address bitmap, int64_t bitmap_size, Address row_offsets,
                              int64_t row_offsets_size, int threads, const std::string& isa) {
  check_threads(threads);
  const DenseRows dense = dense_rows(dtype, weight, row_stride, out_features, in_features);
  int64_t bytes;
  check(!__builtin_mul_overflow(out_features, bitmap_row_bytes(in_features), &bytes) && bitmap_size == bytes,
        "bitmap must hold out_features rows, got ", bitmap_size, " bytes");
  check(row_offsets_size == out_features + 1, "row_offsets must hold ", out_features + 1, " offsets, got ",
        row_offsets_size);
  const int set = find_set(kBitmapRowsSets, isa);
  py::gil_scoped_release release;
  return dense_to_bits(dense, reinterpret_cast<uint8_t*>(bitmap), reinterpret_cast<int64_t*>(row_offsets), set,
                       threads);
}

int64_t dense_to_values_checked(const Rows& packed, Address weight, int64_t row_stride, Address values,
                                int64_t values_size, int threads, const std::string& isa) {
  check_threads(threads);
  check(values_size == packed.rows.kept, "values must hold ", packed.rows.kept, " elements, got ", values_size);
  DenseRows dense = dense_rows("float32", weight, row_stride, packed.rows.out_features, packed.rows.in_features);
  dense.dtype = packed.rows.dtype;
  const int set = find_set(kBitmapRowsSets, isa);
  py::gil_scoped_release release;
  return row_or_none(dense_to_values(dense, packed.rows, reinterpret_cast<void*>(values), set, threads));
}

int64_t bitmap_to_panels_checked(const Rows& packed, Address masks, int64_t masks_size, Address values,
                                 int64_t values_size, Address panel_offsets, int64_t panel_offsets_size, int threads,
                                 const std::string& isa) {
  check_threads(threads);
  const int64_t panels = (packed.rows.out_features + kPanelRows - 1) / kPanelRows;
  const int64_t blocks = (packed.rows.in_features + kBlockInputs - 1) / kBlockInputs;
  int64_t needed;
  check(!__builtin_mul_overflow(panels, blocks * kBlockMasks, &needed) && masks_size == needed,
        "masks must hold panels * blocks * 16 words, got ", masks_size);
  const int64_t with_tail = packed.rows.kept + kTailBytes / value_bytes(packed.rows.dtype);
  check(values_size == with_tail, "values must hold ", with_tail, " elements, got ", values_size);
  check(panel_offsets_size == panels + 1, "panel_offsets must hold ", panels + 1, " offsets, got ", panel_offsets_size);
  const int set = find_set(kBitmapPanelsSets, isa);
  py::gil_scoped_release release;
  return row_or_none(bitmap_to_panels(packed.rows, reinterpret_cast<uint32_t*>(masks),
                                      reinterpret_cast<void*>(values), reinterpret_cast<int64_t*>(panel_offsets), set,
                                      threads));
}

int64_t panels_to_bitmap_checked(const Weight& packed, Address values, int64_t values_size, Address bitmap,
                                 int64_t bitmap_size, Address row_offsets, int64_t row_offsets_size, int threads,
                                 const std::string& isa) {
  const BitmapWeight& weight = packed.weight;
  check_threads(threads);
  const int64_t kept = weight.panel_offsets[packed.panels];
  check(values_size == kept, "values must hold ", kept, " elements, got ", values_size);
  int64_t bytes;
  check(!__builtin_mul_overflow(weight.out_features, bitmap_row_bytes(weight.in_features), &bytes) && bitmap_size == bytes,
        "bitmap must hold out_features rows, got ", bitmap_size, " bytes");
  check(row_offsets_size == weight.out_features + 1, "row_offsets must hold ", weight.out_features + 1,
        " offsets, got ", row_offsets_size);
  const int set = find_set(kBitmapPanelsSets, isa);
  py::gil_scoped_release release;
  return row_or_none(panels_to_bitmap(weight, reinterpret_cast<void*>(values), reinterpret_cast<uint8_t*>(bitmap),
                                      reinterpret_cast<int64_t*>(row_offsets), set, threads));
}

void linear_bitmap_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                           py::handle bias, py::handle y, int threads, const std::string& isa) {
  check_threads(threads);
  const BitmapWeight weight = Weight(operands, out_features, in_features).weight;
  const LinearTensors tensors(x, bias, y, weight.dtype, out_features, in_features);
  const int set = find_set(kLinearBitmapSets, isa);
  call_linear(tensors, [&](auto... call) { return linear_bitmap(weight, call..., set, threads); });
}

void expand_bitmap_checked(const Weight& packed, Address dense, int64_t dense_size, int64_t first_panel,
                           int64_t end_panel, int threads, const std::string& isa) {
  const BitmapWeight& weight = packed.weight;
  check_threads(threads);
  check_panels(dense_size, first_panel, end_panel, weight.out_features, weight.in_features);
  const int set = find_set(kLinearBitmapSets, isa);
  if (dense_size == 0) return;
  py::gil_scoped_release release;
  expand_bitmap(weight, reinterpret_cast<void*>(dense), first_panel, end_panel, set, threads);
}

}  // namespace

void bind_bitmap(py::module_& module) {
  module.attr("PANEL_ROWS") = kPanelRows;
  module.def("isa", isa, "The instruction set that linear_bitmap uses: the best this machine has and use() allows.");
  module.def("use", use, py::arg("isa"), "Choose no better instruction set than this, or with an empty one the best; returns what undoes it.");
  module.def("instruction_sets", instruction_sets, "Those this machine has, best first.");

  py::class_<Weight>(module, "BitmapWeight", "Where the tensors of a packed weight lie; see csrc/ops.h. Keeps none of them.")
      .def(py::init<const py::tuple&, int64_t, int64_t>(), py::arg("operands"), py::arg("out_features"),
           py::arg("in_features"));
  module.def("linear_bitmap", linear_bitmap_checked, py::arg("operands"), py::arg("out_features"),
             py::arg("in_features"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"),
             py::arg("isa") = "");
  module.def("expand_bitmap", expand_bitmap_checked, py::arg("weight"), py::arg("dense"), py::arg("dense_size"),
             py::arg("first_panel"), py::arg("end_panel"), py::arg("threads"), py::arg("isa") = "");
  py::class_<Rows>(module, "BitmapRows", "Addresses and sizes of a weight as it is saved; see csrc/ops.h.")
      .def(py::init([](const std::string& dtype, Address values, int64_t values_size, Address bitmap,
                       int64_t bitmap_size, Address row_offsets, int64_t row_offsets_size, int64_t out_features,
                       int64_t in_features) {
             return Rows(dtype_of(dtype), values, values_size, bitmap, bitmap_size, row_offsets, row_offsets_size,
                         out_features, in_features);
           }),
           py::arg("dtype"), py::arg("values"), py::arg("values_size"), py::arg("bitmap"), py::arg("bitmap_size"),
           py::arg("row_offsets"), py::arg("row_offsets_size"), py::arg("out_features"), py::arg("in_features"));
  module.def("bitmap_rows_sets", [] { return names_of(kBitmapRowsSets); }, "Those this machine has, best first.");
  module.def("check_bitmap", check_bitmap_checked, py::arg("packed"), py::arg("threads"), py::arg("isa") = "");
  module.def("bitmap_to_dense", bitmap_to_dense_checked, py::arg("packed"), py::arg("dense"), py::arg("dense_size"),
             py::arg("threads"), py::arg("isa") = "");
  module.def("dense_to_bits", dense_to_bits_checked, py::arg("dtype"), py::arg("weight"), py::arg("row_stride"),
             py::arg("out_features"), py::arg("in_features"), py::arg("bitmap"), py::arg("bitmap_size"),
             py::arg("row_offsets"), py::arg("row_offsets_size"), py::arg("threads"), py::arg("isa") = "");
  module.def("dense_to_values", dense_to_values_checked, py::arg("packed"), py::arg("weight"), py::arg("row_stride"),
             py::arg("values"), py::arg("values_size"), py::arg("threads"), py::arg("isa") = "");
  module.def("bitmap_panels_sets", [] { return names_of(kBitmapPanelsSets); }, "Those this machine has, best first.");
  module.def("bitmap_to_panels", bitmap_to_panels_checked, py::arg("packed"), py::arg("masks"), py::arg("masks_size"),
             py::arg("values"), py::arg("values_size"), py::arg("panel_offsets"), py::arg("panel_offsets_size"),
             py::arg("threads"), py::arg("isa") = "");
  module.def("panels_to_bitmap", panels_to_bitmap_checked, py::arg("weight"), py::arg("values"),
             py::arg("values_size"), py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"),
             py::arg("row_offsets_size"), py::arg("threads"), py::arg("isa") = "");
}

}  // namespace sparsekern
