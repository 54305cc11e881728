// linear_bitmap on AVX-512 F, BW, DQ and VL: an expansion turns a mask and the kept values behind it into the tile of 16
// rows by 2 inputs that panel_linear_avx512.h multiplies. Included by one file an instruction set, after its target
// pragma and after the expand_words of that set. No STL here, as in panel_kinds_avx512.h.
#pragma once

#include "linear_bitmap.h"
#include "panel_linear_avx512.h"

namespace sparsekern {
namespace {

// what the masks are ahead: of them there are fewer bytes than of values
constexpr int64_t kMasksAheadBytes = 2048;

// The values of a mask to where its bits are, zeros between them: a tile of each Kind.
inline Tile<1> expand_mask(Bf16Values, uint32_t mask, const uint16_t* values) { return {{expand_words(mask, values)}}; }

inline Tile<2> expand_dwords(uint32_t mask, __m512i low_values, __m512i high_values) {
  return {{_mm512_mask_expand_epi32(fresh_zero(), static_cast<__mmask16>(mask), low_values),
           _mm512_mask_expand_epi32(fresh_zero(), static_cast<__mmask16>(mask >> 16), high_values)}};
}

inline Tile<2> expand_mask(Float32ByFma, uint32_t mask, const float* values) {
  return expand_dwords(mask, _mm512_loadu_si512(values), _mm512_loadu_si512(values + __builtin_popcount(mask & 0xffff)));
}

inline Tile<2> expand_mask(Float16ByFma, uint32_t mask, const uint16_t* values) {
  return expand_dwords(mask, widen_halves(values), widen_halves(values + __builtin_popcount(mask & 0xffff)));
}

template <class TileKind>
struct BitmapTiles {
  using Kind = TileKind;
  using Value = typename Kind::Value;

  struct Cursor {
    const uint32_t* masks;
    const Value* values;
    const Value* end;
    int64_t steps_bytes;  // of the values of kSteps masks, on average
    const char* far;
    int64_t far_lines;  // a block
    uint64_t bits[kSteps / 2];

    void block() {
      ask(masks, kMasksAheadBytes);
      ask_for_lines(far, far_lines);
      far += far_lines * 64;
    }
    void steps() {
      ask(values, kAheadBytes);
      ask(values, kAheadBytes + 64);
      // half of the weights are two lines and hardly ever three
      for (int64_t line = 128; line < steps_bytes - 4; line += 64) ask(values, kAheadBytes + line);
      // masks that lie: see kTailBytes
      static_assert(kSteps <= kGuardMasks, "see kTailBytes");
      values = values < end ? values : end;
      // what limits this loop are its loads: two masks each
      __builtin_memcpy(bits, masks, sizeof bits);
      masks += kSteps;
    }
    Tile<Kind::kRegisters> next(int step) {
      const auto mask = static_cast<uint32_t>(bits[step / 2] >> (step % 2 * 32));
      const auto tile = expand_mask(Kind{}, mask, values);
      values += __builtin_popcount(mask);
      return tile;
    }
  };

  const BitmapWeight& weight;

  Cursor cursor(int64_t panel, int64_t passes = 1, int64_t pass = 0) const {
    const auto* values = static_cast<const Value*>(weight.values);
    const int64_t blocks = block_count(weight);
    const int64_t first = weight.panel_offsets[panel], end = weight.panel_offsets[panel + 1];
    const int64_t bytes = (end - first) * static_cast<int64_t>(sizeof(Value));
    const int64_t block_bytes = blocks == 0 ? 0 : bytes / blocks;
    // the next panel, if it keeps as many
    const char* far = reinterpret_cast<const char*>(values + end) + bytes * pass / passes;
    return {weight.masks + panel * blocks * kBlockMasks,
            values + first,
            values + end,
            block_bytes * kSteps / kBlockMasks,
            far,
            passes == 1 ? 0 : (block_bytes + passes * 64 - 1) / (passes * 64),
            {}};
  }
};

template <class Kind>
void linear(const BitmapWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  const Outputs<Kind> outputs{bias, y, weight.out_features};
  linear_panels(BitmapTiles<Kind>{weight}, pair_count(weight.in_features), x, groups, outputs, first_panel, end_panel);
}

template <class Kind>
void expand(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  using Value = typename Kind::Value;
  auto* dense_panel = static_cast<Value*>(dense);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    auto cursor = BitmapTiles<Kind>{weight}.cursor(panel);
    const int64_t rows_left = weight.out_features - panel * kPanelRows;
    const int64_t rows = rows_left < kPanelRows ? rows_left : kPanelRows;
    for (int64_t first = 0; first < weight.in_features; first += kBlockInputs) {
      alignas(64) __m512i tiles[kBlockMasks * Kind::kRegisters];
      for (int64_t q = 0; q < kBlockMasks; q += kSteps) {
        cursor.steps();
#pragma GCC unroll 4
        for (int step = 0; step < kSteps; ++step) cursor.next(step).store(tiles + (q + step) * Kind::kRegisters);
      }
      // [kBlockMasks, kPanelRows, 2]
      const auto* tile = reinterpret_cast<const Value*>(tiles);
      Value* target = dense_panel + first;
      const int64_t inputs = weight.in_features - first;
      for (int64_t r = 0; r < rows; ++r, tile += 2, target += weight.in_features) {
        if (inputs >= kBlockInputs) {
#pragma GCC unroll 16
          for (int64_t q = 0; q < kBlockMasks; ++q) {
            __builtin_memcpy(target + q * 2, tile + q * kPanelRows * 2, 2 * sizeof(Value));
          }
        } else {
          for (int64_t i = 0; i < inputs; ++i) target[i] = tile[i / 2 * kPanelRows * 2 + i % 2];
        }
      }
    }
    dense_panel += rows * weight.in_features;
  }
}

template <class Bf16Kind>
void linear_any(const BitmapWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16Kind>
                   : weight.dtype == DType::kFloat16 ? linear<Float16ByFma>
                                                     : linear<Float32ByFma>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

// sixteen bits are moved, whatever they mean
inline void expand_any(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kFloat32 ? expand<Float32ByFma> : expand<Bf16Values>;
  run(weight, dense, first_panel, end_panel);
}

}  // namespace
}  // namespace sparsekern
