// linear_bitmap without the arithmetic of the zeros, whatever is kept, which linear_bitmap leaves to a threshold: the
// bits of the portable product, an x that is not finite, and masks that lie. Numbers are such that sums are exact.

#include "cpu/linear_bitmap_nonzero.h"
#include "drive.h"

namespace {

// masks and values as linear_bitmap reads them
struct Panels {
  DType dtype;
  int64_t out_features, in_features;
  Buffer<uint32_t> masks;
  Buffer<int64_t> offsets;
  Buffer<char> values;

  Panels(DType type, int64_t outputs, int64_t inputs, double density)
      : dtype(type), out_features(outputs), in_features(inputs),
        masks(panel_count(outputs) * pair_count(inputs)), offsets(panel_count(outputs) + 1), values(0) {
    for (int64_t panel = 0; panel < panel_count(outputs); ++panel) {
      offsets[panel + 1] = offsets[panel];
      for (int64_t pair = 0; pair < pair_count(inputs); ++pair) {
        uint32_t mask = 0;
        for (int64_t bit = 0; bit < 32; ++bit) {
          const bool inside = panel * kPanelRows + bit / 2 < outputs && pair * 2 + bit % 2 < inputs;
          const bool kept = inside && static_cast<double>(below(1 << 20)) < density * (1 << 20);
          mask |= static_cast<uint32_t>(kept) << bit;
        }
        masks[panel * pair_count(inputs) + pair] = mask;
        offsets[panel + 1] += __builtin_popcount(mask);
      }
    }
    const int64_t kept = offsets[offsets.size - 1];
    values = Buffer<char>(kept * value_bytes(type) + kTailBytes);
    fill(values.data(), type, kept, 1.0);
  }
  BitmapWeight weight() { return {dtype, masks.data(), values.data(), offsets.data(), out_features, in_features}; }
};

int portable_set() {
  int set = 0;
  while (kLinearBitmapSets[set + 1].name != nullptr) ++set;
  return set;
}

void drive_product(Panels& p, int64_t tokens) {
  const int64_t size = value_bytes(p.dtype);
  Buffer<char> x(tokens * p.in_features * size), bias(p.out_features * size), y(tokens * p.out_features * size, 0x7f);
  Buffer<char> wanted(y.size);
  fill(x.data(), p.dtype, tokens * p.in_features, 1.0);
  fill(bias.data(), p.dtype, p.out_features, 1.0);
  expect(linear_bitmap(p.weight(), x.data(), bias.data(), wanted.data(), tokens, portable_set(), 1), "memory");
  const BitmapWeight weight = p.weight();
  BitmapWeight lying = weight;
  Buffer<uint32_t> masks(p.masks.size, 0xff);
  lying.masks = masks.data();
  each_set(kLinearBitmapSets, [&](int set) {
    const LinearBitmapNonzero* kernel = nonzero_kernel(set, p.dtype);
    if (kernel == nullptr) return;
    for (int threads : {1, 3}) {
      const Nonzero done = linear_bitmap_nonzero(*kernel, weight, x.data(), bias.data(), y.data(), tokens, threads);
      expect(done == Nonzero::kDone, "memory");
      expect(std::memcmp(y.data(), wanted.data(), static_cast<size_t>(y.size)) == 0, "the portable bits");
      linear_bitmap_nonzero(*kernel, lying, x.data(), nullptr, y.data(), tokens, threads);
    }
  });
  // the last input of the last token
  const int64_t last = tokens * p.in_features - 1;
  const uint16_t infinity = p.dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  if (p.dtype == DType::kFloat32) reinterpret_cast<float*>(x.data())[last] = -__builtin_inff();
  if (p.dtype != DType::kFloat32) reinterpret_cast<uint16_t*>(x.data())[last] = infinity;
  Buffer<char> untouched(y.size, 0x55), before(y.size, 0x55);
  each_set(kLinearBitmapSets, [&](int set) {
    const LinearBitmapNonzero* kernel = nonzero_kernel(set, p.dtype);
    if (kernel == nullptr) return;
    const Nonzero done = linear_bitmap_nonzero(*kernel, weight, x.data(), nullptr, untouched.data(), tokens, 3);
    expect(done == Nonzero::kNotFinite, "an infinite input is seen");
    expect(std::memcmp(untouched.data(), before.data(), static_cast<size_t>(y.size)) == 0, "and nothing is written");
  });
}

}  // namespace

void drive_linear_bitmap_nonzero() {
  // 300 rows are more than a group of panels; 700 tokens more than the blocks for which a weight is expanded once
  const int64_t shapes[][3] = {{1, 1, 1},    {7, 37, 15},   {16, 32, 16},   {17, 513, 17}, {37, 7, 127},
                               {50, 257, 33}, {33, 130, 48}, {300, 129, 129}, {20, 70, 700}, {40, 300, 81}};
  for (const auto& shape : shapes) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat16}) {
      for (double density : {0.0, 0.3, 1.0}) {
        Panels p(dtype, shape[0], shape[1], density);
        drive_product(p, shape[2]);
      }
    }
  }
}
