// linear_bitmap in plain C++: expands a block into a dense tile, bit by bit and without a branch, and multiplies it with
// all tokens of a group.

#include "linear_bitmap.h"
#include "portable_values.h"

namespace sparsekern {
namespace {

constexpr int64_t kTile = kPanelRows * kBlockInputs;

// One block: returns the values after it. tile [kBlockInputs, kPanelRows]
template <class Type>
const typename Type::Value* expand_block(const uint32_t* masks, const typename Type::Value* values,
                                         const typename Type::Value* end, typename Type::Value* tile) {
  for (int64_t q = 0; q < kBlockMasks; ++q) {
    // masks that lie: see kTailBytes
    if (q % kGuardMasks == 0) values = values < end ? values : end;
    const uint32_t mask = masks[q];
    for (int64_t bit = 0; bit < 32; ++bit) {
      const uint32_t kept = (mask >> bit) & 1;
      // the value after the last kept one is read, never used: the tail covers it
      tile[(2 * q + bit % 2) * kPanelRows + bit / 2] = kept != 0 ? *values : typename Type::Value{0};
      values += kept;
    }
  }
  return values;
}

template <class Type>
void linear(const BitmapWeight& weight, const void* packed_x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  using Value = typename Type::Value;
  const int64_t blocks = block_count(weight);
  const auto* all_values = static_cast<const Value*>(weight.values);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = weight.out_features - row < kPanelRows ? weight.out_features - row : kPanelRows;
    const auto* x = static_cast<const float*>(packed_x);
    for (int64_t turn = 0; turn < groups.count; ++turn) {
      const int64_t first = groups.first(turn);
      const int64_t group = groups.size(turn);
      const int64_t here = groups.tokens - first < group ? groups.tokens - first : group;
      float sums[kMaxGroup][kPanelRows] = {};
      const Value* values = all_values + weight.panel_offsets[panel];
      const Value* end = all_values + weight.panel_offsets[panel + 1];
      const uint32_t* masks = weight.masks + panel * blocks * kBlockMasks;
      for (int64_t block = 0; block < blocks; ++block, masks += kBlockMasks) {
        Value tile[kTile];
        float wide[kTile];
        values = expand_block<Type>(masks, values, end, tile);
        for (int64_t i = 0; i < kTile; ++i) wide[i] = Type::widen(tile[i]);
        for (int64_t input = 0; input < kBlockInputs; ++input) {
          const float* x_input = x + ((block * kBlockInputs + input) / 2 * group) * 2 + input % 2;
          for (int64_t token = 0; token < here; ++token) {
            const float x_it = x_input[token * 2];
            for (int64_t r = 0; r < kPanelRows; ++r) sums[token][r] += wide[input * kPanelRows + r] * x_it;
          }
        }
      }
      for (int64_t token = 0; token < here; ++token) {
        Value* y_row = static_cast<Value*>(y) + (first + token) * weight.out_features + row;
        for (int64_t r = 0; r < rows; ++r) {
          const float b = bias != nullptr ? Type::widen(static_cast<const Value*>(bias)[row + r]) : 0.0f;
          y_row[r] = Type::narrow(sums[token][r] + b);
        }
      }
      x += blocks * kBlockInputs * group;
    }
  }
}

template <class Type>
void expand(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  using Value = typename Type::Value;
  const int64_t blocks = block_count(weight);
  auto* dense_panel = static_cast<Value*>(dense);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = weight.out_features - row < kPanelRows ? weight.out_features - row : kPanelRows;
    const Value* values = static_cast<const Value*>(weight.values) + weight.panel_offsets[panel];
    const Value* end = static_cast<const Value*>(weight.values) + weight.panel_offsets[panel + 1];
    const uint32_t* masks = weight.masks + panel * blocks * kBlockMasks;
    for (int64_t block = 0; block < blocks; ++block, masks += kBlockMasks) {
      Value tile[kTile];
      values = expand_block<Type>(masks, values, end, tile);
      const int64_t first = block * kBlockInputs;
      const int64_t inputs = weight.in_features - first < kBlockInputs ? weight.in_features - first : kBlockInputs;
      for (int64_t r = 0; r < rows; ++r) {
        Value* target = dense_panel + r * weight.in_features + first;
        for (int64_t i = 0; i < inputs; ++i) target[i] = tile[i * kPanelRows + r];
      }
    }
    dense_panel += rows * weight.in_features;
  }
}

void linear_any(const BitmapWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16>
                   : weight.dtype == DType::kFloat16 ? linear<Fp16>
                                                     : linear<Float32>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

void expand_any(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  // sixteen bits are moved, whatever they mean
  const auto run = weight.dtype == DType::kFloat32 ? expand<Float32> : expand<Bf16>;
  run(weight, dense, first_panel, end_panel);
}

}  // namespace

const LinearBitmapPanels kLinearBitmapPortable = {DType::kFloat32, linear_any, expand_any};

}  // namespace sparsekern
