// What the parts of linear_bitmap_int8_index share. See ops.h for the layout of the weight.
#pragma once

#include "linear_bitmap_index.h"
#include "linear_bitmap_int8.h"

namespace sparsekern {

// Rows of bytes are multiplied eight at a time, and what is left of them four, or no more than they are.
constexpr int64_t kIndexRows = 8;
constexpr int64_t kFewIndexRows = 4;

constexpr int64_t index_byte_rows(int64_t rows) {
  return rows <= kFewIndexRows ? rows : (rows + kFewIndexRows - 1) / kFewIndexRows * kFewIndexRows;
}

struct Int8IndexCall {
  const BitmapIndexWeight* weight;
  const Int8Scales* scales;
  const void* bias;
  void* y;
};

//   pack    fills rows, planes and scale of a group; here its index_byte_rows(tokens * planes) rows lie by kIndexRows,
//           and then what is left, [windows, kIndexRows, kWindowInputs], so that a product reads on
//   linear  y of all tokens, of panels first_panel to end_panel - 1
struct LinearBitmapInt8Index {
  void (*pack)(const void* x, DType dtype, int64_t in_features, Int8Group& group);
  void (*linear)(const Int8IndexCall& call, const Int8Group* groups, int64_t count, int64_t first_panel,
                 int64_t end_panel);
};

#if defined(__x86_64__)
extern const LinearBitmapInt8Index kLinearBitmapInt8IndexAvx512;
#endif

}  // namespace sparsekern
