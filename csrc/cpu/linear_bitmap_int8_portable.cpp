// linear_bitmap_int8 in plain C++: expands a block into a dense tile, bit by bit and without a branch, and sums its
// products with the integers of x exactly.

#include <cmath>

#include "linear_bitmap_int8.h"

namespace sparsekern {
namespace {

constexpr int64_t kTile = kPanelRows * kInt8BlockInputs;

float widen(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(source)[i]) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void narrow(void* target, DType dtype, int64_t i, float wide) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(target)[i] = wide;
    return;
  }
  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  static_cast<uint16_t*>(target)[i] = wide != wide ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

void pack(const void* x, DType dtype, int64_t in_features, Int8Group& group) {
  Rounding rounding[kGroupTokens];
  group.planes = 1;
  for (int64_t t = 0; t < group.tokens; ++t) {
    const int64_t first = (group.first_token + t) * in_features;
    float most = 0.0f, sum = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < in_features; ++i) {
      const float size = std::fabs(widen(x, dtype, first + i));
      finite = finite && size <= __FLT_MAX__;
      most = size > most ? size : most;
      sum += size;
    }
    rounding[t] = rounding_of(most, sum, finite, dtype, in_features);
    group.scale[t] = rounding[t].scale;
    group.planes = rounding[t].planes > group.planes ? rounding[t].planes : group.planes;
  }
  const int64_t rows = byte_rows(group.tokens * group.planes);
  const int64_t steps = (in_features + kInt8BlockInputs - 1) / kInt8BlockInputs * kBlockMasks;
  std::memset(group.rows, 0, static_cast<size_t>(steps * rows * kStepInputs));
  for (int64_t t = 0; t < group.tokens; ++t) {
    const int32_t most = (1 << (8 * rounding[t].planes - 1)) - 1;
    for (int64_t i = 0; i < steps * kStepInputs; ++i) {
      const float wide = i < in_features ? widen(x, dtype, (group.first_token + t) * in_features + i) : 0.0f;
      // a token that is not finite is NaN by its scale
      const bool used = rounding[t].factor != 0.0f;
      const auto rounded = used ? static_cast<int32_t>(std::nearbyint(wide * rounding[t].factor)) : 0;
      const uint32_t integer = static_cast<uint32_t>((rounded < most ? rounded : most) + (1 << (8 * group.planes - 1)));
      uint8_t* target = group.rows + (i / kStepInputs * rows + t * group.planes) * kStepInputs + i % kStepInputs;
      for (int64_t p = 0; p < group.planes; ++p) {
        target[p * kStepInputs] = static_cast<uint8_t>(integer >> (8 * (group.planes - 1 - p)));
      }
    }
  }
}

// A panel, block by block. tile [kInt8BlockInputs, kPanelRows]
struct Blocks {
  const uint64_t* masks;
  const int8_t* values;
  const int8_t* end;

  Blocks(const BitmapInt8Weight& weight, int64_t panel)
      : masks(weight.masks + panel * block_count(weight) * kBlockMasks),
        values(weight.values + weight.panel_offsets[panel]),
        end(weight.values + weight.panel_offsets[panel + 1]) {}

  void next(int8_t* tile) {
    for (int64_t q = 0; q < kBlockMasks; ++q) {
      // masks that lie: see kTailBytes
      if (q % kGuardMasks == 0) values = values < end ? values : end;
      const uint64_t mask = *masks++;
      for (int64_t bit = 0; bit < 64; ++bit) {
        const auto kept = static_cast<int64_t>((mask >> bit) & 1);
        // the value after the last kept one is read, never used: the tail covers it
        tile[(4 * q + bit % 4) * kPanelRows + bit / 4] = kept != 0 ? *values : int8_t{0};
        values += kept;
      }
    }
  }
};

int64_t rows_of(const BitmapInt8Weight& weight, int64_t panel) {
  const int64_t rows = weight.out_features - panel * kPanelRows;
  return rows < kPanelRows ? rows : kPanelRows;
}

// Adds the products of a tile with the integers of one token.
void multiply(const int8_t* tile, const uint8_t* x, int64_t rows, int64_t planes, int64_t* sums) {
  for (int64_t input = 0; input < kInt8BlockInputs; ++input) {
    const uint8_t* bytes = x + input / kStepInputs * rows * kStepInputs + input % kStepInputs;
    int64_t integer = 0;
    for (int64_t p = 0; p < planes; ++p) integer = integer * 256 + bytes[p * kStepInputs];
    integer -= int64_t{1} << (8 * planes - 1);
    for (int64_t r = 0; r < kPanelRows; ++r) sums[r] += integer * tile[input * kPanelRows + r];
  }
}

void linear(const BitmapInt8Weight& weight, const Int8Group* groups, int64_t count, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  const int64_t scales = scale_groups(weight);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    for (int64_t g = 0; g < count; ++g) {
      const Int8Group& group = groups[g];
      const int64_t byte_count = byte_rows(group.tokens * group.planes);
      float totals[kGroupTokens][kPanelRows] = {};
      Blocks blocks(weight, panel);
      int64_t sums[kGroupTokens][kPanelRows] = {};
      for (int64_t input = 0; input < weight.in_features; input += kInt8BlockInputs) {
        int8_t tile[kTile];
        blocks.next(tile);
        const uint8_t* x = group.rows + input * byte_count;
        for (int64_t t = 0; t < group.tokens; ++t, x += group.planes * kStepInputs) {
          multiply(tile, x, byte_count, group.planes, sums[t]);
        }
        const int64_t next = input + kInt8BlockInputs;
        const int64_t in_group = next % weight.group_size;
        if (next < weight.in_features && in_group != 0 && in_group % kMostSummed != 0) continue;
        const float* scale = weight.scales + (panel * scales + input / weight.group_size) * kPanelRows;
        for (int64_t t = 0; t < group.tokens; ++t) {
          for (int64_t r = 0; r < kPanelRows; ++r) {
            totals[t][r] = std::fma(static_cast<float>(sums[t][r]), scale[r], totals[t][r]);
            sums[t][r] = 0;
          }
        }
      }
      for (int64_t t = 0; t < group.tokens; ++t) {
        for (int64_t r = 0; r < rows_of(weight, panel); ++r) {
          const float b = bias != nullptr ? widen(bias, weight.dtype, row + r) : 0.0f;
          const float result = std::fma(totals[t][r], group.scale[t], b);
          narrow(y, weight.dtype, (group.first_token + t) * weight.out_features + row + r, result);
        }
      }
    }
  }
}

void expand(const BitmapInt8Weight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  const int64_t scales = scale_groups(weight);
  int64_t first_row = 0;
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    Blocks blocks(weight, panel);
    for (int64_t input = 0; input < weight.in_features; input += kInt8BlockInputs) {
      int8_t tile[kTile];
      blocks.next(tile);
      const float* scale = weight.scales + (panel * scales + input / weight.group_size) * kPanelRows;
      for (int64_t r = 0; r < rows_of(weight, panel); ++r) {
        for (int64_t i = 0; i < kInt8BlockInputs && input + i < weight.in_features; ++i) {
          const int8_t integer = tile[i * kPanelRows + r];
          // no -0.0
          const float wide = static_cast<float>(integer) * scale[r] + 0.0f;
          narrow(dense, weight.dtype, (first_row + r) * weight.in_features + input + i, wide);
        }
      }
    }
    first_row += rows_of(weight, panel);
  }
}

}  // namespace

const LinearBitmapInt8Panels kLinearBitmapInt8Portable = {pack, linear, expand};

}  // namespace sparsekern
