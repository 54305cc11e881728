// linear_bitmap: chooses the instruction set and splits the panels over the threads so that each reads as many
// bytes. The work itself is in linear_bitmap_<set>.cpp, and, for many tokens, in linear_bitmap_nonzero.cpp.

#include "linear_bitmap.h"

#include <cstdlib>

#include "has_amx.h"
#include "has_avx512.h"
#include "linear_bitmap_nonzero.h"
#include "linear_bitmap_tiles.h"

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512_bf16() { return has_avx512_vbmi2() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() { return has_avx512_vbmi2() && has_amx_bf16(); }

constexpr int kAmxSet = 0;
#endif

// in the order of kLinearBitmapSets
const LinearBitmapPanels* const kPanels[] = {
#if defined(__x86_64__)
    &kLinearBitmapAvx512,  // of what is not bfloat16
    &kLinearBitmapAvx512Bf16,
    &kLinearBitmapAvx512,
    &kLinearBitmapAvx512Bw,
    &kLinearBitmapAvx2,
#endif
    &kLinearBitmapPortable,
};

#if defined(__x86_64__)
// What linear_bitmap does, by the tiles of AMX.
bool multiply_by_tiles(const BitmapWeight& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                       int threads) {
  const TileGroups groups(tokens);
  const int64_t blocks = block_count(weight), panels = panel_count(weight);
  // one token of whole blocks is packed as it is
  const bool as_it_is = tokens == 1 && weight.in_features == blocks * kBlockInputs;
  uint16_t* packed = nullptr;
  if (!as_it_is) {
    // one line more: aligned_alloc wants a multiple of the line, and never zero bytes
    const int64_t bytes = groups.count * groups.rows * blocks * kTileRowBytes + 64;
    packed = static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    if (packed == nullptr) return false;
  }
  const auto pack = [&](int part, int parts) {
    pack_x_tiles(x, packed, groups, weight.in_features, blocks * part / parts, blocks * (part + 1) / parts);
  };
  const auto multiply = [&](int part, int parts) {
    linear_bitmap_amx(weight, as_it_is ? x : packed, groups, bias, y, first_panel_of(weight, 0, panels, part, parts),
                      first_panel_of(weight, 0, panels, part + 1, parts));
  };
  threads = worth_threads(threads, panel_bytes(weight, 0, panels) * groups.count);
  pack_and_run(threads, !as_it_is, pack, multiply);
  std::free(packed);
  return true;
}
#endif

}  // namespace

const InstructionSet kLinearBitmapSets[] = {
#if defined(__x86_64__)
    {"amx_bf16", has_amx},
    {"avx512_bf16", has_avx512_bf16, dot_is_faster},
    {"avx512", has_avx512_vbmi2},
    {"avx512bw", has_avx512bw},
    {"avx2", has_avx2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

int64_t panel_bytes(const BitmapWeight& weight, int64_t first, int64_t end) {
  return (weight.panel_offsets[end] - weight.panel_offsets[first]) * value_bytes(weight.dtype) +
         (end - first) * block_count(weight) * kBlockMasks * 4;
}

int64_t first_panel_of(const BitmapWeight& weight, int64_t first, int64_t end, int part, int parts) {
  return first_panel_of_part(first, end, part, parts, [&](int64_t a, int64_t b) { return panel_bytes(weight, a, b); });
}

bool linear_bitmap(const BitmapWeight& weight, const void* x, const void* bias, void* y, int64_t tokens, int set,
                   int threads) {
#if defined(__x86_64__)
  if (set == kAmxSet && weight.dtype == DType::kBFloat16) {
    return multiply_by_tiles(weight, static_cast<const uint16_t*>(x), bias, y, tokens, threads);
  }
#endif
  const LinearBitmapNonzero* nonzero = nonzero_kernel(set, weight.dtype);
  if (nonzero != nullptr && is_worth_nonzero(*nonzero, weight, tokens)) {
    const Nonzero result = linear_bitmap_nonzero(*nonzero, weight, x, bias, y, tokens, threads);
    if (result != Nonzero::kNotFinite) return result == Nonzero::kDone;
  }
  const LinearBitmapPanels& kernel = *kPanels[set];
  const int64_t panels = panel_count(weight);
  const bool narrow = weight.dtype == DType::kBFloat16 && kernel.x_type == DType::kBFloat16;
  const LinearCall call = {weight.dtype, narrow ? DType::kBFloat16 : DType::kFloat32, x, tokens, weight.in_features};
  const int64_t bytes = panel_bytes(weight, 0, panels);
  return run_parts(call, bytes, threads, [&](const void* packed_x, const Groups& groups, int part, int parts) {
    kernel.linear(weight, packed_x, groups, bias, y, first_panel_of(weight, 0, panels, part, parts),
                  first_panel_of(weight, 0, panels, part + 1, parts));
  });
}

void expand_bitmap(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel, int set,
                   int threads) {
  const LinearBitmapPanels& kernel = *kPanels[set];
  const auto bytes = [&](int64_t first, int64_t end) { return panel_bytes(weight, first, end); };
  share_out(threads, first_panel, end_panel, bytes, [&](int64_t first, int64_t end) {
    const int64_t offset = (first - first_panel) * kPanelRows * weight.in_features * value_bytes(weight.dtype);
    kernel.expand(weight, static_cast<char*>(dense) + offset, first, end);
  });
}

}  // namespace sparsekern
