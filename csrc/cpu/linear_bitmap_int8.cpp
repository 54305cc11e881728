// linear_bitmap_int8: chooses the instruction set, rounds x to integers, and splits the panels over the threads so that
// each reads as many bytes. The work itself is in linear_bitmap_int8_<set>.cpp.

#include "linear_bitmap_int8.h"

#include <algorithm>
#include <cstring>

#include "bitmap_rows.h"
#include "has_avx512.h"
#include "huge_pages.h"
#include "int8_groups.h"

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512_vnni() { return has_avx512_vbmi2() && __builtin_cpu_supports("avx512vnni"); }
#endif

struct Kernels {
  const LinearBitmapInt8Panels* linear;
  const Int8PanelsKernel* panels;
};

// in the order of kLinearBitmapInt8Sets
const Kernels kKernels[] = {
#if defined(__x86_64__)
    {&kLinearBitmapInt8Avx512, &kInt8PanelsAvx512},
#endif
    {&kLinearBitmapInt8Portable, &kInt8PanelsPortable},
};

// What panels first to end - 1 make a thread read.
int64_t panel_bytes(const BitmapInt8Weight& weight, int64_t first, int64_t end) {
  return weight.panel_offsets[end] - weight.panel_offsets[first] +
         (end - first) * (block_count(weight) * kBlockMasks * 8 + scale_groups(weight) * kPanelRows * 4);
}

// The first panel of a part, when `parts` parts shall read as many bytes each.
int64_t first_panel_of(const BitmapInt8Weight& weight, int64_t first, int64_t end, int part, int parts) {
  return first_panel_of_part(first, end, part, parts, [&](int64_t a, int64_t b) { return panel_bytes(weight, a, b); });
}

// Panels first to end - 1 a part, some at a time: the least of what work(first, end) returns.
template <class Work>
int64_t least(int64_t panels, int64_t bytes, int threads, Work&& work) {
  threads = worth_rows_threads(threads, bytes);
  if (threads <= 1) return work(int64_t{0}, panels);
  const int64_t step = 1 + kRowsBytesPerThread / (bytes / panels + 1);
  int64_t found = kNoRow;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : found)
  for (int64_t first = 0; first < panels; first += step) {
    found = std::min(found, work(first, std::min(first + step, panels)));
  }
  return found;
}

}  // namespace

const InstructionSet kLinearBitmapInt8Sets[] = {
#if defined(__x86_64__)
    {"avx512_vnni", has_avx512_vnni},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

bool linear_bitmap_int8(const BitmapInt8Weight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                        int set, int threads) {
  const LinearBitmapInt8Panels& kernel = *kKernels[set].linear;
  const int64_t panels = panel_count(weight);
  return linear_in_groups(
      tokens, block_count(weight) * kBlockMasks * kMostByteRows * kStepInputs, panel_bytes(weight, 0, panels), threads,
      [&](Int8Group& group) { kernel.pack(x, weight.dtype, weight.in_features, group); },
      [&](const Int8Group* groups, int64_t count, int part, int parts) {
        kernel.linear(weight, groups, count, bias, y, first_panel_of(weight, 0, panels, part, parts),
                      first_panel_of(weight, 0, panels, part + 1, parts));
      });
}

void expand_bitmap_int8(const BitmapInt8Weight& weight, void* dense, int64_t first_panel, int64_t end_panel, int set,
                        int threads) {
  const LinearBitmapInt8Panels& kernel = *kKernels[set].linear;
  const auto bytes = [&](int64_t first, int64_t end) { return panel_bytes(weight, first, end); };
  share_out(threads, first_panel, end_panel, bytes, [&](int64_t first, int64_t end) {
    const int64_t offset = (first - first_panel) * kPanelRows * weight.in_features * value_bytes(weight.dtype);
    kernel.expand(weight, static_cast<char*>(dense) + offset, first, end);
  });
}

int64_t bitmap_int8_to_panels(const BitmapRows& packed, uint64_t* masks, int8_t* values, int64_t* panel_offsets,
                              int set, int threads) {
  const int64_t panels = (packed.out_features + kPanelRows - 1) / kPanelRows;
  const int64_t blocks = (packed.in_features + kInt8BlockInputs - 1) / kInt8BlockInputs;
  for (int64_t panel = 0; panel <= panels; ++panel) {
    panel_offsets[panel] = packed.row_offsets[std::min(panel * kPanelRows, packed.out_features)];
  }
  std::memset(values + packed.kept, 0, kTailBytes);
  // bitmap_rows counts by the best set there is
  int rows_set = 0;
  while (!kBitmapRowsSets[rows_set].supported()) ++rows_set;
  if (const int64_t wrong = check_bitmap(packed, rows_set, threads); wrong != kNoRow) return wrong;
  prefer_huge_pages(masks, panels * blocks * kBlockMasks * 8);
  prefer_huge_pages(values, packed.kept);
  return least(panels, packed_bytes(packed), threads, [&](int64_t first, int64_t end) {
    kKernels[set].panels->to_panels(packed, masks, values, first, end);
    return kNoRow;
  });
}

int64_t panels_to_bitmap_int8(const BitmapInt8Weight& weight, const Int8RowsOut& rows, int set, int threads) {
  const int64_t panels = panel_count(weight);
  const int64_t bytes =
      weight.panel_offsets[panels] + weight.out_features * bitmap_row_bytes(weight.in_features);
  prefer_huge_pages(rows.values, weight.panel_offsets[panels]);
  rows.row_offsets[0] = 0;
  return least(panels, bytes, threads, [&](int64_t first, int64_t end) {
    return kKernels[set].panels->to_rows(weight, rows, first, end);
  });
}

}  // namespace sparsekern
