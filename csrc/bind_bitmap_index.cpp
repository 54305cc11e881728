// The part of sparsekern._cpu that is on linear_bitmap_index and linear_bitmap_int8_index: checks, casts the address, calls.

#include "bind_linear.h"

namespace sparsekern {
namespace {

int64_t windows_of(int64_t in_features) { return (in_features + kWindowInputs - 1) / kWindowInputs; }

DType values_of(const std::string& name) {
  check(name == "bfloat16" || name == "int8", "values must be bfloat16 or int8, got ", name);
  return name == "int8" ? DType::kInt8 : DType::kBFloat16;
}

// A packed weight that lies where its tensors say: steps, masks, places, values, step_offsets, value_offsets.
struct IndexWeight {
  BitmapIndexWeight weight;
  int64_t panels;

  IndexWeight(DType dtype, const py::tuple& operands, int64_t out_features, int64_t in_features)
      : panels(panels_of(out_features)) {
    check_features(out_features, in_features);
    check(operands.size() >= 6, "a weight of this op has 6 operands");
    const Memory steps("steps", operands[0]), masks("masks", operands[1]), places("places", operands[2]),
        values("values", operands[3]), step_offsets("step_offsets", operands[4]),
        value_offsets("value_offsets", operands[5]);
    weight = {dtype,
              steps.as<uint16_t>("steps"),
              masks.as<uint64_t>("masks"),
              places.as<uint8_t>("places"),
              reinterpret_cast<const void*>(values.address),
              step_offsets.as<int64_t>("step_offsets"),
              value_offsets.as<int64_t>("value_offsets"),
              out_features,
              in_features};
    check(values.element_bytes == value_bytes(dtype), "values must have elements of ", value_bytes(dtype),
          " bytes, got ", values.element_bytes);
    check_size("steps", steps.size, panels, windows_of(in_features));
    check_size("step_offsets", step_offsets.size, 1, panels + 1);
    check_size("value_offsets", value_offsets.size, 1, panels + 1);
    check_size("places", places.size, 1, values.size);
    check_offsets("step_offsets", weight.step_offsets, panels, masks.size, "steps");
    check_offsets("value_offsets", weight.value_offsets, panels, values.size - kIndexTail, "kept values");
  }
};

struct IndexRows : Rows {
  IndexRows(const std::string& dtype, Address values, int64_t values_size, Address bitmap, int64_t bitmap_size,
            Address row_offsets, int64_t row_offsets_size, int64_t out_features, int64_t in_features)
      : Rows(values_of(dtype), values, values_size, bitmap, bitmap_size, row_offsets, row_offsets_size, out_features,
             in_features) {
    // rows that do not count their ones would be written outside
    check(check_bitmap(rows, find_set(kBitmapRowsSets, ""), 1) == kNoRow,
          "bitmap must keep as many weights in every row as row_offsets say");
  }
};

int64_t steps_checked(const IndexRows& packed, Address steps, int64_t steps_size, Address step_offsets,
                      int64_t step_offsets_size, Address value_offsets, int64_t value_offsets_size) {
  const int64_t panels = panels_of(packed.rows.out_features);
  check_size("steps", steps_size, panels, windows_of(packed.rows.in_features));
  check_size("step_offsets", step_offsets_size, 1, panels + 1);
  check_size("value_offsets", value_offsets_size, 1, panels + 1);
  auto* offsets = reinterpret_cast<int64_t*>(step_offsets);
  py::gil_scoped_release release;
  bitmap_to_index_steps(packed.rows, {reinterpret_cast<uint16_t*>(steps), nullptr, nullptr, nullptr, offsets,
                                      reinterpret_cast<int64_t*>(value_offsets)});
  return offsets[panels];
}

// The steps are those that were written for the same rows.
void fill_checked(const IndexRows& packed, const IndexWeight& made, int threads) {
  check_threads(threads);
  check_size("values", made.weight.value_offsets[made.panels], 1, packed.rows.kept);
  check(made.weight.out_features == packed.rows.out_features && made.weight.in_features == packed.rows.in_features &&
            made.weight.dtype == packed.rows.dtype,
        "both must have the same shape and values");
  const int64_t windows = windows_of(made.weight.in_features);
  for (int64_t panel = 0; panel < made.panels; ++panel) {
    int64_t steps = 0;
    for (int64_t w = 0; w < windows; ++w) steps += made.weight.steps[panel * windows + w];
    check(steps == made.weight.step_offsets[panel + 1] - made.weight.step_offsets[panel] && made.weight.value_offsets[panel] == packed.rows.row_offsets[panel * kPanelRows],
          "panel ", panel, " must have the steps and values of its rows");
  }
  py::gil_scoped_release release;
  bitmap_to_index(packed.rows,
                  {const_cast<uint16_t*>(made.weight.steps), const_cast<uint64_t*>(made.weight.masks),
                   const_cast<uint8_t*>(made.weight.places), const_cast<void*>(made.weight.values),
                   const_cast<int64_t*>(made.weight.step_offsets), const_cast<int64_t*>(made.weight.value_offsets)},
                  threads);
}

int64_t restore_checked(const IndexWeight& packed, Address values, int64_t values_size, Address bitmap,
                        int64_t bitmap_size, Address row_offsets, int64_t row_offsets_size, int threads) {
  const BitmapIndexWeight& weight = packed.weight;
  check_threads(threads);
  check_size("values", values_size, 1, weight.value_offsets[packed.panels]);
  check_size("bitmap", bitmap_size, weight.out_features, bitmap_row_bytes(weight.in_features));
  check_size("row_offsets", row_offsets_size, 1, weight.out_features + 1);
  py::gil_scoped_release release;
  const int64_t panel = index_to_bitmap(weight, reinterpret_cast<void*>(values), reinterpret_cast<uint8_t*>(bitmap),
                                        reinterpret_cast<int64_t*>(row_offsets), threads);
  return panel == kNoRow ? -1 : panel;
}

void linear_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                    py::handle bias, py::handle y, int threads) {
  check_threads(threads);
  check(has_linear_bitmap_index(), "this machine does not have the instructions of linear_bitmap_index");
  check_operands(operands, 6);
  check(Memory("values", operands[3]).dtype("values") == DType::kBFloat16, "values must be bfloat16");
  const BitmapIndexWeight weight = IndexWeight(DType::kBFloat16, operands, out_features, in_features).weight;
  const LinearTensors tensors(x, bias, y, DType::kBFloat16, out_features, in_features);
  call_linear(tensors, [&](auto... call) { return linear_bitmap_index(weight, call..., threads); });
}

// Behind the six operands of an index come scales and kind.
void int8_linear_checked(const py::tuple& operands, int64_t out_features, int64_t in_features, py::handle x,
                         py::handle bias, py::handle y, int threads) {
  check_threads(threads);
  check(has_linear_bitmap_int8_index(), "this machine does not have the instructions of linear_bitmap_int8_index");
  check_operands(operands, 8);
  const IndexWeight packed(DType::kInt8, operands, out_features, in_features);
  const Memory scales("scales", operands[6]);
  const Int8Kind kind({"kind", operands[7]}, in_features, kWindowInputs);
  check_size("scales", scales.size, packed.panels * kPanelRows, kind.groups);
  const Int8Scales scaled = {kind.dtype, scales.as<float>("scales"), kind.group_size};
  const LinearTensors tensors(x, bias, y, kind.dtype, out_features, in_features);
  call_linear(tensors, [&](auto... call) { return linear_bitmap_int8_index(packed.weight, scaled, call..., threads); });
}

}  // namespace

