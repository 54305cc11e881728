// linear_24 in plain C++: every value with the input that its two bits name.

#include "linear_24.h"
#include "portable_values.h"

namespace sparsekern {

void linear_24_portable(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                        int64_t first_panel, int64_t end_panel) {
  const int64_t blocks = blocks_24(weight.in_features);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = weight.out_features - row < kPanelRows ? weight.out_features - row : kPanelRows;
    for (int64_t token = 0; token < tokens; ++token) {
      const auto* values = static_cast<const uint16_t*>(weight.values) + panel * blocks * kGroups24 * 2 * kPanelRows;
      const uint64_t* positions = weight.positions + panel * blocks * kGroups24;
      float sums[kPanelRows] = {};
      for (int64_t block = 0; block < blocks; ++block) {
        const uint16_t* x_block = x + (block * tokens + token) * kBlockInputs;
        for (int64_t group = 0; group < kGroups24; ++group, values += 2 * kPanelRows) {
          const uint64_t bits = *positions++;
          for (int64_t i = 0; i < 2 * kPanelRows; ++i) {
            sums[i / 2] += Bf16::widen(values[i]) * Bf16::widen(x_block[group * 4 + (bits >> 2 * i & 3)]);
          }
        }
      }
      uint16_t* y_row = static_cast<uint16_t*>(y) + token * weight.out_features + row;
      for (int64_t r = 0; r < rows; ++r) {
        const float b = bias != nullptr ? Bf16::widen(static_cast<const uint16_t*>(bias)[row + r]) : 0.0f;
        y_row[r] = Bf16::narrow(sums[r] + b);
      }
    }
  }
}

}  // namespace sparsekern
