// The sums of a panel's rows on AVX2, whatever its weights are stored as: lane 2 n + j = (row n, input j) of four rows a
// register. Included after the target pragma; no STL here, as in panel_kinds_avx512.h.
#pragma once

#include "../ops.h"
#include "expand_avx2.h"

namespace sparsekern {
namespace {

// of 16 registers, a token's sums take four
constexpr int64_t kAtOnce = 3;

// Four registers of lanes (row, input) to sixteen rows.
inline void total(const __m256* sums, __m256& low, __m256& high) {
  low = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(sums[0], sums[1])), 0xd8));
  high = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(sums[2], sums[3])), 0xd8));
}

// Which outputs a panel's rows are.
struct PanelRows {
  int64_t first;
  int64_t count;
  int64_t out_features;

  PanelRows(int64_t outputs, int64_t panel)
      : first(panel * kPanelRows), count(outputs - first < kPanelRows ? outputs - first : kPanelRows),
        out_features(outputs) {}
};

// y[token, the panel's rows] = sums + bias
template <class Kind>
void store(const PanelRows& panel, __m256 low, __m256 high, const void* bias, void* y, int64_t token) {
  using Value = typename Kind::Value;
  alignas(32) Value rows[kPanelRows] = {};
  if (bias != nullptr) {
    __builtin_memcpy(rows, static_cast<const Value*>(bias) + panel.first,
                     static_cast<size_t>(panel.count) * sizeof(Value));
    low = _mm256_add_ps(low, Kind::widen(rows));
    high = _mm256_add_ps(high, Kind::widen(rows + kLanes));
  }
  Kind::narrow(low, rows);
  Kind::narrow(high, rows + kLanes);
  __builtin_memcpy(static_cast<Value*>(y) + token * panel.out_features + panel.first, rows,
                   static_cast<size_t>(panel.count) * sizeof(Value));
}

inline __m256 broadcast_pair(const float* x) {
  double both;
  __builtin_memcpy(&both, x, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}

// How many of `rest` tokens to multiply at once: four are two and two, so that none is left alone.
template <int64_t kMost>
constexpr int64_t next_tokens(int64_t rest) {
  return rest == 4 ? 2 : rest < kMost ? rest : kMost;
}

}  // namespace
}  // namespace sparsekern
