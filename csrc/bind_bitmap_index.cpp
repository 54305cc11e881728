// The part of sparsekern._cpu that is on linear_bitmap_index: checks, casts the address, calls.

#include <new>

#include "bind_cpu.h"

namespace sparsekern {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // no honest request, and products of two would overflow

void check_sizes(int64_t out_features, int64_t in_features) {
  check(out_features >= 0 && out_features < kMost, "out_features is impossible: " + std::to_string(out_features));
  check(in_features >= 0 && in_features < kMost, "in_features is impossible: " + std::to_string(in_features));
}

void check_size(const char* name, int64_t size, int64_t rows, int64_t columns) {
  int64_t needed;
  const bool overflow = __builtin_mul_overflow(rows, columns, &needed);
  check(!overflow && size == needed, std::string(name) + " must hold " + std::to_string(rows) + " * " +
                                         std::to_string(columns) + " elements, got " + std::to_string(size));
}

void check_offsets(const char* name, const int64_t* offsets, int64_t panels, int64_t last) {
  check(offsets[0] == 0 && offsets[panels] == last, std::string(name) + " must run from 0 to " + std::to_string(last) +
                                                        ", got " + std::to_string(offsets[0]) + " to " +
                                                        std::to_string(offsets[panels]));
  for (int64_t panel = 0; panel < panels; ++panel) {
    check(offsets[panel] <= offsets[panel + 1],
          std::string(name) + " must not fall, panel " + std::to_string(panel) + " does");
  }
}

int64_t panels_of(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }
int64_t windows_of(int64_t in_features) { return (in_features + kWindowInputs - 1) / kWindowInputs; }

// A packed weight: addresses, and the sizes of what lies there.
struct IndexWeight {
  BitmapIndexWeight weight;
  int64_t panels;

  IndexWeight(Address steps, int64_t steps_size, Address masks, int64_t masks_size, Address places, int64_t places_size,
              Address values, int64_t values_size, Address step_offsets, int64_t step_offsets_size,
              Address value_offsets, int64_t value_offsets_size, int64_t out_features, int64_t in_features)
      : weight{reinterpret_cast<const uint16_t*>(steps),
               reinterpret_cast<const uint64_t*>(masks),
               reinterpret_cast<const uint8_t*>(places),
               reinterpret_cast<const uint16_t*>(values),
               reinterpret_cast<const int64_t*>(step_offsets),
               reinterpret_cast<const int64_t*>(value_offsets),
               out_features,
               in_features},
        panels(panels_of(out_features)) {
    check_sizes(out_features, in_features);
    check_size("steps", steps_size, panels, windows_of(in_features));
    check_size("step_offsets", step_offsets_size, 1, panels + 1);
    check_size("value_offsets", value_offsets_size, 1, panels + 1);
    check_size("places", places_size, 1, values_size);
    check_offsets("step_offsets", weight.step_offsets, panels, masks_size);
    check_offsets("value_offsets", weight.value_offsets, panels, values_size - kIndexTail);
  }
};

struct Rows {
  BitmapRows rows;

