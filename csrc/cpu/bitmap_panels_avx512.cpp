// bitmap_panels on AVX-512 VBMI2. A block is 16 rows by 16 input pairs: its rows are expanded, the square of pairs is
// transposed in registers, and what was a row becomes a mask's values, compressed again; the bits go the same way.
// Sixteen blocks' bits are loaded at once, a cache line a row, so that they too are a square to transpose.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,popcnt,bmi,bmi2")

#include "bitmap_panels.h"
#include "bitmap_rows.h"
#include "expand_avx512.h"
#include "transpose_avx512.h"

namespace sparsekern {
namespace {

constexpr int64_t kChunkBlocks = 16;
constexpr int64_t kChunkBytes = 64;  // of a row's bits

// rows[i], qword j <-> rows[j], qword i
inline void transpose_qwords(__m512i* rows) {
  __m512i pairs[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  // pairs[2 a + b], 128-bit lane c holds qword 2 c + b of rows 2 a and 2 a + 1
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b) {
    const __m512i low_even = _mm512_shuffle_i32x4(pairs[b], pairs[2 + b], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(pairs[b], pairs[2 + b], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(pairs[4 + b], pairs[6 + b], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(pairs[4 + b], pairs[6 + b], 0xdd);
    rows[b] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    rows[4 + b] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    rows[2 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[6 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// Dword n, pair q of bits <-> dword q, pair n of bits: the words of 16 rows are the masks of 16 input pairs.
inline __m512i swap_pairs(__m512i words) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // a dword: the same four input pairs of four rows, a byte a row
  __m512i x = _mm512_shuffle_epi8(words, bytes);
  // its 4 x 4 pairs: first within squares of 2 x 2, then the squares
  __m512i moved = _mm512_and_si512(_mm512_xor_si512(x, _mm512_srli_epi32(x, 6)), _mm512_set1_epi32(0x00cc00cc));
  x = _mm512_xor_si512(x, _mm512_xor_si512(moved, _mm512_slli_epi32(moved, 6)));
  moved = _mm512_and_si512(_mm512_xor_si512(x, _mm512_srli_epi32(x, 12)), _mm512_set1_epi32(0x0000f0f0));
  x = _mm512_xor_si512(x, _mm512_xor_si512(moved, _mm512_slli_epi32(moved, 12)));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, x), bytes);
}

// The values of a block, between its rows' order and its masks'. words [16], masks [16]; a cursor a row.
struct Block16 : Values16 {
  static Value* to_panel(const uint32_t* words, const uint32_t* masks, const Value** cursor, const Value* all_end,
                         Value* target, const Value* target_end) {
    __m512i square[16];
#pragma GCC unroll 16
    for (int n = 0; n < 16; ++n) {
      const int64_t kept = __builtin_popcount(words[n]);
      square[n] = expand(words[n], load_values<Values16>(cursor[n], all_end, kept));
      cursor[n] += kept;
    }
    transpose_dwords(square);
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      const int64_t kept = __builtin_popcount(masks[q]);
      store_values<Values16>(target, target_end, kept, compress(masks[q], square[q]));
      target += kept;
    }
    return target;
  }

  static const Value* to_rows(const uint32_t* words, const uint32_t* masks, const Value* source, Value** cursor,
                              Value* const* row_end) {
    __m512i square[16];
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      square[q] = expand(masks[q], _mm512_loadu_si512(source));
      source += __builtin_popcount(masks[q]);
    }
    transpose_dwords(square);
#pragma GCC unroll 16
    for (int n = 0; n < 16; ++n) {
      const int64_t kept = __builtin_popcount(words[n]);
      store_values<Values16>(cursor[n], row_end[n], kept, compress(words[n], square[n]));
      cursor[n] += kept;
    }
    return source;
  }
};

// A register holds 8 rows by an input pair, or a row by 8 pairs: four squares of qwords make a block.
struct Block32 : Values32 {
  static Value* to_panel(const uint32_t* words, const uint32_t* masks, const Value** cursor, const Value* all_end,
                         Value* target, const Value* target_end) {
    for (int half = 0; half < 2; ++half) {
      // rows 0 to 7 and 8 to 15 by pairs 8 half to 8 half + 7
      __m512i squares[2][8];
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const auto word = static_cast<Mask>(words[n] >> (16 * half));
        const int64_t kept = __builtin_popcount(word);
        squares[n / 8][n % 8] = expand(word, load_values<Values32>(cursor[n], all_end, kept));
        cursor[n] += kept;
      }
      transpose_qwords(squares[0]);
      transpose_qwords(squares[1]);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const auto mask = static_cast<Mask>(masks[8 * half + i / 2] >> (16 * (i % 2)));
        const int64_t kept = __builtin_popcount(mask);
        store_values<Values32>(target, target_end, kept, compress(mask, squares[i % 2][i / 2]));
        target += kept;
      }
    }
    return target;
  }

  static const Value* to_rows(const uint32_t* words, const uint32_t* masks, const Value* source, Value** cursor,
                              Value* const* row_end) {
    for (int half = 0; half < 2; ++half) {
      __m512i squares[2][8];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const auto mask = static_cast<Mask>(masks[8 * half + i / 2] >> (16 * (i % 2)));
        squares[i % 2][i / 2] = expand(mask, _mm512_loadu_si512(source));
        source += __builtin_popcount(mask);
      }
      transpose_qwords(squares[0]);
      transpose_qwords(squares[1]);
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const auto word = static_cast<Mask>(words[n] >> (16 * half));
        const int64_t kept = __builtin_popcount(word);
        store_values<Values32>(cursor[n], row_end[n], kept, compress(word, squares[n / 8][n % 8]));
        cursor[n] += kept;
      }
    }
    return source;
  }
};

