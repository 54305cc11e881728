// The part of sparsekern._cpu that is on int8 bitmap weights: checks, casts the address, calls.

#include "bind_linear.h"

namespace sparsekern {
namespace {

int64_t masks_of(int64_t in_features) {
  return (in_features + kInt8BlockInputs - 1) / kInt8BlockInputs * kBlockMasks;
}

// A packed weight that lies where its tensors say: masks, values, panel_offsets, scales and kind.
struct Int8Weight {
  BitmapInt8Weight weight;
  int64_t panels;

  Int8Weight(const py::tuple& operands, int64_t out_features, int64_t in_features) {
    check_features(out_features, in_features);
    check_operands(operands, 5);
    const Memory masks("masks", operands[0]), values("values", operands[1]), offsets("panel_offsets", operands[2]),
        scales("scales", operands[3]);
    const Int8Kind kind({"kind", operands[4]}, in_features, kInt8BlockInputs);
    weight = {kind.dtype,
              masks.as<uint64_t>("masks"),
              values.as<int8_t>("values"),
              offsets.as<int64_t>("panel_offsets"),
              scales.as<float>("scales"),
              kind.group_size,
              out_features,
              in_features};
    panels = panels_of(out_features);
    check_size("masks", masks.size, panels, masks_of(in_features));
    check_size("scales", scales.size, panels * kPanelRows, kind.groups);
    check(offsets.size == panels + 1, "panel_offsets must hold ", panels + 1, " offsets, got ", offsets.size);
    check_offsets("panel_offsets", weight.panel_offsets, panels, values.size - kTailBytes, "kept values");
  }
};

void linear_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                    py::handle bias, py::handle y, int threads, const std::string& isa) {
  check_threads(threads);
  const BitmapInt8Weight weight = Int8Weight(operands, out_features, in_features).weight;
  const LinearTensors tensors(x, bias, y, weight.dtype, out_features, in_features);
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  call_linear(tensors, [&](auto... call) { return linear_bitmap_int8(weight, call..., set, threads); });
}

void expand_checked(const Int8Weight& packed, Address dense, int64_t dense_size, int64_t first_panel, int64_t end_panel,
                    int threads, const std::string& isa) {
  const BitmapInt8Weight& weight = packed.weight;
  check_threads(threads);
  check_panels(dense_size, first_panel, end_panel, weight.out_features, weight.in_features);
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  if (dense_size == 0) return;
  py::gil_scoped_release release;
  expand_bitmap_int8(weight, reinterpret_cast<void*>(dense), first_panel, end_panel, set, threads);
}

int64_t to_panels_checked(Address values, int64_t values_size, Address bitmap, int64_t bitmap_size, Address row_offsets,
                          int64_t row_offsets_size, int64_t out_features, int64_t in_features, Address masks,
                          int64_t masks_size, Address panel_values, int64_t panel_values_size, Address panel_offsets,
                          int64_t panel_offsets_size, int threads, const std::string& isa) {
  check_threads(threads);
  const Rows packed(DType::kInt8, values, values_size, bitmap, bitmap_size, row_offsets, row_offsets_size, out_features,
                    in_features);
  check_size("masks", masks_size, panels_of(out_features), masks_of(in_features));
  check_size("values", panel_values_size, 1, values_size + kTailBytes);
  check_size("panel_offsets", panel_offsets_size, 1, panels_of(out_features) + 1);
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  py::gil_scoped_release release;
  return row_or_none(bitmap_int8_to_panels(packed.rows, reinterpret_cast<uint64_t*>(masks),
                                           reinterpret_cast<int8_t*>(panel_values),
                                           reinterpret_cast<int64_t*>(panel_offsets), set, threads));
}

int64_t to_rows_checked(const Int8Weight& packed, Address values, int64_t values_size, Address bitmap,
                        int64_t bitmap_size, Address row_offsets, int64_t row_offsets_size, int threads,
                        const std::string& isa) {
  const BitmapInt8Weight& weight = packed.weight;
  check_threads(threads);
  check_size("values", values_size, 1, weight.panel_offsets[packed.panels]);
  check_size("bitmap", bitmap_size, weight.out_features, bitmap_row_bytes(weight.in_features));
  check_size("row_offsets", row_offsets_size, 1, weight.out_features + 1);
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  py::gil_scoped_release release;
  return row_or_none(panels_to_bitmap_int8(weight,
                                           {reinterpret_cast<int8_t*>(values), reinterpret_cast<uint8_t*>(bitmap),
                                            reinterpret_cast<int64_t*>(row_offsets)},
                                           set, threads));
}

}  // namespace

void bind_bitmap_int8(py::module_& module) {
  py::class_<Int8Weight>(module, "BitmapInt8Weight", "Where the tensors of a packed weight lie; see csrc/ops.h. Keeps none of them.")
      .def(py::init<const py::tuple&, int64_t, int64_t>(), py::arg("operands"), py::arg("out_features"),
           py::arg("in_features"));
  module.def("linear_bitmap_int8_sets", [] { return names_of(kLinearBitmapInt8Sets); }, "Those this machine has, best first.");
  module.def("linear_bitmap_int8", linear_checked, py::arg("operands"), py::arg("out_features"), py::arg("in_features"),
             py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"), py::arg("isa") = "");
  module.def("expand_bitmap_int8", expand_checked, py::arg("weight"), py::arg("dense"), py::arg("dense_size"),
             py::arg("first_panel"), py::arg("end_panel"), py::arg("threads"), py::arg("isa") = "");
  module.def("bitmap_int8_to_panels", to_panels_checked, py::arg("values"), py::arg("values_size"), py::arg("bitmap"),
             py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"), py::arg("out_features"),
             py::arg("in_features"), py::arg("masks"), py::arg("masks_size"), py::arg("panel_values"),
             py::arg("panel_values_size"), py::arg("panel_offsets"), py::arg("panel_offsets_size"), py::arg("threads"),
             py::arg("isa") = "");
  module.def("panels_to_bitmap_int8", to_rows_checked, py::arg("weight"), py::arg("values"), py::arg("values_size"),
             py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"),
             py::arg("threads"), py::arg("isa") = "");
}

}  // namespace sparsekern
