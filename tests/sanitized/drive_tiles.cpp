// linear_bitmap's kernel for AMX, compiled with the tiles of tiles_in_cxx.h, against float64, at sizes that divide
// nothing, and with masks that lie; and what a processor would refuse.

#include <cmath>
#include <vector>

#include "cpu/tiles.h"
#include "drive.h"

namespace {

std::normal_distribution<float> normal;

// in kLinearBitmapSets
constexpr int kAmx = 0;

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

Buffer<uint16_t> random_bf16(int64_t size) {
  Buffer<uint16_t> buffer(size);
  for (int64_t i = 0; i < size; ++i) buffer[i] = to_bf16(normal(generator));
  return buffer;
}

// A weight, and its panels written down as ops.h says.
struct Weight {
  int64_t outputs, inputs, blocks;
  std::vector<double> dense;  // [outputs, inputs]
  Buffer<uint32_t> masks;
  Buffer<char> values;
  Buffer<int64_t> offsets;

  Weight(int64_t out_features, int64_t in_features, double density)
      : outputs(out_features), inputs(in_features), blocks((inputs + kBlockInputs - 1) / kBlockInputs),
        dense(static_cast<size_t>(outputs * inputs)), masks((outputs + 15) / 16 * blocks * kBlockMasks), values(0),
        offsets((outputs + 15) / 16 + 1) {
    std::vector<uint16_t> kept;
    for (int64_t panel = 0; panel + 1 < offsets.size; ++panel) {
      offsets[panel] = static_cast<int64_t>(kept.size());
      for (int64_t q = 0; q < blocks * kBlockMasks; ++q) {
        for (int64_t bit = 0; bit < 32; ++bit) {
          const int64_t row = panel * kPanelRows + bit / 2, input = q * 2 + bit % 2;
          if (row >= outputs || input >= inputs) continue;
          if (static_cast<double>(generator() % 1000) >= density * 1000) continue;
          kept.push_back(to_bf16(normal(generator)));
          dense[static_cast<size_t>(row * inputs + input)] = from_bf16(kept.back());
          masks[panel * blocks * kBlockMasks + q] |= uint32_t{1} << bit;
        }
      }
    }
    offsets[offsets.size - 1] = static_cast<int64_t>(kept.size());
    values = Buffer<char>(static_cast<int64_t>(kept.size()) * 2 + kTailBytes);
    if (!kept.empty()) std::memcpy(values.data(), kept.data(), kept.size() * 2);
  }
  BitmapWeight view() { return {DType::kBFloat16, masks.data(), values.data(), offsets.data(), outputs, inputs}; }
};

void drive(int64_t outputs, int64_t inputs, int64_t tokens, double density) {
  Weight weight(outputs, inputs, density);
  Buffer<uint16_t> x = random_bf16(tokens * inputs), bias = random_bf16(outputs), y(tokens * outputs);
  for (uint16_t* b : {bias.data(), static_cast<uint16_t*>(nullptr)}) {
    Buffer<uint16_t> again(y.size);
    std::memset(y.data(), 0xff, static_cast<size_t>(y.size) * 2);
    expect(linear_bitmap(weight.view(), x.data(), b, y.data(), tokens, kAmx, 1), "memory");
    linear_bitmap(weight.view(), x.data(), b, again.data(), tokens, kAmx, 3);
    expect(std::memcmp(y.data(), again.data(), static_cast<size_t>(y.size) * 2) == 0, "tiles: threads change a bit");
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t row = 0; row < outputs; ++row) {
        double exact = b == nullptr ? 0 : from_bf16(b[row]), size = std::fabs(exact);
        for (int64_t i = 0; i < inputs; ++i) {
          const double product = from_bf16(x[token * inputs + i]) * weight.dense[static_cast<size_t>(row * inputs + i)];
          exact += product;
          size += std::fabs(product);
        }
        // half a step of the bfloat16, and what float32 loses on the way; NaN is not within it
        const double error = std::fabs(from_bf16(y[token * outputs + row]) - exact);
        expect(error <= std::fabs(exact) / 256 + size * 1e-5, "tiles: the product");
      }
    }
  }
  // the binding does not count masks: none may lead outside
  std::memset(weight.masks.data(), 0xff, static_cast<size_t>(weight.masks.size) * 4);
  linear_bitmap(weight.view(), x.data(), bias.data(), y.data(), tokens, kAmx, 1);
}

}  // namespace

void drive_tiles() {
  expect(std::strcmp(kLinearBitmapSets[kAmx].name, "amx_bf16") == 0, "the first set");
  if (!kLinearBitmapSets[kAmx].supported()) return;
  const int64_t shapes[][2] = {{1, 1}, {7, 37}, {16, 32}, {17, 513}, {37, 7}, {50, 257}, {5, 0}};
  for (const auto& shape : shapes) {
    for (int64_t tokens : {1, 3, 16, 17, 33, 64, 65, 100}) {
      for (double density : {0.5, 1.0}) drive(shape[0], shape[1], tokens, density);
    }
  }
  // more blocks than a chunk, more groups than a slab, and a layer that threads are worth for
  drive(33, 1100, 70, 0.3);
  drive(20, 40, 530, 0.5);
  drive(70, 3001, 2, 0.5);
  drive(16, 32, 5, 0.0);
}

// What the emulation must refuse, or it shows nothing; 6 is no mistake for a processor, but slows down its threads.
void refuse_tiles(char which) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.rows[tile] = 16;
    config.row_bytes[tile] = 64;
  }
  if (which == '0') zero_tile<0>();
  if (which == '1') config.rows[3] = 17;
  if (which == '2') config.row_bytes[8] = 64;
  if (which == '3') config.rows[1] = 0;
  if (which == '4') config.rows[2] = 15;
  configure_tiles(config);
  multiply_tiles<0, 2, 4>();
  if (which == '6') configure_tiles(config);
  release_tiles();
  multiply_tiles<0, 2, 4>();
}