// The bits of kChunkBlocks blocks of a panel, in both orders.
struct Chunk {
  alignas(64) uint32_t words[kChunkBlocks][kPanelRows];
  alignas(64) uint32_t masks[kChunkBlocks][kBlockMasks];
};

// bits: those of the panel's first row from the chunk on, of which there are `bytes` in a row.
inline void load_chunk(const uint8_t* bits, int64_t row_stride, int64_t rows, int64_t bytes, Chunk& chunk) {
  __m512i square[16];
  const __mmask64 inside = bytes >= kChunkBytes ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(bytes));
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) {
    square[n] = n < rows ? _mm512_maskz_loadu_epi8(inside, bits + n * row_stride) : _mm512_setzero_si512();
  }
  transpose_dwords(square);
#pragma GCC unroll 16
  for (int b = 0; b < 16; ++b) {
    _mm512_store_si512(chunk.words[b], square[b]);
    _mm512_store_si512(chunk.masks[b], swap_pairs(square[b]));
  }
}

template <class Block>
int64_t to_panels(const BitmapRows& packed, uint32_t* all_masks, void* values, int64_t first, int64_t end) {
  using Value = typename Block::Value;
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const int64_t blocks = (packed.in_features + kBlockInputs - 1) / kBlockInputs;
  const auto* all = static_cast<const Value*>(packed.values);
  for (int64_t panel = first; panel < end; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int64_t rows = least_of(packed.out_features - row, kPanelRows);
    const int64_t wrong = first_wrong_row(packed, row, row + rows, count_ones_avx512);
    if (wrong != kNoRow) return wrong;
    const Value* cursor[kPanelRows];
    // a row that does not exist has no bits
    for (int64_t n = 0; n < kPanelRows; ++n) cursor[n] = all + packed.row_offsets[n < rows ? row + n : row];
    Value* target = static_cast<Value*>(values) + packed.row_offsets[row];
    const Value* target_end = static_cast<Value*>(values) + packed.row_offsets[row + rows];
    uint32_t* masks = all_masks + panel * blocks * kBlockMasks;
    for (int64_t block = 0; block < blocks; block += kChunkBlocks) {
      Chunk chunk;
      load_chunk(packed.bitmap + row * bytes + block * 4, bytes, rows, bytes - block * 4, chunk);
      const int64_t here = least_of(blocks - block, kChunkBlocks);
      for (int64_t b = 0; b < here; ++b, masks += kBlockMasks) {
        _mm512_storeu_si512(masks, _mm512_load_si512(chunk.masks[b]));
        target = Block::to_panel(chunk.words[b], chunk.masks[b], cursor, all + packed.kept, target, target_end);
      }
    }
  }
  return kNoRow;
}

// Reads `blocks` blocks at masks.
inline void load_masks(const uint32_t* masks, int64_t blocks, Chunk& chunk) {
#pragma GCC unroll 16
  for (int64_t b = 0; b < kChunkBlocks; ++b) {
    const __m512i block = b < blocks ? _mm512_loadu_si512(masks + b * kBlockMasks) : _mm512_setzero_si512();
    _mm512_store_si512(chunk.masks[b], block);
    _mm512_store_si512(chunk.words[b], swap_pairs(block));
  }
}

