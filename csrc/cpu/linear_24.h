// What the instruction sets of linear_24 share. See ops.h for the layout of the weight.
#pragma once

#include "../ops.h"

namespace sparsekern {

constexpr int64_t kMostTokens24 = 24;  // that are multiplied at once
constexpr int64_t kGroupBytes24 = 72;  // 32 values and 16 times 4 bits

constexpr int64_t blocks_24(int64_t in_features) { return (in_features + kBlockInputs - 1) / kBlockInputs; }

// Tokens that are multiplied at once: up to kMostTokens24 all of them, more are shared out evenly.
struct Turns {
  int64_t tokens;
  int64_t count;

  [[gnu::always_inline]] explicit Turns(int64_t all)
      : tokens(all), count((all + kMostTokens24 - 1) / kMostTokens24) {}
  [[gnu::always_inline]] int64_t first(int64_t turn) const { return tokens * turn / count; }
};

// The work of one thread: panels first_panel to end_panel - 1. x [blocks, tokens, kBlockInputs] bfloat16, zeros after the
// last input.
using Linear24Panels = void (*)(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                                int64_t first_panel, int64_t end_panel);

void linear_24_portable(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                        int64_t first_panel, int64_t end_panel);
#if defined(__x86_64__)
void linear_24_avx512(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                      int64_t first_panel, int64_t end_panel);
void linear_24_avx512_bf16(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                           int64_t first_panel, int64_t end_panel);
#endif

}  // namespace sparsekern
