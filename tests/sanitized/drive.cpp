// Every op of csrc/cpu, on every instruction set that this machine has, at sizes that divide nothing, with buffers that
// end where their contents end, and with operands that lie as far as the binding lets them. Built with the address and
// the undefined-behaviour sanitizer, which end the program with a report; a wrong result ends it with a line.

#include "drive.h"

namespace {

// A weight in all its forms.
struct Packed {
  DType dtype;
  int64_t out_features, in_features, panels, blocks;
  Buffer<char> dense, values, panel_values;
  Buffer<uint8_t> bitmap;
  Buffer<int64_t> row_offsets, panel_offsets;
  Buffer<uint32_t> masks;

  Packed(DType type, int64_t outputs, int64_t inputs, double density)
      : dtype(type), out_features(outputs), in_features(inputs), panels((outputs + kPanelRows - 1) / kPanelRows),
        blocks((inputs + kBlockInputs - 1) / kBlockInputs), dense(outputs * inputs * value_bytes(type)), values(0),
        panel_values(0), bitmap(outputs * bitmap_row_bytes(inputs)), row_offsets(outputs + 1),
        panel_offsets(panels + 1), masks(panels * blocks * kBlockMasks) {
    fill(dense.data(), dtype, outputs * inputs, density);
  }
  DenseRows dense_rows() { return {dtype, dense.data(), in_features, out_features, in_features}; }
  BitmapRows rows() {
    return {dtype, values.data(), bitmap.data(), row_offsets.data(), kept(), out_features, in_features};
  }
  BitmapWeight weight() {
    return {dtype, masks.data(), panel_values.data(), panel_offsets.data(), out_features, in_features};
  }
  int64_t kept() { return values.size / value_bytes(dtype); }
};

// What the binding lets through: offsets that begin and end right.
void lie(Buffer<int64_t>& offsets) {
  const int64_t lies[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 62, offsets[offsets.size - 1] + 1, 0};
  if (offsets.size > 2) offsets[1 + below(offsets.size - 2)] = lies[below(6)];
}

void drive_conversions(Packed& p, int set, int threads) {
  expect(dense_to_bits(p.dense_rows(), p.bitmap.data(), p.row_offsets.data(), set, threads) == 0, "all is finite");
  p.values = Buffer<char>(p.row_offsets[p.out_features] * value_bytes(p.dtype));
  expect(dense_to_values(p.dense_rows(), p.rows(), p.values.data(), set, threads) == kNoRow, "values");
  expect(check_bitmap(p.rows(), set, threads) == kNoRow, "check");
  Buffer<char> dense(p.dense.size, 0x7f);
  expect(bitmap_to_dense(p.rows(), dense.data(), set, threads) == kNoRow, "dense");
  expect(std::memcmp(dense.data(), p.dense.data(), static_cast<size_t>(dense.size)) == 0, "the dense bits");

  p.panel_values = Buffer<char>(p.values.size + kTailBytes);
  expect(bitmap_to_panels(p.rows(), p.masks.data(), p.panel_values.data(), p.panel_offsets.data(), set, threads) ==
             kNoRow, "panels");
  Buffer<char> values(p.values.size);
  Buffer<uint8_t> bitmap(p.bitmap.size);
  Buffer<int64_t> offsets(p.row_offsets.size);
  expect(panels_to_bitmap(p.weight(), values.data(), bitmap.data(), offsets.data(), set, threads) == kNoRow, "rows");
  expect(std::memcmp(values.data(), p.values.data(), static_cast<size_t>(values.size)) == 0, "the values");
  expect(std::memcmp(bitmap.data(), p.bitmap.data(), static_cast<size_t>(bitmap.size)) == 0, "the bitmap");
  expect(std::memcmp(offsets.data(), p.row_offsets.data(), static_cast<size_t>(offsets.size) * 8) == 0, "offsets");

  // lies: what is returned does not matter here, only that nothing else is read or written
  for (int round = 0; round < 12; ++round) {
    Buffer<int64_t> row_offsets(p.row_offsets.size);
    Buffer<uint8_t> lying(p.bitmap.size);
    std::memcpy(row_offsets.data(), p.row_offsets.data(), static_cast<size_t>(row_offsets.size) * 8);
    std::memcpy(lying.data(), p.bitmap.data(), static_cast<size_t>(lying.size));
    if (round % 2 == 0) lie(row_offsets);
    if (round == 1) std::memset(lying.data(), 0xff, static_cast<size_t>(lying.size));
    if (round > 2 && lying.size > 0) lying[below(lying.size)] ^= static_cast<uint8_t>(1 << below(8));
    BitmapRows rows = p.rows();
    rows.row_offsets = row_offsets.data();
    rows.bitmap = lying.data();
    const int64_t wrong = check_bitmap(rows, set, threads);
    expect((bitmap_to_dense(rows, dense.data(), set, threads) == kNoRow) == (wrong == kNoRow), "dense refuses alike");
    dense_to_values(p.dense_rows(), rows, values.data(), set, threads);
    Buffer<char> panel_values(p.panel_values.size);
    Buffer<uint32_t> masks(p.masks.size);
    Buffer<int64_t> panel_offsets(p.panel_offsets.size);
    expect(bitmap_to_panels(rows, masks.data(), panel_values.data(), panel_offsets.data(), set, threads) == wrong,
           "panels refuse alike");
    // masks that lie
    std::memcpy(masks.data(), p.masks.data(), static_cast<size_t>(masks.size) * 4);
    if (round == 0) std::memset(masks.data(), 0xff, static_cast<size_t>(masks.size) * 4);
    if (round > 0 && masks.size > 0) masks[below(masks.size)] ^= uint32_t{1} << below(32);
    BitmapWeight weight = p.weight();
    weight.masks = masks.data();
    const bool same = masks.size == 0 || std::memcmp(masks.data(), p.masks.data(), static_cast<size_t>(masks.size) * 4) == 0;
    expect((panels_to_bitmap(weight, values.data(), bitmap.data(), offsets.data(), set, threads) == kNoRow) == same,
           "a flipped mask is refused");
  }
}

void drive_linear(Packed& p, int64_t tokens, int set, int threads) {
  const int64_t size = value_bytes(p.dtype);
  Buffer<char> x(tokens * p.in_features * size), bias(p.out_features * size), y(tokens * p.out_features * size);
  fill(x.data(), p.dtype, tokens * p.in_features, 1.0);
  fill(bias.data(), p.dtype, p.out_features, 1.0);
  expect(linear_bitmap(p.weight(), x.data(), bias.data(), y.data(), tokens, set, threads), "memory");
  expect(linear_bitmap(p.weight(), x.data(), nullptr, y.data(), tokens, set, threads), "memory");
  const int64_t first = below(p.panels + 1), end = first + below(p.panels - first + 1);
  const int64_t last_row = end * kPanelRows < p.out_features ? end * kPanelRows : p.out_features;
  Buffer<char> dense((first < end ? last_row - first * kPanelRows : 0) * p.in_features * size);
  expand_bitmap(p.weight(), dense.data(), first, end, set, threads);
  expect(std::memcmp(dense.data(), p.dense.data() + first * kPanelRows * p.in_features * size,
                     static_cast<size_t>(dense.size)) == 0, "expansion");
  // masks that lie: the binding does not count them
  Buffer<uint32_t> masks(p.masks.size, 0xff);
  BitmapWeight weight = p.weight();
  weight.masks = masks.data();
  linear_bitmap(weight, x.data(), bias.data(), y.data(), tokens, set, threads);
  expand_bitmap(weight, dense.data(), first, end, set, threads);
}

void drive_packed() {
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {16, 32}, {17, 513}, {37, 7}, {50, 257}, {33, 1100}, {5, 0}, {0, 5}};
  for (const auto& shape : shapes) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat16}) {
      for (double density : {0.0, 0.3, 1.0}) {
        for (int threads : {1, 3}) {
          Packed p(dtype, shape[0], shape[1], density);
          each_set(kBitmapRowsSets, [&](int set) { drive_conversions(p, set, threads); });
          each_set(kLinearBitmapSets, [&](int set) {
            for (int64_t tokens : {1, 3, 4, 7, 17, 70}) drive_linear(p, tokens, set, threads);
          });
        }
      }
    }
  }
}