  Rows(Address values, int64_t values_size, Address bitmap, int64_t bitmap_size, Address row_offsets,
       int64_t row_offsets_size, int64_t out_features, int64_t in_features)
      : rows{DType::kBFloat16,
             reinterpret_cast<const void*>(values),
             reinterpret_cast<const uint8_t*>(bitmap),
             reinterpret_cast<const int64_t*>(row_offsets),
             values_size,
             out_features,
             in_features} {
    check_sizes(out_features, in_features);
    check_size("bitmap", bitmap_size, out_features, bitmap_row_bytes(in_features));
    check_size("row_offsets", row_offsets_size, 1, out_features + 1);
    check(rows.row_offsets[0] == 0 && rows.row_offsets[out_features] == values_size,
          "row_offsets must run from 0 to the " + std::to_string(values_size) + " values");
    // rows that do not count their ones would be written outside
    check(check_bitmap(rows, find_set(kBitmapRowsSets, ""), 1) == kNoRow,
          "bitmap must keep as many weights in every row as row_offsets say");
  }
};

int64_t steps_checked(const Rows& packed, Address steps, int64_t steps_size, Address step_offsets,
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
void fill_checked(const Rows& packed, const IndexWeight& made, int threads) {
  check_threads(threads);
  check_size("values", made.weight.value_offsets[made.panels], 1, packed.rows.kept);
  check(made.weight.out_features == packed.rows.out_features && made.weight.in_features == packed.rows.in_features,
        "both must have the same shape");
  const int64_t windows = windows_of(made.weight.in_features);
  for (int64_t panel = 0; panel < made.panels; ++panel) {
    int64_t steps = 0;
    for (int64_t w = 0; w < windows; ++w) steps += made.weight.steps[panel * windows + w];
    check(steps == made.weight.step_offsets[panel + 1] - made.weight.step_offsets[panel] &&
              made.weight.value_offsets[panel] == packed.rows.row_offsets[panel * kPanelRows],
          "panel " + std::to_string(panel) + " must have the steps and values of its rows");
  }
  py::gil_scoped_release release;
  bitmap_to_index(packed.rows,
                  {const_cast<uint16_t*>(made.weight.steps), const_cast<uint64_t*>(made.weight.masks),
                   const_cast<uint8_t*>(made.weight.places), const_cast<uint16_t*>(made.weight.values),
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

void linear_checked(const IndexWeight& packed, Address x, int64_t x_size, Address bias, int64_t bias_size, Address y,
                    int64_t y_size, int64_t tokens, int threads) {
  const BitmapIndexWeight& weight = packed.weight;
  check_threads(threads);
  check(has_linear_bitmap_index(), "this machine does not have the instructions of linear_bitmap_index");
  check(tokens >= 0 && tokens < kMost, "tokens is impossible: " + std::to_string(tokens));
  check_size("x", x_size, tokens, weight.in_features);
  check_size("y", y_size, tokens, weight.out_features);
  check(bias == 0 || bias_size == weight.out_features,
        "bias must hold " + std::to_string(weight.out_features) + " elements, got " + std::to_string(bias_size));
  if (y_size == 0) return;
  bool done;
  {
    py::gil_scoped_release release;
    done = linear_bitmap_index(weight, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(bias),
                               reinterpret_cast<void*>(y), tokens, threads);
  }
  if (!done) throw std::bad_alloc();
}

}  // namespace

void bind_bitmap_index(py::module_& module) {
  py::class_<IndexWeight>(module, "BitmapIndexWeight", "Addresses and sizes of a packed weight; see csrc/ops.h.")
      .def(py::init<Address, int64_t, Address, int64_t, Address, int64_t, Address, int64_t, Address, int64_t, Address,
                    int64_t, int64_t, int64_t>(),
           py::arg("steps"), py::arg("steps_size"), py::arg("masks"), py::arg("masks_size"), py::arg("places"),
           py::arg("places_size"), py::arg("values"), py::arg("values_size"), py::arg("step_offsets"),
           py::arg("step_offsets_size"), py::arg("value_offsets"), py::arg("value_offsets_size"),
           py::arg("out_features"), py::arg("in_features"));
  py::class_<Rows>(module, "BitmapIndexRows", "Addresses and sizes of a weight as it is saved; see csrc/ops.h.")
      .def(py::init<Address, int64_t, Address, int64_t, Address, int64_t, int64_t, int64_t>(), py::arg("values"),
           py::arg("values_size"), py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"),
           py::arg("row_offsets_size"), py::arg("out_features"), py::arg("in_features"));
  module.def("has_linear_bitmap_index", has_linear_bitmap_index);
  module.def("bitmap_to_index_steps", steps_checked, py::arg("packed"), py::arg("steps"), py::arg("steps_size"),
             py::arg("step_offsets"), py::arg("step_offsets_size"), py::arg("value_offsets"),
             py::arg("value_offsets_size"));
  module.def("bitmap_to_index", fill_checked, py::arg("packed"), py::arg("made"), py::arg("threads"));
  module.def("index_to_bitmap", restore_checked, py::arg("weight"), py::arg("values"), py::arg("values_size"),
             py::arg("bitmap"), py::arg("bitmap_size"), py::arg("row_offsets"), py::arg("row_offsets_size"),
             py::arg("threads"));
  module.def("linear_bitmap_index", linear_checked, py::arg("weight"), py::arg("x"), py::arg("x_size"), py::arg("bias"),
             py::arg("bias_size"), py::arg("y"), py::arg("y_size"), py::arg("tokens"), py::arg("threads"));
}

}  // namespace sparsekern
