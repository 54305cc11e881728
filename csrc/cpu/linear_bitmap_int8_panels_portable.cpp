// The conversion between a weight as it is saved and the panels of linear_bitmap_int8 in plain C++: bit by bit.

#include "bitmap_rows.h"
#include "bitmap_words.h"
#include "linear_bitmap_int8.h"

namespace sparsekern {
namespace {

int64_t rows_of(int64_t out_features, int64_t panel) {
  const int64_t rows = out_features - panel * kPanelRows;
  return rows < kPanelRows ? rows : kPanelRows;
}

void to_panels(const BitmapRows& packed, uint64_t* masks, int8_t* values, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const int64_t blocks = (packed.in_features + kInt8BlockInputs - 1) / kInt8BlockInputs;
  const auto* source = static_cast<const int8_t*>(packed.values);
  for (int64_t panel = first; panel < end; ++panel) {
    const int64_t rows = rows_of(packed.out_features, panel);
    const int64_t* offsets = packed.row_offsets + panel * kPanelRows;
    int64_t cursor[kPanelRows];
    for (int64_t n = 0; n < rows; ++n) cursor[n] = offsets[n];
    int8_t* target = values + offsets[0];
    for (int64_t q = 0; q < blocks * kBlockMasks; ++q) {
      uint64_t mask = 0;
      for (int64_t n = 0; n < rows; ++n) {
        // four inputs are half a byte, and there may be none
        const int64_t byte = q / 2;
        const uint8_t bits = byte < bytes ? packed.bitmap[(panel * kPanelRows + n) * bytes + byte] >> (q % 2 * 4) : 0;
        for (int64_t j = 0; j < kStepInputs; ++j) {
          if (((bits >> j) & 1) == 0) continue;
          mask |= uint64_t{1} << (kStepInputs * n + j);
          *target++ = source[cursor[n]++];
        }
      }
      masks[panel * blocks * kBlockMasks + q] = mask;
    }
  }
}

int64_t to_rows(const BitmapInt8Weight& weight, const Int8RowsOut& out, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(weight.in_features);
  const int64_t steps = block_count(weight) * kBlockMasks;
  for (int64_t panel = first; panel < end; ++panel) {
    const int64_t rows = rows_of(weight.out_features, panel);
    const int64_t row = panel * kPanelRows;
    const uint64_t* masks = weight.masks + panel * steps;
    uint8_t* bitmap = out.bitmap + row * bytes;
    for (int64_t i = 0; i < rows * bytes; ++i) bitmap[i] = 0;
    int64_t counts[kPanelRows] = {}, ones = 0;
    for (int64_t q = 0; q < steps; ++q) {
      ones += ones_of_word(masks[q]);
      for (int64_t bit = 0; bit < 64; ++bit) {
        const int64_t n = bit / kStepInputs, input = q * kStepInputs + bit % kStepInputs;
        if (((masks[q] >> bit) & 1) == 0 || n >= rows || input >= weight.in_features) continue;
        bitmap[n * bytes + input / 8] |= static_cast<uint8_t>(1 << (input % 8));
        ++counts[n];
      }
    }
    int64_t cursor[kPanelRows], offset = weight.panel_offsets[panel];
    for (int64_t n = 0; n < rows; ++n) {
      cursor[n] = offset;
      out.row_offsets[row + n + 1] = offset += counts[n];
    }
    // ones where the weight ends are in no row's count
    if (offset != weight.panel_offsets[panel + 1] || offset - weight.panel_offsets[panel] != ones) return panel;
    const int8_t* source = weight.values + weight.panel_offsets[panel];
    for (int64_t q = 0; q < steps; ++q) {
      for (int64_t bit = 0; bit < 64; ++bit) {
        if (((masks[q] >> bit) & 1) != 0) out.values[cursor[bit / kStepInputs]++] = *source++;
      }
    }
  }
  return kNoRow;
}

}  // namespace

const Int8PanelsKernel kInt8PanelsPortable = {to_panels, to_rows};

}  // namespace sparsekern
