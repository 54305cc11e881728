// bitmap_panels: chooses the instruction set and hands panels to the threads, a few at a time. A panel holds the values
// of its rows in another order, so where it starts is known before any is converted, and no thread waits for another.
// The work itself is in bitmap_panels_<set>.cpp.

#include "bitmap_panels.h"

#include <cstring>

#include "bitmap_rows.h"
#include "has_avx512.h"
#include "huge_pages.h"

namespace sparsekern {
namespace {

bool always() { return true; }

// in the order of kBitmapPanelsSets
const BitmapPanelsKernel* const kKernels[] = {
#if defined(__x86_64__)
    &kBitmapPanelsAvx512,
#endif
    &kBitmapPanelsPortable,
};

// The least of what work(first, end) returns for all panels.
template <class Work>
int64_t least(int64_t panels, int64_t bytes, int threads, Work&& work) {
  threads = worth_rows_threads(threads, bytes);
  if (threads <= 1) return work(int64_t{0}, panels);
  const int64_t step = 1 + kRowsBytesPerThread / (bytes / panels + 1);
  int64_t found = kNoRow;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : found)
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t here = work(first, least_of(first + step, panels));
    if (here < found) found = here;
  }
  return found;
}

}  // namespace

const InstructionSet kBitmapPanelsSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512_vbmi2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

int64_t bitmap_to_panels(const BitmapRows& packed, uint32_t* masks, void* values, int64_t* panel_offsets, int set,
                         int threads) {
  const BitmapPanelsKernel& kernel = *kKernels[set];
  const int64_t panels = (packed.out_features + kPanelRows - 1) / kPanelRows;
  for (int64_t panel = 0; panel <= panels; ++panel) {
    panel_offsets[panel] = packed.row_offsets[least_of(panel * kPanelRows, packed.out_features)];
  }
  const int64_t blocks = (packed.in_features + kBlockInputs - 1) / kBlockInputs;
  prefer_huge_pages(masks, panels * blocks * kBlockMasks * 4);
  prefer_huge_pages(values, packed.kept * value_bytes(packed.dtype));
  std::memset(static_cast<char*>(values) + packed.kept * value_bytes(packed.dtype), 0, kTailBytes);
  return least(panels, packed_bytes(packed), threads, [&](int64_t first, int64_t end) {
    return kernel.to_panels(packed, masks, values, first, end);
  });
}

int64_t panels_to_bitmap(const BitmapWeight& weight, void* values, uint8_t* bitmap, int64_t* row_offsets, int set,
                         int threads) {
  const BitmapPanelsKernel& kernel = *kKernels[set];
  const int64_t panels = panel_count(weight);
  const int64_t bytes = weight.panel_offsets[panels] * value_bytes(weight.dtype) +
                        weight.out_features * bitmap_row_bytes(weight.in_features);
  prefer_huge_pages(values, weight.panel_offsets[panels] * value_bytes(weight.dtype));
  row_offsets[0] = 0;
  return least(panels, bytes, threads, [&](int64_t first, int64_t end) {
    return kernel.to_rows(weight, {values, bitmap, row_offsets}, first, end);
  });
}

}  // namespace sparsekern
