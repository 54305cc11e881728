// linear_bitmap_int8 and its conversions, as drive.cpp does it with the other ops.

#include <vector>

#include "drive.h"

namespace {

// A vector of n elements whose memory ends there.
template <class T>
std::vector<T> exactly(int64_t n, T value = T{}) {
  std::vector<T> made(static_cast<size_t>(n), value);
  made.shrink_to_fit();
  return made;
}

struct Weight {
  int64_t out_features, in_features, group_size;
  std::vector<int8_t> values, panel_values;
  std::vector<uint8_t> bitmap;
  std::vector<int64_t> row_offsets, panel_offsets;
  std::vector<uint64_t> masks;
  std::vector<float> scales;

  Weight(int64_t outputs, int64_t inputs, int64_t group, double density)
      : out_features(outputs), in_features(inputs), group_size(group),
        bitmap(exactly<uint8_t>(outputs * bitmap_row_bytes(inputs))), row_offsets(exactly<int64_t>(outputs + 1)) {
    std::vector<int8_t> kept;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        if (static_cast<double>(below(1000)) >= density * 1000) continue;
        bitmap[static_cast<size_t>(o * bitmap_row_bytes(inputs) + i / 8)] |= static_cast<uint8_t>(1 << (i % 8));
        kept.push_back(static_cast<int8_t>(below(255) - 127));
      }
      row_offsets[static_cast<size_t>(o + 1)] = static_cast<int64_t>(kept.size());
    }
    values = exactly<int8_t>(static_cast<int64_t>(kept.size()));
    if (!kept.empty()) std::memcpy(values.data(), kept.data(), kept.size());
    const int64_t panels = (outputs + kPanelRows - 1) / kPanelRows;
    const int64_t blocks = (inputs + kInt8BlockInputs - 1) / kInt8BlockInputs;
    const int64_t groups = inputs == 0 ? 1 : (inputs + group - 1) / group;
    masks = exactly<uint64_t>(panels * blocks * kBlockMasks);
    panel_values = exactly<int8_t>(static_cast<int64_t>(kept.size()) + kTailBytes);
    panel_offsets = exactly<int64_t>(panels + 1);
    scales = exactly<float>(panels * groups * kPanelRows, 0.5f);
  }
  BitmapRows rows() {
    return {DType::kInt8,        values.data(), bitmap.data(), row_offsets.data(), static_cast<int64_t>(values.size()),
            out_features, in_features};
  }
  BitmapInt8Weight weight(DType dtype) {
    return {dtype,      masks.data(), panel_values.data(), panel_offsets.data(), scales.data(),
            group_size, out_features, in_features};
  }
};

// As much as the binding lets through: offsets that begin and end right.
void drive_lies(Weight& w, int set, int threads) {
  std::vector<uint64_t> masks = w.masks;
  std::vector<int8_t> panel_values = w.panel_values;
  std::vector<int64_t> panel_offsets = w.panel_offsets;
  for (int round = 0; round < 8; ++round) {
    std::vector<int64_t> offsets = w.row_offsets;
    std::vector<uint8_t> bitmap = w.bitmap;
    const int64_t lies[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 62};
    if (round < 4 && offsets.size() > 2) offsets[1 + static_cast<size_t>(below(w.out_features - 1))] = lies[round];
    if (round >= 4 && !bitmap.empty()) {
      bitmap[static_cast<size_t>(below(static_cast<int64_t>(bitmap.size())))] ^= static_cast<uint8_t>(1 << below(8));
    }
    BitmapRows rows = w.rows();
    rows.row_offsets = offsets.data();
    rows.bitmap = bitmap.data();
    const bool same = offsets == w.row_offsets && bitmap == w.bitmap;
    const int64_t wrong = bitmap_int8_to_panels(rows, masks.data(), panel_values.data(), panel_offsets.data(), set, threads);
    expect((wrong == kNoRow) == same, "what lies is refused");
  }
}

void drive(Weight& w, int set, int threads) {
  expect(bitmap_int8_to_panels(w.rows(), w.masks.data(), w.panel_values.data(), w.panel_offsets.data(), set, threads) ==
             kNoRow, "panels");
  auto values = exactly<int8_t>(static_cast<int64_t>(w.values.size()));
  auto bitmap = exactly<uint8_t>(static_cast<int64_t>(w.bitmap.size()));
  auto offsets = exactly<int64_t>(w.out_features + 1);
  const Int8RowsOut rows = {values.data(), bitmap.data(), offsets.data()};
  expect(panels_to_bitmap_int8(w.weight(DType::kFloat32), rows, set, threads) == kNoRow, "rows");
  expect(values == w.values && bitmap == w.bitmap && offsets == w.row_offsets, "what was saved comes back");
  drive_lies(w, set, threads);
  std::vector<uint64_t> lying = exactly<uint64_t>(static_cast<int64_t>(w.masks.size()), ~uint64_t{0});
  for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    BitmapInt8Weight liar = w.weight(dtype);
    liar.masks = lying.data();
    if (!lying.empty()) panels_to_bitmap_int8(liar, rows, set, threads);
    const int64_t size = value_bytes(dtype);
    for (int64_t tokens : {1, 3, 8, 20, 70}) {
      if (tokens > 8 && w.in_features > 2000) continue;
      // bytes of 0x3f are a number near 0.75 in both
      auto x = exactly<char>(tokens * w.in_features * size, 0x3f), bias = exactly<char>(w.out_features * size, 0x3f);
      auto y = exactly<char>(tokens * w.out_features * size);
      for (const BitmapInt8Weight& weight : {w.weight(dtype), liar}) {
        for (const void* b : {static_cast<const void*>(bias.data()), static_cast<const void*>(nullptr)}) {
          expect(linear_bitmap_int8(weight, x.data(), b, y.data(), tokens, set, threads), "memory");
        }
      }
    }
    const int64_t panels = (w.out_features + kPanelRows - 1) / kPanelRows;
    const int64_t first = below(panels + 1), end = first + below(panels - first + 1);
    const int64_t last_row = end * kPanelRows < w.out_features ? end * kPanelRows : w.out_features;
    auto dense = exactly<char>((first < end ? last_row - first * kPanelRows : 0) * w.in_features * size);
    expand_bitmap_int8(w.weight(dtype), dense.data(), first, end, set, threads);
    expand_bitmap_int8(liar, dense.data(), first, end, set, threads);
  }
}

}  // namespace

void drive_linear_bitmap_int8() {
  // the last is large enough for threads to be worth their start
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {16, 64}, {17, 513}, {37, 7}, {33, 700}, {5, 0}, {0, 5}, {131, 2001}};
  for (const auto& shape : shapes) {
    for (double density : {0.0, 0.3, 1.0}) {
      Weight w(shape[0], shape[1], density == 0.3 ? 192 : 4096, density);
      each_set(kLinearBitmapInt8Sets, [&](int set) { drive(w, set, shape[0] > 100 ? 3 : 1); });
    }
  }
}