// Large enough for threads to be worth their start.
void drive_threads() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat16}) {
    Packed p(dtype, 131, 3001, 0.5);
    each_set(kBitmapRowsSets, [&](int set) { drive_conversions(p, set, 3); });
    each_set(kLinearBitmapSets, [&](int set) { drive_linear(p, 5, set, 3); });
  }
}

void drive_not_finite() {
  Buffer<uint16_t> dense(37);
  dense[36] = 0x7f80;
  dense[0] = 0x8000;
  Buffer<uint8_t> bitmap(5);
  Buffer<int64_t> offsets(2);
  each_set(kBitmapRowsSets, [&](int set) {
    expect(dense_to_bits({DType::kBFloat16, dense.data(), 37, 1, 37}, bitmap.data(), offsets.data(), set, 1) == 1, "inf");
    expect(bitmap[0] == 0 && bitmap[4] == 16 && offsets[1] == 1, "the bits of one weight");
  });
}

void drive_obs_sweep() {
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {33, 128}, {65, 100}, {16, 8}};
  for (const auto& shape : shapes) {
    const int64_t rows = shape[0], block = shape[1], stride = block + 3;
    for (int threads : {1, 3}) {
      Buffer<float> weight((rows - 1) * stride + block), u(block * block), scale(rows);
      Buffer<float> pruned((rows - 1) * stride + block), e((rows - 1) * stride + block);
      Buffer<uint8_t> mask((rows - 1) * stride + block);
      fill(weight.data(), DType::kFloat32, weight.size, 1.0);
      fill(u.data(), DType::kFloat32, u.size, 0.1);
      for (int64_t j = 0; j < block; ++j) u[j * block + j] = 1.0f;
      for (int64_t i = 0; i < rows; ++i) scale[i] = 0.25f;
      for (int64_t i = 0; i < mask.size; ++i) mask[i] = static_cast<uint8_t>(below(2));
      each_set(kObsSweepSets, [&](int set) {
        for (int64_t m : {int64_t{0}, int64_t{4}, int64_t{8}}) {
          if (m != 0 && block % m != 0) continue;
          for (float* steps : {static_cast<float*>(nullptr), scale.data()}) {
            const ObsSweep sweep = {weight.data(), stride, u.data(), mask.data(), stride, m / 2, m,
                                    steps, 7.0f, pruned.data(), stride, e.data(), stride, rows, block};
            expect(obs_sweep(sweep, set, threads), "memory");
          }
        }
      });
    }
  }
}

