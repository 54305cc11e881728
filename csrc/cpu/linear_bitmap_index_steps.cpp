// bitmap_to_index and back: between a weight as it is saved and the steps of linear_bitmap_index and
// linear_bitmap_int8_index. Panels are split over the threads.

#include <algorithm>
#include <cstring>

#include "bitmap_rows.h"
#include "bitmap_words.h"
#include "linear_bitmap_index.h"

namespace sparsekern {
namespace {

constexpr int64_t kStepWeights = 4;  // of a row

// How many weights row `row` keeps in a window.
int64_t kept_in(const BitmapRows& packed, int64_t row, int64_t window) {
  const int64_t bytes = bitmap_row_bytes(packed.in_features), first = window * kWindowInputs / 8;
  return count_ones(packed.bitmap + row * bytes + first, std::min(bytes - first, kWindowInputs / 8));
}

// The order of the values: of kHalf weights of every row, then of the next. bit: of a step, for weight k of row n.
struct Bf16Order {
  using Value = uint16_t;
  static constexpr int64_t kHalf = 2;
  static int64_t bit(int64_t n, int64_t k) { return 16 * (n / 4) + 8 * (k / 2) + 2 * (n % 4) + k % 2; }
  static int64_t row(int64_t bit) { return bit / 16 * 4 + bit % 8 / 2; }
  static int64_t weight(int64_t bit) { return 2 * (bit / 8 % 2) + bit % 2; }
};

struct Int8Order {
  using Value = int8_t;
  static constexpr int64_t kHalf = kStepWeights;
  static int64_t bit(int64_t n, int64_t k) { return kStepWeights * n + k; }
  static int64_t row(int64_t bit) { return bit / kStepWeights; }
  static int64_t weight(int64_t bit) { return bit % kStepWeights; }
};

// One panel: its weights from row after row into step after step.
template <class Order>
void fill_panel(const BitmapRows& packed, const BitmapIndexOut& out, int64_t panel) {
  const int64_t windows = (packed.in_features + kWindowInputs - 1) / kWindowInputs;
  const int64_t row = panel * kPanelRows, rows = std::min(kPanelRows, packed.out_features - row);
  const int64_t bytes = bitmap_row_bytes(packed.in_features);
  const auto* source = static_cast<const typename Order::Value*>(packed.values);
  int64_t cursor[kPanelRows];
  for (int64_t n = 0; n < rows; ++n) cursor[n] = packed.row_offsets[row + n];
  uint64_t* masks = out.masks + out.step_offsets[panel];
  uint8_t* places = out.places + out.value_offsets[panel];
  auto* values = static_cast<typename Order::Value*>(out.values) + out.value_offsets[panel];
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
      for (int64_t half = 0; half < kStepWeights; half += Order::kHalf) {
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t k = half; k < half + Order::kHalf && s * kStepWeights + k < count[n]; ++k) {
            *values++ = source[cursor[n] + s * kStepWeights + k];
            mask |= uint64_t{1} << Order::bit(n, k);
          }
        }
      }
      for (int64_t bit = 0; bit < 64; ++bit) {
        if ((mask >> bit & 1) != 0) *places++ = place[Order::row(bit)][s * kStepWeights + Order::weight(bit)];
      }
      *masks++ = mask;
    }
    for (int64_t n = 0; n < rows; ++n) cursor[n] += count[n];
  }
}

// The inverse of fill_panel; false when the panel contradicts itself.
template <class Order>
bool restore_panel(const BitmapIndexWeight& weight, typename Order::Value* values, uint8_t* bitmap, int64_t* row_offsets,
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
      for (int64_t k = 0; k < kStepWeights; ++k) offset += static_cast<int64_t>(masks[s] >> Order::bit(n, k) & 1);
    }
    row_offsets[row + n + 1] = row_end[n] = offset;
  }
  for (int64_t w = 0; w < windows; ++w) counted += weight.steps[panel * windows + w];
  if (counted != steps || offset != weight.value_offsets[panel + 1] || offset - weight.value_offsets[panel] != ones) {
    return false;
  }
  std::fill(bitmap + row * bytes, bitmap + (row + rows) * bytes, uint8_t{0});
  const uint8_t* places = weight.places + weight.value_offsets[panel];
  const auto* source = static_cast<const typename Order::Value*>(weight.values) + weight.value_offsets[panel];
  for (int64_t w = 0; w < windows; ++w) {
    int64_t last[kPanelRows], held[kPanelRows];
    std::fill(last, last + kPanelRows, int64_t{-1});
    std::fill(held, held + kPanelRows, int64_t{0});
    for (int64_t s = 0; s < weight.steps[panel * windows + w]; ++s) {
      const uint64_t mask = *masks++;
      uint8_t place[64];
      for (int64_t bit = 0; bit < 64; ++bit) place[bit] = (mask >> bit & 1) != 0 ? *places++ : uint8_t{0};
      for (int64_t half = 0; half < kStepWeights; half += Order::kHalf) {
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t k = half; k < half + Order::kHalf; ++k) {
            if ((mask >> Order::bit(n, k) & 1) == 0) continue;
            const int64_t input = place[Order::bit(n, k)];
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
  const int64_t size = value_bytes(packed.dtype);
  std::memset(out.places + packed.kept, 0, kIndexTail);
  std::memset(static_cast<char*>(out.values) + packed.kept * size, 0, static_cast<size_t>(kIndexTail * size));
  const int64_t panels = panels_of(packed.out_features);
  const auto fill = packed.dtype == DType::kInt8 ? fill_panel<Int8Order> : fill_panel<Bf16Order>;
  if (worth_rows_threads(threads, packed_bytes(packed)) <= 1) {
    for (int64_t panel = 0; panel < panels; ++panel) fill(packed, out, panel);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t panel = 0; panel < panels; ++panel) fill(packed, out, panel);
}

int64_t index_to_bitmap(const BitmapIndexWeight& weight, void* values, uint8_t* bitmap, int64_t* row_offsets,
                        int threads) {
  const int64_t panels = panels_of(weight.out_features);
  row_offsets[0] = 0;
  int64_t found = kNoRow;
  threads = worth_rows_threads(threads, weight.value_offsets[panels] * (1 + value_bytes(weight.dtype)));
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : found)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const bool right = weight.dtype == DType::kInt8
                           ? restore_panel<Int8Order>(weight, static_cast<int8_t*>(values), bitmap, row_offsets, panel)
                           : restore_panel<Bf16Order>(weight, static_cast<uint16_t*>(values), bitmap, row_offsets, panel);
    if (!right) found = std::min(found, panel);
  }
  return found;
}

}  // namespace sparsekern
