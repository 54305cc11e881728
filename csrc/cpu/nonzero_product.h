// What the products that leave zero weights out share. Lanes are tokens, so that a weight is one number for all lanes
// and a zero can be passed over; with rows as lanes some row always has a weight. x is cut so that a block of its
// steps, by so many tokens, stays in L1 while rows pass. A step is 32 bits of every token: two bfloat16 inputs, or one
// in float32.
#pragma once

#include "panel_product.h"

namespace sparsekern {

constexpr int64_t kLaneTokens = 16;
// a bit each in a row's word of kept steps
constexpr int64_t kNonzeroSteps = 64;
// 64 steps of so many tokens are 32 KB
constexpr int64_t kMaxVectors = 8;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tokens as vectors of kLaneTokens, these in blocks of kMaxVectors at most, of which no block has two fewer than
// another. Inlined always: a copy compiled for one instruction set could be the one that all others call.
struct TokenBlocks {
  int64_t tokens;
  int64_t vectors;
  int64_t count;

  [[gnu::always_inline]] explicit TokenBlocks(int64_t all)
      : tokens(all), vectors(divide_up(all, kLaneTokens)), count(divide_up(vectors, kMaxVectors)) {}

  [[gnu::always_inline]] int64_t first_vector(int64_t block) const { return vectors * block / count; }
  [[gnu::always_inline]] int64_t size(int64_t block) const { return first_vector(block + 1) - first_vector(block); }
};

// Panels whose sums, of all tokens that are multiplied meanwhile, and whose expanded weights stay in L2.
constexpr int64_t kGroupPanels = 16;
// token blocks for which a weight is expanded once
constexpr int64_t kGroupBlocks = 4;

// One block of a panel, expanded: words[step][row], and which of its steps each row keeps. The step after the last is
// zeros: what a row that has no more is multiplied with.
struct NonzeroTile {
  alignas(64) uint32_t words[(kNonzeroSteps + 1) * kPanelRows];
  uint64_t kept[kPanelRows];
};

// The scratch of one thread.
struct NonzeroScratch {
  NonzeroTile tiles[kGroupPanels];
  alignas(64) float sums[kGroupBlocks * kMaxVectors * kLaneTokens * kGroupPanels * kPanelRows];
};

}  // namespace sparsekern
