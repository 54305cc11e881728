// linear_bitmap_index: makes the order that it reads, splits x into bytes, and splits the panels over the threads so that
// each reads as many weights. The work itself is in linear_bitmap_index_avx512.cpp.

#include "linear_bitmap_index.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "bitmap_rows.h"
#include "bitmap_words.h"
#include "has_avx512.h"

namespace sparsekern {
namespace {

int64_t panels_of(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

constexpr int64_t kStepWeights = 4;  // of a row
constexpr int64_t kBytesPerThread = 65536;

int64_t first_panel_of(const BitmapIndexWeight& weight, int part, int parts) {
  const int64_t panels = panels_of(weight.out_features);
  if (part == parts) return panels;
  const int64_t target = weight.value_offsets[panels] / parts * part;
  return std::lower_bound(weight.value_offsets, weight.value_offsets + panels, target) - weight.value_offsets;
}

// How many weights row `row` keeps in a window.
int64_t kept_in(const BitmapRows& packed, int64_t row, int64_t window) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features), first = window * kWindowInputs / 8;
  return count_ones(packed.bitmap + row * bytes + first, std::min(bytes - first, kWindowInputs / 8));
}

// The bit of a step that stands for weight k of its row n.
int64_t bit_of(int64_t n, int64_t k) { return 16 * (n / 4) + 8 * (k / 2) + 2 * (n % 4) + k % 2; }

// One panel: its weights from row after row into step after step.
void fill_panel(const BitmapRows& packed, const BitmapIndexOut& out, int64_t panel) {
  const int64_t windows = (packed.in_features + kWindowInputs - 1) / kWindowInputs;
  const int64_t row = panel * kPanelRows, rows = std::min(kPanelRows, packed.out_features - row);
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const auto* source = static_cast<const uint16_t*>(packed.values);
  int64_t cursor[kPanelRows];
  for (int64_t n = 0; n < rows; ++n) cursor[n] = packed.row_offsets[row + n];
  uint64_t* masks = out.masks + out.step_offsets[panel];
  uint8_t* places = out.places + out.value_offsets[panel];
  uint16_t* values = out.values + out.value_offsets[panel];
  for (int64_t w = 0; w < windows; ++w) {
    uint8_t place[kPanelRows][kWindowInputs];
    int64_t count[kPanelRows] = {};
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t byte = 0; byte < std::min(bytes - w * kWindowInputs / 8, kWindowInputs / 8); ++byte) {
        for (int bits = packed.bitmap[(row + n) * bytes + w * kWindowInputs / 8 + byte]; bits != 0; bits &= bits - 1) {
          place[n][count[n]++] = static_cast<uint8_t>(byte * 8 + __builtin_ctz(static_cast<unsigned>(bits)));
        }
      }
    }
    for (int64_t s = 0; s < out.steps[panel * windows + w]; ++s) {
      uint64_t mask = 0;
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t j = 0; j < 2; ++j) {
            const int64_t k = s * kStepWeights + 2 * h + j;
            if (k >= count[n]) continue;
            *values++ = source[cursor[n] + k];
            mask |= uint64_t{1} << bit_of(n, 2 * h + j);
          }
        }
      }
      for (int64_t bit = 0; bit < 64; ++bit) {
        const int64_t n = bit / 16 * 4 + bit % 8 / 2, k = s * kStepWeights + 2 * (bit / 8 % 2) + bit % 2;
        if ((mask >> bit & 1) != 0) *places++ = place[n][k];
      }
      *masks++ = mask;
    }
    for (int64_t n = 0; n < rows; ++n) cursor[n] += count[n];
  }
}

// The inverse of fill_panel; false when the panel contradicts itself.
bool restore_panel(const BitmapIndexWeight& weight, uint16_t* values, uint8_t* bitmap, int64_t* row_offsets,
                   int64_t panel) {
  const int64_t windows = window_count(weight), bytes = bitmap_row_bytes(weight.in_features);
  const int64_t row = panel * kPanelRows, rows = std::min(kPanelRows, weight.out_features - row);
  const int64_t steps = weight.step_offsets[panel + 1] - weight.step_offsets[panel];
  const uint64_t* masks = weight.masks + weight.step_offsets[panel];
  int64_t offset = weight.value_offsets[panel], ones = 0, counted = 0;
  for (int64_t s = 0; s < steps; ++s) ones += ones_of_word(masks[s]);
  int64_t cursor[kPanelRows] = {}, row_end[kPanelRows] = {};
  for (int64_t n = 0; n < rows; ++n) {
    cursor[n] = offset;
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t k = 0; k < kStepWeights; ++k) offset += static_cast<int64_t>(masks[s] >> bit_of(n, k) & 1);
    }
    row_offsets[row + n + 1] = row_end[n] = offset;
  }
  for (int64_t w = 0; w < windows; ++w) counted += weight.steps[panel * windows + w];
  if (counted != steps || offset != weight.value_offsets[panel + 1] || offset - weight.value_offsets[panel] != ones) {
    return false;
  }
  std::fill(bitmap + row * bytes, bitmap + (row + rows) * bytes, uint8_t{0});
  const uint8_t* places = weight.places + weight.value_offsets[panel];
  const uint16_t* source = weight.values + weight.value_offsets[panel];
  for (int64_t w = 0; w < windows; ++w) {
    int64_t last[kPanelRows], held[kPanelRows];
    std::fill(last, last + kPanelRows, int64_t{-1});
    std::fill(held, held + kPanelRows, int64_t{0});
    for (int64_t s = 0; s < weight.steps[panel * windows + w]; ++s) {
      const uint64_t mask = *masks++;
      uint8_t place[64];
      for (int64_t bit = 0; bit < 64; ++bit) place[bit] = (mask >> bit & 1) != 0 ? *places++ : uint8_t{0};
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t k = 2 * half; k < 2 * half + 2; ++k) {
            if ((mask >> bit_of(n, k) & 1) == 0) continue;
            const int64_t input = place[bit_of(n, k)];
            // a row fills its steps one after the other, and its inputs rise
            const bool right = held[n] == s * kStepWeights + k && input > last[n] &&
                               w * kWindowInputs + input < weight.in_features && cursor[n] < row_end[n];
            if (!right) return false;
            bitmap[(row + n) * bytes + (w * kWindowInputs + input) / 8] |= static_cast<uint8_t>(1 << (input % 8));
            values[cursor[n]++] = *source++;
            last[n] = input;
            ++held[n];
          }
        }
      }
    }
  }
  return true;
}

}  // namespace

