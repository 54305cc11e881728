// What the instruction sets of linear_bitmap_int8 share. See ops.h for the layout of the weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ops.h"

namespace sparsekern {

constexpr int64_t kStepInputs = kInt8BlockInputs / kBlockMasks;  // inputs a mask covers: 4

// x as integers: an input times 2^exponent, rounded, plus an offset that makes it unsigned, cut into two or three bytes.
// The first byte's digit counts 2^8 or 2^16 and is taken as if it ran from -128, which gives the offset back.
//
// Two bytes for a bfloat16 token whose largest input is at most kMostPeak times its mean one: nothing is then rounded by
// more than a bfloat16 as large as the mean would be. Three for the other tokens and for float32. A token has the same
// integers whichever tokens are beside it.
constexpr int kMostPlanes = 3;
constexpr float kMostPeak = 64.0f;
constexpr int64_t kGroupTokens = 8;
// rows of bytes whose sums fit into registers
constexpr int64_t kMostByteRows = kGroupTokens * kMostPlanes;

// Tokens that are multiplied together: `planes` rows of bytes each, the most significant first.
//   rows   [blocks * kBlockMasks, byte_rows(tokens * planes), kStepInputs], rows that no token has are zeros
//   scale  of each token, NaN where one of its inputs is not finite
struct Int8Group {
  uint8_t* rows;
  int64_t first_token;
  int64_t tokens;
  int64_t planes;
  float scale[kGroupTokens];
};

namespace {

// How a token becomes integers.
struct Rounding {
  float factor;  // a power of two, 2^126 at most
  float scale;   // its inverse, NaN where an input is not finite
  int64_t planes;
};

inline float power_of_two(int exponent) {
  const auto bits = static_cast<uint32_t>(exponent + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

//   most, sum  of the magnitudes of a token's in_features inputs
inline Rounding rounding_of(float most, float sum, bool finite, DType dtype, int64_t in_features) {
  if (!finite) return {0.0f, __builtin_nanf(""), 2};
  const bool fine = dtype == DType::kFloat32 || most * static_cast<float>(in_features) > kMostPeak * sum;
  const int64_t planes = fine ? 3 : 2;
  if (most == 0.0f) return {1.0f, 1.0f, planes};
  uint32_t bits;
  std::memcpy(&bits, &most, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const int shift = static_cast<int>(8 * planes - 2) - exponent;
  const int held = shift < 126 ? shift : 126;
  return {power_of_two(held), power_of_two(-held), planes};
}

}  // namespace

// The numbers of rows of bytes that there is code for.
constexpr int64_t byte_rows(int64_t rows) {
  return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : rows <= 12 ? 12 : rows <= 16 ? 16 : kMostByteRows;
}

// The sums of this many inputs fit into 32 bits: 255 * 127 * 65536 < 2^31.
constexpr int64_t kMostSummed = 65536;

constexpr int64_t panel_count(const BitmapInt8Weight& weight) {
  return (weight.out_features + kPanelRows - 1) / kPanelRows;
}

constexpr int64_t block_count(const BitmapInt8Weight& weight) {
  return (weight.in_features + kInt8BlockInputs - 1) / kInt8BlockInputs;
}

constexpr int64_t scale_groups(const BitmapInt8Weight& weight) {
  return weight.in_features == 0 ? 1 : (weight.in_features + weight.group_size - 1) / weight.group_size;
}

// The work of one thread: panels first_panel to end_panel - 1, all groups of tokens.
//   pack    fills rows, planes and scale of a group
//   linear  y as in ops.h, all tokens of it
//   expand  dense as in ops.h, starts with the first row of first_panel
struct LinearBitmapInt8Panels {
  void (*pack)(const void* x, DType dtype, int64_t in_features, Int8Group& group);
  void (*linear)(const BitmapInt8Weight& weight, const Int8Group* groups, int64_t count, const void* bias, void* y,
                 int64_t first_panel, int64_t end_panel);
  void (*expand)(const BitmapInt8Weight& weight, void* dense, int64_t first_panel, int64_t end_panel);
};

// The work of one thread on panels first to end - 1, of weights as they are saved whose rows were counted.
//   to_panels  masks and values of the panels
//   to_rows    the inverse; returns the first panel whose ones its offsets do not count or that has ones where the weight
//              ends, or kNoRow, and neither reads nor writes the values of such a panel
struct Int8PanelsKernel {
  void (*to_panels)(const BitmapRows& packed, uint64_t* masks, int8_t* values, int64_t first, int64_t end);
  int64_t (*to_rows)(const BitmapInt8Weight& weight, const Int8RowsOut& rows, int64_t first, int64_t end);
};

extern const LinearBitmapInt8Panels kLinearBitmapInt8Portable;
extern const Int8PanelsKernel kInt8PanelsPortable;
#if defined(__x86_64__)
extern const LinearBitmapInt8Panels kLinearBitmapInt8Avx512;
extern const Int8PanelsKernel kInt8PanelsAvx512;
#endif

}  // namespace sparsekern
