// linear_dense in plain C++: a tile is multiplied with all tokens of a group.

#include "linear_dense.h"
#include "portable_values.h"

namespace sparsekern {
namespace {

template <class Type>
void linear(const DenseWeight& weight, const void* packed_x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  using Value = typename Type::Value;
  const int64_t pairs = pair_count(weight.in_features);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = weight.out_features - row < kPanelRows ? weight.out_features - row : kPanelRows;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.first(group);
      const int64_t size = groups.size(group);
      const auto* x = static_cast<const float*>(packed_x) + first * pairs * 2;
      const Value* tile = static_cast<const Value*>(weight.panels) + panel * pairs * kPanelRows * 2;
      float sums[kMaxGroup][kPanelRows] = {};
      for (int64_t pair = 0; pair < pairs; ++pair, tile += kPanelRows * 2, x += size * 2) {
        float wide[2][kPanelRows];
        for (int64_t r = 0; r < kPanelRows; ++r) {
          wide[0][r] = Type::widen(tile[r * 2]);
          wide[1][r] = Type::widen(tile[r * 2 + 1]);
        }
        for (int64_t token = 0; token < size; ++token) {
          const float even = x[token * 2], odd = x[token * 2 + 1];
          for (int64_t r = 0; r < kPanelRows; ++r) sums[token][r] += wide[0][r] * even + wide[1][r] * odd;
        }
      }
      for (int64_t token = 0; token < size && first + token < groups.tokens; ++token) {
        Value* y_row = static_cast<Value*>(y) + (first + token) * weight.out_features + row;
        for (int64_t r = 0; r < rows; ++r) {
          const float b = bias != nullptr ? Type::widen(static_cast<const Value*>(bias)[row + r]) : 0.0f;
          y_row[r] = Type::narrow(sums[token][r] + b);
        }
      }
    }
  }
}

void linear_any(const DenseWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16>
                   : weight.dtype == DType::kFloat16 ? linear<Fp16>
                                                     : linear<Float32>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

}  // namespace

const LinearDensePanels kLinearDensePortable = {DType::kFloat32, linear_any};

}  // namespace sparsekern