bool has_linear_bitmap_index() {
#if defined(__x86_64__)
  return has_avx512_vbmi2() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool linear_bitmap_index(const BitmapIndexWeight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                         int threads) {
#if defined(__x86_64__)
  const LinearBitmapIndex& kernel = kLinearBitmapIndexAvx512;
  const int64_t panels = panels_of(weight.out_features), windows = window_count(weight);
  const int64_t bytes = tokens * windows * 2 * kWindowInputs;
  auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((bytes + tokens + 64) / 64 * 64 + 64)));
  if (packed == nullptr) return false;
  uint8_t* finite = packed + bytes;
  const auto* source = static_cast<const uint16_t*>(x);
  const IndexCall call = {&weight, packed, finite, static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y), tokens};
  const int64_t worth = 1 + weight.value_offsets[panels] * 3 * tokens / kBytesPerThread;
  threads = worth < threads ? static_cast<int>(worth) : threads;
  if (threads <= 1) {
    kernel.pack(source, weight.in_features, packed, finite, 0, tokens);
    kernel.linear(call, 0, panels);
  } else {
    if (tokens == 1) kernel.pack(source, weight.in_features, packed, finite, 0, 1);
#pragma omp parallel num_threads(threads)
    {
      if (tokens > 1) {
#pragma omp for schedule(static, 1)
        for (int part = 0; part < threads; ++part) {
          kernel.pack(source, weight.in_features, packed, finite, tokens * part / threads, tokens * (part + 1) / threads);
        }
      }
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        kernel.linear(call, first_panel_of(weight, part, threads), first_panel_of(weight, part + 1, threads));
      }
    }
  }
  std::free(packed);
  return true;
#else
  (void)weight, (void)x, (void)bias, (void)y, (void)tokens, (void)threads;
  return false;
#endif
}

void bitmap_to_index_steps(const BitmapRows& packed, const BitmapIndexOut& out) {
  const int64_t panels = panels_of(packed.out_features);
  const int64_t windows = (packed.in_features + kWindowInputs - 1) / kWindowInputs;
  out.step_offsets[0] = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t end = std::min((panel + 1) * kPanelRows, packed.out_features);
    int64_t all = 0;
    for (int64_t w = 0; w < windows; ++w) {
      int64_t most = 0;
      for (int64_t row = panel * kPanelRows; row < end; ++row) most = std::max(most, kept_in(packed, row, w));
      const int64_t steps = (most + kStepWeights - 1) / kStepWeights;
      out.steps[panel * windows + w] = static_cast<uint16_t>(steps);
      all += steps;
    }
    out.step_offsets[panel + 1] = out.step_offsets[panel] + all;
    out.value_offsets[panel] = packed.row_offsets[panel * kPanelRows];
  }
  out.value_offsets[panels] = packed.row_offsets[packed.out_features];
}

void bitmap_to_index(const BitmapRows& packed, const BitmapIndexOut& out, int threads) {
  std::memset(out.places + packed.kept, 0, kIndexTail);
  std::memset(out.values + packed.kept, 0, kIndexTail * sizeof(uint16_t));
  const int64_t panels = panels_of(packed.out_features);
  if (worth_rows_threads(threads, packed_bytes(packed)) <= 1) {
    for (int64_t panel = 0; panel < panels; ++panel) fill_panel(packed, out, panel);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t panel = 0; panel < panels; ++panel) fill_panel(packed, out, panel);
}

int64_t index_to_bitmap(const BitmapIndexWeight& weight, void* values, uint8_t* bitmap, int64_t* row_offsets,
                        int threads) {
  const int64_t panels = panels_of(weight.out_features);
  row_offsets[0] = 0;
  int64_t found = kNoRow;
  threads = worth_rows_threads(threads, weight.value_offsets[panels] * 3);
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : found)
  for (int64_t panel = 0; panel < panels; ++panel) {
    if (!restore_panel(weight, static_cast<uint16_t*>(values), bitmap, row_offsets, panel)) {
      found = std::min(found, panel);
    }
  }
  return found;
}

}  // namespace sparsekern