void drive_keep_largest() {
  const int64_t shapes[][2] = {{1, 1}, {1, 5000}, {37, 4}, {5, 129}, {1, 70001}, {3, 0}};
  for (const auto& shape : shapes) {
    const int64_t sets = shape[0], size = shape[1];
    for (int threads : {1, 3}) {
      Buffer<float> saliency(sets * size);
      for (int64_t i = 0; i < saliency.size; ++i) saliency[i] = static_cast<float>(below(1000));
      Buffer<int64_t> kept(sets);
      for (int64_t i = 0; i < sets; ++i) kept[i] = below(size + 1);
      Buffer<uint8_t> mask(sets * size, 0x7f);
      expect(keep_largest(saliency.data(), kept.data(), 1, mask.data(), sets, size, threads) == 0, "no NaN");
      for (int64_t set = 0; set < sets; ++set) {
        int64_t ones = 0;
        for (int64_t i = 0; i < size; ++i) ones += mask[set * size + i];
        expect(ones == kept[set], "as many as asked");
      }
      if (saliency.size == 0) continue;
      const uint32_t nan = 0x7fc00000u;
      std::memcpy(&saliency[below(saliency.size)], &nan, sizeof nan);
      expect(keep_largest(saliency.data(), kept.data(), 1, mask.data(), sets, size, threads) == 1, "one NaN");
    }
  }
}

void drive_gram() {
  const int64_t shapes[][2] = {{1, 1}, {3, 37}, {300, 65}, {17, 130}, {0, 5}};
  for (const auto& shape : shapes) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat16}) {
      Buffer<char> x(shape[0] * shape[1] * value_bytes(dtype));
      fill(x.data(), dtype, shape[0] * shape[1], 1.0);
      Buffer<float> total(shape[1] * shape[1]);
      each_set(kGramSets, [&](int set) {
        // as the binding has it
        if (dtype != DType::kBFloat16 && std::strcmp(kGramSets[set].name, "avx512_bf16") == 0) return;
        for (int threads : {1, 3}) expect(gram(x.data(), dtype, total.data(), shape[0], shape[1], set, threads), "memory");
      });
    }
  }
}

void drive_addmm() {
  if (!has_addmm()) return;
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 37, 5}, {65, 3, 130}, {17, 300, 257}, {4, 0, 4}};
  for (const auto& s : shapes) {
    const int64_t rows = s[0], inner = s[1], columns = s[2], stride = columns + 5;
    Buffer<float> a(rows * inner), b(inner * columns), total((rows - 1) * stride + columns);
    fill(a.data(), DType::kFloat32, a.size, 1.0);
    fill(b.data(), DType::kFloat32, b.size, 1.0);
    for (bool a_rows : {true, false}) {
      for (bool b_rows : {true, false}) {
        for (int threads : {1, 3}) {
          expect(addmm(total.data(), stride, {a.data(), a_rows ? inner : 1, a_rows ? 1 : rows},
                       {b.data(), b_rows ? columns : 1, b_rows ? 1 : inner}, rows, inner, columns, -0.5f, threads),
                 "memory");
        }
      }
    }
  }
}

void drive_stream_read() {
  for (int64_t bytes : {0, 1, 7, 8, 63, 64, 65, 4097, 1000003}) {
    Buffer<uint8_t> buffer(bytes, 1);
    const uint64_t whole = static_cast<uint64_t>(bytes / 8) * 0x0101010101010101u;
    const uint64_t rest = bytes % 8 == 0 ? 0 : 0x0101010101010101u >> (64 - 8 * (bytes % 8));
    for (int threads : {1, 3}) expect(stream_read(buffer.data(), bytes, threads) == whole + rest, "the sum");
  }
}

}  // namespace

int main(int count, char** arguments) {
  // what the sanitizer must find, or it finds nothing
  Buffer<char> buffer(37);
  if (count > 2) refuse_tiles(arguments[2][0]);
  if (count > 1) return buffer[37 + (arguments[1][0] == '0' ? 0 : 64)];
  drive_packed();
  drive_dense();
  drive_24();
  drive_tiles();
  drive_threads();
  drive_not_finite();
  drive_obs_sweep();
  drive_keep_largest();
  drive_gram();
  drive_addmm();
  drive_stream_read();
  drive_linear_bitmap_index();
  drive_linear_bitmap_int8();
  drive_linear_bitmap_nonzero();
  std::printf("clean:");
  each_set(kLinearBitmapSets, [](int set) { std::printf(" %s", kLinearBitmapSets[set].name); });
  std::printf("\n");
  return 0;
}
