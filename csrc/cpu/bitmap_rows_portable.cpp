// bitmap_rows in plain C++: the ones of a word are found one after the other, so that pruned weights cost little.

#include <cstring>

#include "bitmap_rows.h"
#include "bitmap_words.h"

namespace sparsekern {
namespace {

template <class Value>
struct Bits;

template <>
struct Bits<uint16_t> {
  static constexpr uint16_t kMagnitude = 0x7fff;
  static uint16_t exponent(DType dtype) { return dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00; }
};

template <>
struct Bits<uint32_t> {
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
  static uint32_t exponent(DType) { return 0x7f800000u; }
};

int64_t check(const BitmapRows& packed, int64_t first, int64_t end) {
  return first_wrong_row(packed, first, end, count_ones);
}

template <class Value>
int64_t to_dense(const BitmapRows& packed, void* dense, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  for (int64_t row = first; row < end; ++row) {
    if (first_wrong_row(packed, row, row + 1, count_ones) != kNoRow) return row;
    const Value* values = static_cast<const Value*>(packed.values) + packed.row_offsets[row];
    Value* target = static_cast<Value*>(dense) + row * packed.in_features;
    std::memset(target, 0, static_cast<size_t>(packed.in_features) * sizeof(Value));
    for (int64_t byte = 0; byte < bytes; byte += 4) {
      uint32_t word = load_word(packed.bitmap + row * bytes + byte, bytes - byte);
      for (; word != 0; word &= word - 1) target[byte * 8 + __builtin_ctz(word)] = *values++;
    }
  }
  return kNoRow;
}

template <class Value>
int64_t bits(const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int64_t first, int64_t end) {
  const Value exponent = Bits<Value>::exponent(dense.dtype);
  const int64_t bytes = bitmap_row_bytes(dense.in_features);
  int64_t not_finite = 0;
  for (int64_t row = first; row < end; ++row) {
    const Value* source = static_cast<const Value*>(dense.weight) + row * dense.row_stride;
    int64_t kept = 0;
    for (int64_t byte = 0; byte < bytes; ++byte) {
      const int64_t inputs = dense.in_features - byte * 8 < 8 ? dense.in_features - byte * 8 : 8;
      unsigned ones = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        const Value value = source[byte * 8 + i];
        const unsigned one = (value & Bits<Value>::kMagnitude) != 0;
        ones |= one << i;
        kept += one;
        not_finite += (value & exponent) == exponent;
      }
      bitmap[row * bytes + byte] = static_cast<uint8_t>(ones);
    }
    row_offsets[row + 1] = kept;
  }
  return not_finite;
}

template <class Value>
int64_t values(const DenseRows& dense, const BitmapRows& packed, void* values, int64_t first, int64_t end) {
  const int64_t bytes = bitmap_row_bytes(dense.in_features);
  for (int64_t row = first; row < end; ++row) {
    if (first_wrong_row(packed, row, row + 1, count_ones) != kNoRow) return row;
    const Value* source = static_cast<const Value*>(dense.weight) + row * dense.row_stride;
    Value* target = static_cast<Value*>(values) + packed.row_offsets[row];
    for (int64_t byte = 0; byte < bytes; byte += 4) {
      uint32_t word = load_word(packed.bitmap + row * bytes + byte, bytes - byte);
      for (; word != 0; word &= word - 1) *target++ = source[byte * 8 + __builtin_ctz(word)];
    }
  }
  return kNoRow;
}

bool narrow(DType dtype) { return value_bytes(dtype) == 2; }

}  // namespace

const BitmapRowsKernel kBitmapRowsPortable = {
    check,
    [](const BitmapRows& packed, void* dense, int64_t first, int64_t end) {
      return (narrow(packed.dtype) ? to_dense<uint16_t> : to_dense<uint32_t>)(packed, dense, first, end);
    },
    [](const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int64_t first, int64_t end) {
      return (narrow(dense.dtype) ? bits<uint16_t> : bits<uint32_t>)(dense, bitmap, row_offsets, first, end);
    },
    [](const DenseRows& dense, const BitmapRows& packed, void* target, int64_t first, int64_t end) {
      return (narrow(dense.dtype) ? values<uint16_t> : values<uint32_t>)(dense, packed, target, first, end);
    },
};

}  // namespace sparsekern