// The ones of each row go to row_offsets; false when there are other than the panel's offsets say, or where there is no
// row or input.
inline bool write_rows(const BitmapWeight& weight, const RowsOut& out, int64_t panel) {
  const int64_t bytes = bitmap_row_bytes(weight.in_features);
  const int64_t row = panel * kPanelRows;
  const int64_t rows = least_of(weight.out_features - row, kPanelRows);
  const uint32_t* masks = weight.masks + panel * block_count(weight) * kBlockMasks;
  __m512i ones = _mm512_setzero_si512(), outside = _mm512_setzero_si512();
  const auto exist = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(rows)));
  for (int64_t block = 0; block < block_count(weight); block += kChunkBlocks) {
    const int64_t here = least_of(block_count(weight) - block, kChunkBlocks);
    __m512i square[16];
    for (int64_t b = 0; b < kChunkBlocks; ++b) {
      if (b >= here) {
        square[b] = _mm512_setzero_si512();
        continue;
      }
      square[b] = swap_pairs(_mm512_loadu_si512(masks + (block + b) * kBlockMasks));
      const int64_t inputs = weight.in_features - (block + b) * kBlockInputs;
      const uint32_t inside = inputs < kBlockInputs ? (uint32_t{1} << inputs) - 1 : ~uint32_t{0};
      const __m512i allowed = _mm512_maskz_set1_epi32(exist, static_cast<int>(inside));
      outside = _mm512_or_si512(outside, _mm512_andnot_si512(allowed, square[b]));
      // 2^31 ones would be 2^26 blocks of them
      ones = _mm512_add_epi32(ones, _mm512_popcnt_epi32(square[b]));
    }
    transpose_dwords(square);
    const int64_t left = bytes - block * 4;
    const __mmask64 written = left >= kChunkBytes ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(left));
    for (int64_t n = 0; n < rows; ++n) {
      _mm512_mask_storeu_epi8(out.bitmap + (row + n) * bytes + block * 4, written, square[n]);
    }
  }
  alignas(64) uint32_t counts[kPanelRows];
  _mm512_store_si512(counts, ones);
  int64_t offset = weight.panel_offsets[panel];
  for (int64_t n = 0; n < rows; ++n) out.row_offsets[row + n + 1] = offset += counts[n];
  return _mm512_test_epi32_mask(outside, outside) == 0 && offset == weight.panel_offsets[panel + 1];
}

template <class Block>
int64_t to_rows(const BitmapWeight& weight, const RowsOut& out, int64_t first, int64_t end) {
  using Value = typename Block::Value;
  const int64_t blocks = block_count(weight);
  for (int64_t panel = first; panel < end; ++panel) {
    if (!write_rows(weight, out, panel)) return panel;
    const int64_t row = panel * kPanelRows;
    const int64_t rows = least_of(weight.out_features - row, kPanelRows);
    auto* all = static_cast<Value*>(out.values);
    Value *cursor[kPanelRows], *row_end[kPanelRows];
    // the offset of a panel's first row is another thread's to write
    int64_t start = weight.panel_offsets[panel];
    for (int64_t n = 0; n < kPanelRows; ++n) {
      cursor[n] = all + start;
      if (n < rows) start = out.row_offsets[row + n + 1];
      row_end[n] = all + start;
    }
    const Value* source = static_cast<const Value*>(weight.values) + weight.panel_offsets[panel];
    const uint32_t* masks = weight.masks + panel * blocks * kBlockMasks;
    for (int64_t block = 0; block < blocks; block += kChunkBlocks) {
      Chunk chunk;
      const int64_t here = least_of(blocks - block, kChunkBlocks);
      load_masks(masks + block * kBlockMasks, here, chunk);
      for (int64_t b = 0; b < here; ++b) {
        source = Block::to_rows(chunk.words[b], chunk.masks[b], source, cursor, row_end);
      }
    }
  }
  return kNoRow;
}

}  // namespace

const BitmapPanelsKernel kBitmapPanelsAvx512 = {
    [](const BitmapRows& packed, uint32_t* masks, void* values, int64_t first, int64_t end) {
      const auto run = value_bytes(packed.dtype) == 2 ? to_panels<Block16> : to_panels<Block32>;
      return run(packed, masks, values, first, end);
    },
    [](const BitmapWeight& weight, const RowsOut& rows, int64_t first, int64_t end) {
      const auto run = value_bytes(weight.dtype) == 2 ? to_rows<Block16> : to_rows<Block32>;
      return run(weight, rows, first, end);
    },
};

}  // namespace sparsekern

#endif
