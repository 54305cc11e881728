// The part of sparsekern._cpu that is on int8 bitmap weights: checks, casts the address, calls.

#include <new>

#include "bind_cpu.h"

namespace sparsekern {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // no honest request, and products of two would overflow

void check_features(int64_t out_features, int64_t in_features) {
  check(out_features >= 0 && out_features < kMost, "out_features is impossible: " + std::to_string(out_features));
  check(in_features >= 0 && in_features < kMost, "in_features is impossible: " + std::to_string(in_features));
}

void check_size(const char* name, int64_t size, int64_t rows, int64_t columns) {
  int64_t needed;
  const bool overflow = __builtin_mul_overflow(rows, columns, &needed);
  check(!overflow && size == needed, std::string(name) + " must hold " + std::to_string(rows) + " * " +
                                         std::to_string(columns) + " elements, got " + std::to_string(size));
}

int64_t panels_of(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

int64_t masks_of(int64_t in_features) {
  return (in_features + kInt8BlockInputs - 1) / kInt8BlockInputs * kBlockMasks;
}

// A packed weight: addresses, and the sizes of what lies there.
struct Int8Weight {
  BitmapInt8Weight weight;
  int64_t panels;

  Int8Weight(const std::string& dtype, Address masks, int64_t masks_size, Address values, int64_t values_size,
             Address panel_offsets, int64_t panel_offsets_size, Address scales, int64_t scales_size, int64_t group_size,
             int64_t out_features, int64_t in_features)
      : weight{dtype_of(dtype),
               reinterpret_cast<const uint64_t*>(masks),
               reinterpret_cast<const int8_t*>(values),
               reinterpret_cast<const int64_t*>(panel_offsets),
               reinterpret_cast<const float*>(scales),
               group_size,
               out_features,
               in_features},
        panels(panels_of(out_features)) {
    check_features(out_features, in_features);
    check(weight.dtype != DType::kFloat16, "dtype must be bfloat16 or float32, got float16");
    check(group_size > 0 && group_size < kMost && group_size % kInt8BlockInputs == 0,
          "group_size must be a multiple of " + std::to_string(kInt8BlockInputs) + ", got " +
              std::to_string(group_size));
    check_size("masks", masks_size, panels, masks_of(in_features));
    // a row without inputs has a scale too
    const int64_t groups = in_features == 0 ? 1 : (in_features + group_size - 1) / group_size;
    check_size("scales", scales_size, panels * kPanelRows, groups);
    check(panel_offsets_size == panels + 1, "panel_offsets must hold " + std::to_string(panels + 1) +
                                                " offsets, got " + std::to_string(panel_offsets_size));
    const int64_t kept = values_size - kTailBytes;
    check(weight.panel_offsets[0] == 0 && weight.panel_offsets[panels] == kept,
          "panel_offsets must run from 0 to the " + std::to_string(kept) + " kept values, got " +
              std::to_string(weight.panel_offsets[0]) + " to " + std::to_string(weight.panel_offsets[panels]));
    for (int64_t panel = 0; panel < panels; ++panel) {
      check(weight.panel_offsets[panel] <= weight.panel_offsets[panel + 1],
            "panel_offsets must not fall, panel " + std::to_string(panel) + " does");
    }
  }
};

// What Python sees of a row: -1 when none is wrong.
int64_t row_or_none(int64_t row) { return row == kNoRow ? -1 : row; }

void linear_checked(const Int8Weight& packed, Address x, int64_t x_size, Address bias, int64_t bias_size, Address y,
                    int64_t y_size, int64_t tokens, int threads, const std::string& isa) {
  const BitmapInt8Weight& weight = packed.weight;
  check_threads(threads);
  check(tokens >= 0 && tokens < kMost, "tokens is impossible: " + std::to_string(tokens));
  check_size("x", x_size, tokens, weight.in_features);
  check_size("y", y_size, tokens, weight.out_features);
  check(bias == 0 || bias_size == weight.out_features,
        "bias must hold " + std::to_string(weight.out_features) + " elements, got " + std::to_string(bias_size));
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  if (y_size == 0) return;
  bool done;
  {
    py::gil_scoped_release release;
    done = linear_bitmap_int8(weight, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(bias),
                              reinterpret_cast<void*>(y), tokens, set, threads);
  }
  if (!done) throw std::bad_alloc();
}

void expand_checked(const Int8Weight& packed, Address dense, int64_t dense_size, int64_t first_panel, int64_t end_panel,
                    int threads, const std::string& isa) {
  const BitmapInt8Weight& weight = packed.weight;
  check_threads(threads);
  check(0 <= first_panel && first_panel <= end_panel && end_panel <= packed.panels,
        "panels must lie in 0.." + std::to_string(packed.panels) + ", got " + std::to_string(first_panel) + ".." +
            std::to_string(end_panel));
  const int64_t end_row = end_panel * kPanelRows < weight.out_features ? end_panel * kPanelRows : weight.out_features;
  check_size("dense", dense_size, first_panel < end_panel ? end_row - first_panel * kPanelRows : 0, weight.in_features);
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
  check_features(out_features, in_features);
  check_size("bitmap", bitmap_size, out_features, bitmap_row_bytes(in_features));
  check(row_offsets_size == out_features + 1, "row_offsets must hold " + std::to_string(out_features + 1) +
                                                  " offsets, got " + std::to_string(row_offsets_size));
  const BitmapRows rows = {DType::kInt8,
                           reinterpret_cast<const void*>(values),
                           reinterpret_cast<const uint8_t*>(bitmap),
                           reinterpret_cast<const int64_t*>(row_offsets),
                           values_size,
                           out_features,
                           in_features};
  check(values_size >= 0 && rows.row_offsets[0] == 0 && rows.row_offsets[out_features] == values_size,
        "row_offsets must run from 0 to the " + std::to_string(values_size) + " values, got " +
            std::to_string(rows.row_offsets[0]) + " to " + std::to_string(rows.row_offsets[out_features]));
  check_size("masks", masks_size, panels_of(out_features), masks_of(in_features));
  check_size("values", panel_values_size, 1, values_size + kTailBytes);
  check_size("panel_offsets", panel_offsets_size, 1, panels_of(out_features) + 1);
  const int set = find_set(kLinearBitmapInt8Sets, isa);
  py::gil_scoped_release release;
  return row_or_none(bitmap_int8_to_panels(rows, reinterpret_cast<uint64_t*>(masks),
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
  py::class_<Int8Weight>(module, "BitmapInt8Weight", "Addresses and sizes of a packed weight; see csrc/ops.h.")
      .def(py::init<const std::string&, Address, int64_t, Address, int64_t, Address, int64_t, Address, int64_t, int64_t,
                    int64_t, int64_t>(),
           py::arg("dtype"), py::arg("masks"), py::arg("masks_size"), py::arg("values"), py::arg("values_size"),
           py::arg("panel_offsets"), py::arg("panel_offsets_size"), py::arg("scales"), py::arg("scales_size"),
           py::arg("group_size"), py::arg("out_features"), py::arg("in_features"));
  module.def("linear_bitmap_int8_sets", [] { return names_of(kLinearBitmapInt8Sets); }, "Those this machine has, best first.");
  module.def("linear_bitmap_int8", linear_checked, py::arg("weight"), py::arg("x"), py::arg("x_size"), py::arg("bias"),
             py::arg("bias_size"), py::arg("y"), py::arg("y_size"), py::arg("tokens"), py::arg("threads"),
             py::arg("isa") = "");
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
