// bitmap_panels in plain C++: the masks of a block are its rows' words with rows and input pairs swapped, and one cursor
// a row says where its next value is, in either direction.

#include "bitmap_panels.h"
#include "bitmap_rows.h"
#include "bitmap_words.h"

namespace sparsekern {
namespace {

// masks[q], bits 2 n and 2 n + 1 = words[n], bits 2 q and 2 q + 1; its own inverse.
void swap_pairs(const uint32_t* words, uint32_t* masks) {
  for (int64_t q = 0; q < kBlockMasks; ++q) {
    uint32_t mask = 0;
    for (int64_t n = 0; n < kPanelRows; ++n) mask |= ((words[n] >> (2 * q)) & 3) << (2 * n);
    masks[q] = mask;
  }
}

template <class Value>
int64_t to_panels(const BitmapRows& packed, uint32_t* all_masks, void* values, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const int64_t blocks = (packed.in_features + kBlockInputs - 1) / kBlockInputs;
  for (int64_t panel = first; panel < end; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = least_of(packed.out_features - row, kPanelRows);
    const int64_t wrong = first_wrong_row(packed, row, row + rows, count_ones);
    if (wrong != kNoRow) return wrong;
    const Value* cursor[kPanelRows];
    for (int64_t n = 0; n < rows; ++n) {
      cursor[n] = static_cast<const Value*>(packed.values) + packed.row_offsets[row + n];
    }
    Value* target = static_cast<Value*>(values) + packed.row_offsets[row];
    uint32_t* masks = all_masks + panel * blocks * kBlockMasks;
    for (int64_t block = 0; block < blocks; ++block, masks += kBlockMasks) {
      uint32_t words[kPanelRows] = {};
      for (int64_t n = 0; n < rows; ++n) {
        words[n] = load_word(packed.bitmap + (row + n) * bytes + block * 4, bytes - block * 4);
      }
      swap_pairs(words, masks);
      for (int64_t q = 0; q < kBlockMasks; ++q) {
        for (uint32_t mask = masks[q]; mask != 0; mask &= mask - 1) *target++ = *cursor[__builtin_ctz(mask) / 2]++;
      }
    }
  }
  return kNoRow;
}

// The ones of each row go to row_offsets; false when there are other than the panel's offsets say, or where there is no
// row or input.
bool write_rows(const BitmapWeight& weight, const RowsOut& out, int64_t panel) {
  const int64_t bytes = bitmap_row_bytes(weight.in_features);
  const int64_t row = panel * kPanelRows;
  const int64_t rows = least_of(weight.out_features - row, kPanelRows);
  const uint32_t* masks = weight.masks + panel * block_count(weight) * kBlockMasks;
  int64_t ones[kPanelRows] = {};
  uint32_t outside = 0;
  for (int64_t block = 0; block < block_count(weight); ++block, masks += kBlockMasks) {
    uint32_t words[kPanelRows];
    swap_pairs(masks, words);
    const int64_t inputs = weight.in_features - block * kBlockInputs;
    const uint32_t inside = inputs < kBlockInputs ? (uint32_t{1} << inputs) - 1 : ~uint32_t{0};
    for (int64_t n = 0; n < kPanelRows; ++n) outside |= n < rows ? words[n] & ~inside : words[n];
    for (int64_t n = 0; n < rows; ++n) {
      ones[n] += ones_of_word(words[n]);
      std::memcpy(out.bitmap + (row + n) * bytes + block * 4, &words[n],
                  static_cast<size_t>(least_of(bytes - block * 4, 4)));
    }
  }
  int64_t offset = weight.panel_offsets[panel];
  for (int64_t n = 0; n < rows; ++n) out.row_offsets[row + n + 1] = offset += ones[n];
  return outside == 0 && offset == weight.panel_offsets[panel + 1];
}

template <class Value>
int64_t to_rows(const BitmapWeight& weight, const RowsOut& out, int64_t first, int64_t end) {
  for (int64_t panel = first; panel < end; ++panel) {
    if (!write_rows(weight, out, panel)) return panel;
    const int64_t row = panel * kPanelRows;
    const int64_t rows = least_of(weight.out_features - row, kPanelRows);
    Value* all = static_cast<Value*>(out.values);
    Value* cursor[kPanelRows] = {all + weight.panel_offsets[panel]};
    for (int64_t n = 1; n < rows; ++n) cursor[n] = all + out.row_offsets[row + n];
    const Value* source = static_cast<const Value*>(weight.values) + weight.panel_offsets[panel];
    const uint32_t* masks = weight.masks + panel * block_count(weight) * kBlockMasks;
    for (int64_t q = 0; q < block_count(weight) * kBlockMasks; ++q) {
      for (uint32_t mask = masks[q]; mask != 0; mask &= mask - 1) *cursor[__builtin_ctz(mask) / 2]++ = *source++;
    }
  }
  return kNoRow;
}

}  // namespace

const BitmapPanelsKernel kBitmapPanelsPortable = {
    [](const BitmapRows& packed, uint32_t* masks, void* values, int64_t first, int64_t end) {
      const auto run = value_bytes(packed.dtype) == 2 ? to_panels<uint16_t> : to_panels<uint32_t>;
      return run(packed, masks, values, first, end);
    },
    [](const BitmapWeight& weight, const RowsOut& rows, int64_t first, int64_t end) {
      const auto run = value_bytes(weight.dtype) == 2 ? to_rows<uint16_t> : to_rows<uint32_t>;
      return run(weight, rows, first, end);
    },
};

}  // namespace sparsekern
