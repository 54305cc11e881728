// bitmap_rows on AVX-512 VBMI2: one instruction spreads the kept values to where the bits are, or gathers them.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vpopcntdq,popcnt,bmi,bmi2")

#include "bitmap_rows.h"
#include "expand_avx512.h"

namespace sparsekern {
namespace {

int64_t check(const BitmapRows& packed, int64_t first, int64_t end) {
  return first_wrong_row(packed, first, end, count_ones_avx512);
}

// The bits of the kLanes inputs from `input` on; those after the last are 0.
template <class Kind>
uint32_t load_bits(const uint8_t* bits, int64_t input, int64_t bytes) {
  constexpr int64_t kBytes = Kind::kLanes / 8;
  uint32_t word = 0;
  const int64_t here = bytes - input / 8;
  if (here >= kBytes) {
    __builtin_memcpy(&word, bits + input / 8, kBytes);
  } else {
    __builtin_memcpy(&word, bits + input / 8, static_cast<size_t>(here));
  }
  return word;
}

template <class Kind>
int64_t to_dense(const BitmapRows& packed, void* dense, int64_t first, int64_t end) {
  using Value = typename Kind::Value;
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const auto* all = static_cast<const Value*>(packed.values);
  for (int64_t row = first; row < end; ++row) {
    if (first_wrong_row(packed, row, row + 1, count_ones_avx512) != kNoRow) return row;
    const uint8_t* bits = packed.bitmap + row * bytes;
    const Value* values = all + packed.row_offsets[row];
    Value* target = static_cast<Value*>(dense) + row * packed.in_features;
    const Value* target_end = target + packed.in_features;
    for (int64_t input = 0; input < packed.in_features; input += Kind::kLanes) {
      const uint32_t word = load_bits<Kind>(bits, input, bytes);
      const int64_t kept = __builtin_popcount(word);
      const __m512i x = load_values<Kind>(values, all + packed.kept, kept);
      store_values<Kind>(target + input, target_end, target_end - target - input,
                         Kind::expand(static_cast<typename Kind::Mask>(word), x));
      values += kept;
    }
  }
  return kNoRow;
}

template <class Kind>
int64_t bits(const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int64_t first, int64_t end) {
  using Value = typename Kind::Value;
  const int64_t bytes = bitmap_row_bytes(dense.in_features);
  int64_t not_finite = 0;
  for (int64_t row = first; row < end; ++row) {
    const Value* source = static_cast<const Value*>(dense.weight) + row * dense.row_stride;
    uint8_t* target = bitmap + row * bytes;
    int64_t kept = 0;
    for (int64_t input = 0; input < dense.in_features; input += Kind::kLanes) {
      const __m512i x = load_values<Kind>(source + input, source + dense.in_features, dense.in_features - input);
      const uint32_t word = Kind::nonzero(x);
      not_finite += __builtin_popcount(Kind::not_finite(x, dense.dtype));
      kept += __builtin_popcount(word);
      const int64_t here = bytes - input / 8;
      if (here >= Kind::kLanes / 8) {
        __builtin_memcpy(target + input / 8, &word, Kind::kLanes / 8);
      } else {
        __builtin_memcpy(target + input / 8, &word, static_cast<size_t>(here));
      }
    }
    row_offsets[row + 1] = kept;
  }
  return not_finite;
}

template <class Kind>
int64_t values(const DenseRows& dense, const BitmapRows& packed, void* values, int64_t first, int64_t end) {
  using Value = typename Kind::Value;
  const int64_t bytes = bitmap_row_bytes(dense.in_features);
  for (int64_t row = first; row < end; ++row) {
    if (first_wrong_row(packed, row, row + 1, count_ones_avx512) != kNoRow) return row;
    const uint8_t* bits = packed.bitmap + row * bytes;
    const Value* source = static_cast<const Value*>(dense.weight) + row * dense.row_stride;
    Value* target = static_cast<Value*>(values) + packed.row_offsets[row];
    const Value* target_end = static_cast<Value*>(values) + packed.row_offsets[row + 1];
    for (int64_t input = 0; input < dense.in_features; input += Kind::kLanes) {
      const uint32_t word = load_bits<Kind>(bits, input, bytes);
      const int64_t kept = __builtin_popcount(word);
      const __m512i x = load_values<Kind>(source + input, source + dense.in_features, dense.in_features - input);
      store_values<Kind>(target, target_end, kept, Kind::compress(static_cast<typename Kind::Mask>(word), x));
      target += kept;
    }
  }
  return kNoRow;
}

bool narrow(DType dtype) { return value_bytes(dtype) == 2; }

}  // namespace

const BitmapRowsKernel kBitmapRowsAvx512 = {
    check,
    [](const BitmapRows& packed, void* dense, int64_t first, int64_t end) {
      return (narrow(packed.dtype) ? to_dense<Values16> : to_dense<Values32>)(packed, dense, first, end);
    },
    [](const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int64_t first, int64_t end) {
      return (narrow(dense.dtype) ? bits<Values16> : bits<Values32>)(dense, bitmap, row_offsets, first, end);
    },
    [](const DenseRows& dense, const BitmapRows& packed, void* target, int64_t first, int64_t end) {
      return (narrow(dense.dtype) ? values<Values16> : values<Values32>)(dense, packed, target, first, end);
    },
};

}  // namespace sparsekern

#endif
