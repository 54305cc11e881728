// linear_bitmap_index, linear_bitmap_int8_index and their conversions, as drive.cpp does it with the other ops.

#include <vector>

#include "drive.h"

namespace {

// Value: uint16_t of bfloat16, or int8_t
template <class Value>
struct Weight {
  static constexpr bool kIsInt8 = sizeof(Value) == 1;
  static constexpr DType kDType = kIsInt8 ? DType::kInt8 : DType::kBFloat16;
  int64_t out_features, in_features, panels;
  std::vector<Value> values, step_values;
  std::vector<uint16_t> steps;
  std::vector<uint8_t> bitmap, places;
  std::vector<uint64_t> masks;
  std::vector<int64_t> row_offsets, step_offsets, value_offsets;

  static size_t size(int64_t n) { return static_cast<size_t>(n); }

  Weight(int64_t outputs, int64_t inputs, int64_t percent)
      : out_features(outputs), in_features(inputs), panels((outputs + kPanelRows - 1) / kPanelRows),
        steps(size(panels * ((inputs + kWindowInputs - 1) / kWindowInputs))),
        bitmap(size(outputs * bitmap_row_bytes(inputs))), row_offsets(size(outputs + 1)), step_offsets(size(panels + 1)),
        value_offsets(size(panels + 1)) {
    int64_t kept = 0;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        if (below(100) >= percent) continue;
        bitmap[size(o * bitmap_row_bytes(inputs) + i / 8)] |= static_cast<uint8_t>(1 << (i % 8));
        ++kept;
      }
      row_offsets[size(o + 1)] = kept;
    }
    values = std::vector<Value>(size(kept));
    for (auto& value : values) value = static_cast<Value>(kIsInt8 ? below(255) - 127 : 0x3f80 + below(128));
    bitmap_to_index_steps(rows(), {steps.data(), nullptr, nullptr, nullptr, step_offsets.data(), value_offsets.data()});
    masks = std::vector<uint64_t>(size(step_offsets.back()));
    places = std::vector<uint8_t>(size(kept + kIndexTail));
    step_values = std::vector<Value>(size(kept + kIndexTail));
  }
  BitmapRows rows() {
    return {kDType,       values.data(), bitmap.data(), row_offsets.data(), static_cast<int64_t>(values.size()),
            out_features, in_features};
  }
  BitmapIndexWeight weight() {
    return {kDType,
            steps.data(),
            masks.data(),
            places.data(),
            step_values.data(),
            step_offsets.data(),
            value_offsets.data(),
            out_features,
            in_features};
  }
};

void multiply(Weight<uint16_t>& w, int64_t tokens, int threads) {
  if (!has_linear_bitmap_index()) return;
  std::vector<uint16_t> x(static_cast<size_t>(tokens * w.in_features), uint16_t{0x3f80});
  std::vector<uint16_t> bias(static_cast<size_t>(w.out_features)), y(static_cast<size_t>(tokens * w.out_features));
  for (const void* b : {static_cast<const void*>(bias.data()), static_cast<const void*>(nullptr)}) {
    expect(linear_bitmap_index(w.weight(), x.data(), b, y.data(), tokens, threads), "memory");
  }
}

void multiply(Weight<int8_t>& w, int64_t tokens, int threads) {
  if (!has_linear_bitmap_int8_index()) return;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    const int64_t size = value_bytes(dtype), group_size = tokens == 3 ? 2 * kWindowInputs : int64_t{1} << 20;
    const int64_t groups = w.in_features == 0 ? 1 : (w.in_features + group_size - 1) / group_size;
    std::vector<float> scales(static_cast<size_t>(w.panels * groups * kPanelRows), 0.5f);
    // bytes of 0x3f are a number near 0.75 in both
    std::vector<char> x(static_cast<size_t>(tokens * w.in_features * size), 0x3f);
    std::vector<char> bias(static_cast<size_t>(w.out_features * size), 0x3f);
    std::vector<char> y(static_cast<size_t>(tokens * w.out_features * size));
    for (const void* b : {static_cast<const void*>(bias.data()), static_cast<const void*>(nullptr)}) {
      expect(linear_bitmap_int8_index(w.weight(), {dtype, scales.data(), group_size}, x.data(), b, y.data(), tokens,
                                      threads), "memory");
    }
  }
}

template <class Value>
void drive(Weight<Value>& w, int threads) {
  bitmap_to_index(w.rows(), {w.steps.data(), w.masks.data(), w.places.data(), w.step_values.data(),
                             w.step_offsets.data(), w.value_offsets.data()}, threads);
  std::vector<Value> values(w.values.size());
  std::vector<uint8_t> bitmap(w.bitmap.size());
  std::vector<int64_t> offsets(w.row_offsets.size());
  expect(index_to_bitmap(w.weight(), values.data(), bitmap.data(), offsets.data(), threads) == kNoRow, "rows");
  expect(values == w.values && bitmap == w.bitmap && offsets == w.row_offsets, "what was saved comes back");
  const std::vector<uint64_t> masks = w.masks;
  const std::vector<uint16_t> steps = w.steps;
  const std::vector<uint8_t> places = w.places;
  // as much as the binding lets through: all but offsets that leave their tensors
  for (int round = 0; round < 12; ++round) {
    if (round == 1) w.masks.assign(masks.size(), ~uint64_t{0});
    if (round == 2) w.steps.assign(steps.size(), uint16_t{0xffff});
    if (round == 3) w.places.assign(places.size(), uint8_t{0xff});
    if (round > 3 && !w.masks.empty()) {
      const auto at = static_cast<size_t>(below(static_cast<int64_t>(masks.size())));
      if (round % 3 == 0) w.masks[at] ^= uint64_t{1} << below(64);
      if (round % 3 == 1) w.steps[static_cast<size_t>(below(static_cast<int64_t>(steps.size())))] ^= 1;
      if (round % 3 == 2) w.places[0] ^= static_cast<uint8_t>(1 + below(255));
    }
    const bool same = masks == w.masks && steps == w.steps;
    const bool taken = index_to_bitmap(w.weight(), values.data(), bitmap.data(), offsets.data(), threads) == kNoRow;
    expect(same || !taken, "masks and steps that lie are refused");
    for (int64_t tokens : {1, 3, 70}) multiply(w, tokens, threads);
    w.masks = masks;
    w.steps = steps;
    w.places = places;
  }
}

}  // namespace

void drive_linear_bitmap_index() {
  // the last is large enough for threads to be worth their start
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {16, 256}, {17, 513}, {37, 7}, {5, 0}, {0, 5}, {131, 3001}};
  for (const auto& shape : shapes) {
    for (int64_t percent : {0, 10, 100}) {
      Weight<uint16_t> w(shape[0], shape[1], percent);
      drive(w, shape[0] > 100 ? 3 : 1);
      Weight<int8_t> w8(shape[0], shape[1], percent);
      drive(w8, shape[0] > 100 ? 3 : 1);
    }
  }
}
