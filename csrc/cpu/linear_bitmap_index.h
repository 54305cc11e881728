// What the parts of linear_bitmap_index share. See ops.h for the layout of the weight.
#pragma once

#include "../ops.h"

namespace sparsekern {

// tokens for which a window is expanded once, and whose x stays in L2
constexpr int64_t kIndexTokens = 64;

constexpr int64_t panels_of(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

constexpr int64_t window_count(const BitmapIndexWeight& weight) {
  return (weight.in_features + kWindowInputs - 1) / kWindowInputs;
}

// The first panel of a part, when `parts` parts shall read as many weights each. Inlined always: a copy compiled for one
// instruction set could be the one that all others call.
[[gnu::always_inline]] inline int64_t first_index_panel(const BitmapIndexWeight& weight, int part, int parts) {
  const int64_t panels = panels_of(weight.out_features);
  if (part == parts) return panels;
  const int64_t target = weight.value_offsets[panels] / parts * part;
  int64_t low = 0, high = panels;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (weight.value_offsets[middle] < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

//   x       [tokens, windows, 2, kWindowInputs], high bytes and low bytes
//   finite  [tokens], 0 where an input is not
struct IndexCall {
  const BitmapIndexWeight* weight;
  const uint8_t* x;
  const uint8_t* finite;
  const uint16_t* bias;
  uint16_t* y;
  int64_t tokens;
};

// The work of one thread: tokens first to end - 1, or panels first_panel to end_panel - 1.
struct LinearBitmapIndex {
  void (*pack)(const uint16_t* x, int64_t in_features, uint8_t* packed, uint8_t* finite, int64_t first, int64_t end);
  void (*linear)(const IndexCall& call, int64_t first_panel, int64_t end_panel);
};

#if defined(__x86_64__)
extern const LinearBitmapIndex kLinearBitmapIndexAvx512;
#endif

}  // namespace sparsekern
