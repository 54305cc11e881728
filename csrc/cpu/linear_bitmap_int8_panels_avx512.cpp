// The conversion between a weight as it is saved and the panels of linear_bitmap_int8 on AVX-512 VBMI2. A block is 16
// rows by 16 steps of four inputs: its rows are expanded, the square of steps is transposed in registers, and what was a
// row becomes a mask's values, compressed again. The bits, widened to bytes, go the same way.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,popcnt,bmi,bmi2")

#include "bitmap_rows.h"
#include "expand_avx512.h"
#include "linear_bitmap_int8.h"
#include "transpose_avx512.h"

namespace sparsekern {
namespace {

inline int64_t rows_of(int64_t out_features, int64_t panel) {
  const int64_t rows = out_features - panel * kPanelRows;
  return rows < kPanelRows ? rows : kPanelRows;
}

// The bits of 16 rows as those of 16 steps, or back.
inline void transpose_bits(const uint64_t* from, uint64_t* to) {
  __m512i square[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) square[i] = _mm512_movm_epi8(from[i]);
  transpose_dwords(square);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) to[i] = _mm512_movepi8_mask(square[i]);
}

// A row's bits of one block, zeros after the last byte.
inline uint64_t load_bits(const uint8_t* row, int64_t byte, int64_t bytes) {
  uint64_t word = 0;
  __builtin_memcpy(&word, row + byte, static_cast<size_t>(bytes - byte < 8 ? bytes - byte : 8));
  return word;
}

void to_panels(const BitmapRows& packed, uint64_t* masks, int8_t* values, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const auto* source = static_cast<const int8_t*>(packed.values);
  const int8_t* source_end = source + packed.kept;
  for (int64_t panel = first; panel < end; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = rows_of(packed.out_features, panel);
    const int8_t* cursor[kPanelRows];
    for (int64_t n = 0; n < kPanelRows; ++n) cursor[n] = source + packed.row_offsets[row + (n < rows ? n : 0)];
    int8_t* target = values + packed.row_offsets[row];
    const int8_t* target_end = values + packed.row_offsets[row + rows];
    uint64_t* out = masks + panel * ((packed.in_features + kInt8BlockInputs - 1) / kInt8BlockInputs) * kBlockMasks;
    for (int64_t byte = 0; byte < bytes; byte += 8, out += kBlockMasks) {
      uint64_t words[kPanelRows] = {};
      for (int64_t n = 0; n < rows; ++n) words[n] = load_bits(packed.bitmap + (row + n) * bytes, byte, bytes);
      transpose_bits(words, out);
      __m512i square[16];
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const int64_t kept = __builtin_popcountll(words[n]);
        square[n] = Values8::expand(words[n], load_values<Values8>(cursor[n], source_end, kept));
        cursor[n] += kept;
      }
      transpose_dwords(square);
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) {
        const int64_t kept = __builtin_popcountll(out[q]);
        store_values<Values8>(target, target_end, kept, Values8::compress(out[q], square[q]));
        target += kept;
      }
    }
  }
}

// Writes a panel's rows of the bitmap and their offsets. False when its ones are not as many as its offsets say, or are
// where the weight ends.
bool write_bits(const BitmapInt8Weight& weight, const Int8RowsOut& out, int64_t panel) {
  const int64_t bytes = bitmap_row_bytes(weight.in_features);
  const int64_t row = panel * kPanelRows;
  const int64_t rows = rows_of(weight.out_features, panel);
  const uint64_t* masks = weight.masks + panel * block_count(weight) * kBlockMasks;
  int64_t counts[kPanelRows] = {};
  uint64_t outside = 0;
  for (int64_t block = 0; block < block_count(weight); ++block) {
    uint64_t words[kPanelRows];
    transpose_bits(masks + block * kBlockMasks, words);
    const int64_t inputs = weight.in_features - block * kInt8BlockInputs;
    const uint64_t inside = inputs < kInt8BlockInputs ? (uint64_t{1} << inputs) - 1 : ~uint64_t{0};
    for (int64_t n = 0; n < kPanelRows; ++n) {
      outside |= n < rows ? words[n] & ~inside : words[n];
      if (n >= rows) continue;
      counts[n] += __builtin_popcountll(words[n]);
      const int64_t left = bytes - block * 8;
      __builtin_memcpy(out.bitmap + (row + n) * bytes + block * 8, &words[n], static_cast<size_t>(left < 8 ? left : 8));
    }
  }
  int64_t offset = weight.panel_offsets[panel];
  for (int64_t n = 0; n < rows; ++n) out.row_offsets[row + n + 1] = offset += counts[n];
  return outside == 0 && offset == weight.panel_offsets[panel + 1];
}

int64_t to_rows(const BitmapInt8Weight& weight, const Int8RowsOut& out, int64_t first, int64_t end) {
  for (int64_t panel = first; panel < end; ++panel) {
    if (!write_bits(weight, out, panel)) return panel;
    const int64_t row = panel * kPanelRows;
    const int64_t rows = rows_of(weight.out_features, panel);
    int8_t *cursor[kPanelRows], *row_end[kPanelRows];
    // the offset of a panel's first row is another thread's to write
    int64_t start = weight.panel_offsets[panel];
    for (int64_t n = 0; n < kPanelRows; ++n) {
      cursor[n] = out.values + start;
      if (n < rows) start = out.row_offsets[row + n + 1];
      row_end[n] = out.values + start;
    }
    const int8_t* source = weight.values + weight.panel_offsets[panel];
    const uint64_t* masks = weight.masks + panel * block_count(weight) * kBlockMasks;
    for (int64_t block = 0; block < block_count(weight); ++block, masks += kBlockMasks) {
      uint64_t words[kPanelRows];
      transpose_bits(masks, words);
      __m512i square[16];
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) {
        square[q] = Values8::expand(masks[q], _mm512_loadu_si512(source));
        source += __builtin_popcountll(masks[q]);
      }
      transpose_dwords(square);
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const int64_t kept = __builtin_popcountll(words[n]);
        store_values<Values8>(cursor[n], row_end[n], kept, Values8::compress(words[n], square[n]));
        cursor[n] += kept;
      }
    }
  }
  return kNoRow;
}

}  // namespace

const Int8PanelsKernel kInt8PanelsAvx512 = {to_panels, to_rows};

}  // namespace sparsekern

#endif
