// linear_dense on AVX-512: a tile is a load. Included after the target pragma; no STL here.
#pragma once

#include "linear_dense.h"
#include "panel_linear_avx512.h"

namespace sparsekern {
namespace {

template <class Kind>
Tile<Kind::kRegisters> load_tile(Kind, const __m512i* tile) {
  return Tile<Kind::kRegisters>::load(tile);
}

inline Tile<2> load_tile(Float16ByFma, const __m512i* tile) {
  const auto* halves = reinterpret_cast<const uint16_t*>(tile);
  return {{widen_halves(halves), widen_halves(halves + kPanelRows)}};
}

template <class TileKind>
struct DenseTiles {
  using Kind = TileKind;
  // of a tile as it is stored: float16 becomes twice as many
  static constexpr int kStored = kPanelRows * 2 * sizeof(typename Kind::Value) / 64;
  struct Cursor {
    const __m512i* tile;
    const char* far;
    int64_t far_lines;  // a block

    void block() {
      ask_for_lines(far, far_lines);
      far += far_lines * 64;
    }
    void steps() {
#pragma GCC unroll 8
      for (int i = 0; i < kSteps * kStored; ++i) ask(tile + i, kAheadBytes);
      tile += kSteps * kStored;
    }
    Tile<Kind::kRegisters> next(int step) { return load_tile(Kind{}, tile + (step - kSteps) * kStored); }
  };

  const DenseWeight& weight;

  Cursor cursor(int64_t panel, int64_t passes, int64_t pass) const {
    const int64_t tiles = pair_count(weight.in_features) * kStored;
    const auto* tile = static_cast<const __m512i*>(weight.panels) + panel * tiles;
    // the next panel
    const int64_t lines = passes == 1 ? 0 : (kBlockMasks * kStored + passes - 1) / passes;
    return {tile, reinterpret_cast<const char*>(tile + tiles + tiles * pass / passes), lines};
  }
};

template <class Kind>
void linear(const DenseWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  const Outputs<Kind> outputs{bias, y, weight.out_features};
  linear_panels(DenseTiles<Kind>{weight}, pair_count(weight.in_features), x, groups, outputs, first_panel, end_panel);
}

template <class Bf16Kind>
void linear_any(const DenseWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16Kind>
                   : weight.dtype == DType::kFloat16 ? linear<Float16ByFma>
                                                     : linear<Float32ByFma>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

}  // namespace
}  // namespace sparsekern