void bind_bitmap_index(py::module_& module) {
  py::class_<IndexWeight>(module, "BitmapIndexWeight", "Where the tensors of a packed weight lie; see csrc/ops.h. Keeps none of them.")
      .def(py::init([](const std::string& dtype, const py::tuple& operands, int64_t out_features, int64_t in_features) {
             return IndexWeight(values_of(dtype), operands, out_features, in_features);
           }),
           py::arg("dtype"), py::arg("operands"), py::arg("out_features"), py::arg("in_features"));
  py::class_<IndexRows>(module, "BitmapIndexRows", "Addresses and sizes of a weight as it is saved; see csrc/ops.h.")
      .def(py::init<const std::string&, Address, int64_t, Address, int64_t, Address, int64_t, int64_t, int64_t>(),
           py::arg("dtype"), py::arg("values"), py::arg("values_size"), py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"),
           py::arg("row_offsets_size"), py::arg("out_features"), py::arg("in_features"));
  module.def("has_linear_bitmap_index", has_linear_bitmap_index);
  module.def("bitmap_to_index_steps", steps_checked, py::arg("packed"), py::arg("steps"), py::arg("steps_size"),
             py::arg("step_offsets"), py::arg("step_offsets_size"), py::arg("value_offsets"),
             py::arg("value_offsets_size"));
  module.def("bitmap_to_index", fill_checked, py::arg("packed"), py::arg("made"), py::arg("threads"));
  module.def("index_to_bitmap", restore_checked, py::arg("weight"), py::arg("values"), py::arg("values_size"),
             py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"),
             py::arg("threads"));
  module.def("linear_bitmap_index", linear_checked, py::arg("operands"), py::arg("out_features"),
             py::arg("in_features"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"));
  module.def("has_linear_bitmap_int8_index", has_linear_bitmap_int8_index);
  module.def("linear_bitmap_int8_index", int8_linear_checked, py::arg("operands"), py::arg("out_features"),
             py::arg("in_features"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"));
}

}  // namespace sparsekern
