// linear_dense on AVX-512: a tile is a load. Included after the target pragma; no STL here.
#pragma once

#include "linear_dense.h"
#include "panel_linear_avx512.h"

namespace sparsekern {
namespace {

// measured on Zen 5, one thread, see linear_bitmap_avx512.h
constexpr int64_t kDenseAheadBytes = 8192;

template <class TileKind>
struct DenseTiles {
  using Kind = TileKind;
  struct Cursor {
    static constexpr int64_t ahead_bytes = 64 * Kind::kRegisters;
    const __m512i* tile;

    void guard() {}
    void next(__m512i* target) {
#pragma GCC unroll 2
      for (int i = 0; i < Kind::kRegisters; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(tile) + kDenseAheadBytes, _MM_HINT_T0);
        target[i] = _mm512_loadu_si512(tile++);
      }
    }
    const __m512i* tiles(int64_t count, __m512i*) {
      const __m512i* here = tile;
      tile += count * Kind::kRegisters;
      return here;
    }
    const char* ahead() const { return reinterpret_cast<const char*>(tile); }
  };

  const DenseWeight& weight;

  Cursor cursor(int64_t panel) const {
    return {static_cast<const __m512i*>(weight.panels) + panel * pair_count(weight.in_features) * Kind::kRegisters};
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
  const auto run = weight.dtype == DType::kBFloat16 ? linear<Bf16Kind> : linear<Float32ByFma>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

}  // namespace
}  // namespace sparsekern
