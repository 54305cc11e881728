// linear_dense on AVX2: eight weights at a time are widened and multiplied with three tokens at once. No STL here: see
// panel_kinds_avx512.h.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")

#include "linear_dense.h"
#include "panel_sums_avx2.h"

namespace sparsekern {
namespace {

// as far ahead as linear_bitmap_avx2.cpp reads
constexpr int64_t kPrefetchBytes = 8192;

// The x of a pair of inputs are x_step floats apart; y has the first token's row, and `tokens` of them.
template <class Kind, int kTokens>
void panel_tokens(const typename Kind::Value* tile, int64_t pairs, const float* x, int64_t x_step,
                  const PanelRows& rows, const void* bias, void* y, int64_t tokens) {
  // a lone token's sums would wait for themselves: the fused multiply-add takes four cycles
  constexpr int kChains = kTokens == 1 ? 2 : 1;
  static_assert(kBlockMasks % kChains == 0, "pairs come in blocks");
  __m256 sums[kChains][kTokens][kMaskBytes];
#pragma GCC unroll 2
  for (auto& chain : sums) {
#pragma GCC unroll 3
    for (auto& token : chain) {
#pragma GCC unroll 4
      for (auto& sum : token) sum = _mm256_setzero_ps();
    }
  }
  for (int64_t pair = 0; pair < pairs; pair += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      for (size_t line = 0; line < sizeof(*tile) * kTileFloats; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(tile) + kPrefetchBytes + line, _MM_HINT_T0);
      }
      __m256 both[kTokens];
#pragma GCC unroll 3
      for (int token = 0; token < kTokens; ++token) both[token] = broadcast_pair(x + token * 2);
#pragma GCC unroll 4
      for (int byte = 0; byte < kMaskBytes; ++byte) {
        const __m256 w = Kind::widen(tile + byte * kLanes);
#pragma GCC unroll 3
        for (int token = 0; token < kTokens; ++token) {
          sums[chain][token][byte] = _mm256_fmadd_ps(w, both[token], sums[chain][token][byte]);
        }
      }
      tile += kTileFloats;
      x += x_step;
    }
  }
#pragma GCC unroll 3
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
    for (int byte = 0; byte < kMaskBytes; ++byte) {
      if (kChains == 2) sums[0][token][byte] = _mm256_add_ps(sums[0][token][byte], sums[kChains - 1][token][byte]);
    }
    __m256 low, high;
    total(sums[0][token], low, high);
    if (token < tokens) store<Kind>(rows, low, high, bias, y, token);
  }
}

template <class Kind>
void linear(const DenseWeight& weight, const void* packed_x, const Groups& groups, const void* bias, void* y,
            int64_t first_panel, int64_t end_panel) {
  using Value = typename Kind::Value;
  const int64_t pairs = pair_count(weight.in_features);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const PanelRows rows(weight.out_features, panel);
    const auto* tile = static_cast<const Value*>(weight.panels) + panel * pairs * kTileFloats;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.first(group), size = groups.size(group);
      const auto* x = static_cast<const float*>(packed_x) + first * pairs * 2;
      for (int64_t done = 0; done < size;) {
        const int64_t here = next_tokens<kAtOnce>(size - done);
        const auto run = here == 1   ? panel_tokens<Kind, 1>
                         : here == 2 ? panel_tokens<Kind, 2>
                                     : panel_tokens<Kind, kAtOnce>;
        auto* y_here = static_cast<Value*>(y) + (first + done) * weight.out_features;
        run(tile, pairs, x + done * 2, size * 2, rows, bias, y_here, groups.tokens - first - done);
        done += here;
      }
    }
  }
}

void linear_any(const DenseWeight& weight, const void* x, const Groups& groups, const void* bias, void* y,
                int64_t first_panel, int64_t end_panel) {
  const auto run = weight.dtype == DType::kBFloat16  ? linear<Bf16>
                   : weight.dtype == DType::kFloat16 ? linear<Fp16>
                                                     : linear<Float32>;
  run(weight, x, groups, bias, y, first_panel, end_panel);
}

}  // namespace

const LinearDensePanels kLinearDenseAvx2 = {DType::kFloat32, linear_any};

}  // namespace sparsekern

#endif
