// linear_bitmap: chooses the instruction set, packs x, and splits the panels over the threads so that each reads as many
// bytes. The work itself is in linear_bitmap_<set>.cpp.

#include "linear_bitmap.h"

#include <cstdlib>
#include <cstring>

#include "float16.h"
#include "has_amx.h"
#include "has_avx512.h"
#include "linear_bitmap_tiles.h"

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512_bf16() { return has_avx512_vbmi2() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() { return has_avx512_vbmi2() && has_amx_bf16(); }

bool has_avx512bw() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi2");
}

// f16c came with them, and compilers cannot all ask for it
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

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

struct CopyFloat {
  using Source = float;
  using Target = float;
  static float convert(float x) { return x; }
};

struct CopyBf16 {
  using Source = uint16_t;
  using Target = uint16_t;
  static uint16_t convert(uint16_t x) { return x; }
};

struct WidenBf16 {
  using Source = uint16_t;
  using Target = float;
  static float convert(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};

struct WidenFp16 {
  using Source = uint16_t;
  using Target = float;
  static float convert(uint16_t x) { return widen_half(x); }
};

// Input pairs first_pair to end_pair - 1 of every group.
template <class Convert>
void pack_x(const void* x, void* packed, int64_t tokens, int64_t in_features, int64_t pairs, int64_t first_pair,
            int64_t end_pair) {
  const auto* source = static_cast<const typename Convert::Source*>(x);
  auto* group = static_cast<typename Convert::Target*>(packed);
  for (int64_t first = 0; first < tokens; first += kMaxGroup) {
    const int64_t here = tokens - first < kMaxGroup ? tokens - first : kMaxGroup;
    const int64_t size = group_size(here);
    for (int64_t pair = first_pair; pair < end_pair; ++pair) {
      auto* target = group + pair * size * 2;
      for (int64_t i = 0; i < size * 2; ++i) {
        const int64_t token = i / 2;
        const int64_t input = pair * 2 + i % 2;
        const bool inside = token < here && input < in_features;
        target[i] = inside ? Convert::convert(source[(first + token) * in_features + input]) : 0;
      }
    }
    group += pairs * size * 2;
  }
}

// What panels first to end - 1 make a thread read.
int64_t panel_bytes(const BitmapWeight& weight, int64_t first, int64_t end) {
  return (weight.panel_offsets[end] - weight.panel_offsets[first]) * value_bytes(weight.dtype) +
         (end - first) * block_count(weight) * kBlockMasks * 4;
}

// To wake a thread takes as long as reading this much.
constexpr int64_t kBytesPerThread = 65536;

int worth_threads(int threads, int64_t bytes) {
  const int64_t worth = 1 + bytes / kBytesPerThread;
  return worth < threads ? static_cast<int>(worth) : threads;
}

// The first panel of a part, when `parts` parts shall read as many bytes each.
int64_t first_panel_of(const BitmapWeight& weight, int64_t first, int64_t end, int part, int parts) {
  if (part == parts) return end;
  const int64_t target = panel_bytes(weight, first, end) / parts * part;
  int64_t low = first, high = end;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (panel_bytes(weight, first, middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

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
    if (as_it_is) return;
    pack_x_tiles(x, packed, groups, weight.in_features, blocks * part / parts, blocks * (part + 1) / parts);
  };
  const auto multiply = [&](int part, int parts) {
    linear_bitmap_amx(weight, as_it_is ? x : packed, groups, bias, y, first_panel_of(weight, 0, panels, part, parts),
                      first_panel_of(weight, 0, panels, part + 1, parts));
  };
  threads = worth_threads(threads, panel_bytes(weight, 0, panels) * groups.count);
  if (threads <= 1) {
    pack(0, 1);
    multiply(0, 1);
  } else {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) pack(part, threads);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) multiply(part, threads);
    }
  }
  std::free(packed);
  return true;
}
#endif

}  // namespace

const InstructionSet kLinearBitmapSets[] = {
#if defined(__x86_64__)
    {"amx_bf16", has_amx},
    {"avx512_bf16", has_avx512_bf16},
    {"avx512", has_avx512_vbmi2},
    {"avx512bw", has_avx512bw},
    {"avx2", has_avx2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

bool linear_bitmap(const BitmapWeight& weight, const void* x, const void* bias, void* y, int64_t tokens, int set,
                   int threads) {
#if defined(__x86_64__)
  if (set == kAmxSet && weight.dtype == DType::kBFloat16) {
    return multiply_by_tiles(weight, static_cast<const uint16_t*>(x), bias, y, tokens, threads);
  }
#endif
  const LinearBitmapPanels& kernel = *kPanels[set];
  const bool narrow = weight.dtype == DType::kBFloat16 && kernel.x_type == DType::kBFloat16;
  const auto pack = narrow                             ? pack_x<CopyBf16>
                    : weight.dtype == DType::kBFloat16 ? pack_x<WidenBf16>
                    : weight.dtype == DType::kFloat16  ? pack_x<WidenFp16>
                                                       : pack_x<CopyFloat>;
  const int64_t pairs = block_count(weight) * kBlockMasks;
  const int64_t panels = panel_count(weight);
  const int64_t padded_tokens = tokens / kMaxGroup * kMaxGroup + group_size(tokens % kMaxGroup);
  // one line more: aligned_alloc wants a multiple of the line, and never zero bytes
  const int64_t bytes = (pairs * padded_tokens * 2 * (narrow ? 2 : 4) + 64) / 64 * 64;
  void* packed = std::aligned_alloc(64, static_cast<size_t>(bytes));
  if (packed == nullptr) return false;
  // every group of tokens after the first reads the weight again, from the cache
  threads = worth_threads(threads, panel_bytes(weight, 0, panels) * (1 + tokens / kMaxGroup));
  if (threads <= 1) {
    pack(x, packed, tokens, weight.in_features, pairs, 0, pairs);
    kernel.linear(weight, packed, bias, y, tokens, 0, panels);
  } else {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        pack(x, packed, tokens, weight.in_features, pairs, pairs * part / threads, pairs * (part + 1) / threads);
      }
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        kernel.linear(weight, packed, bias, y, tokens, first_panel_of(weight, 0, panels, part, threads),
                      first_panel_of(weight, 0, panels, part + 1, threads));
      }
    }
  }
  std::free(packed);
  return true;
}

void expand_bitmap(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel, int set,
                   int threads) {
  const LinearBitmapPanels& kernel = *kPanels[set];
  threads = worth_threads(threads, panel_bytes(weight, first_panel, end_panel));
  if (threads <= 1) {
    kernel.expand(weight, dense, first_panel, end_panel);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; ++part) {
    const int64_t first = first_panel_of(weight, first_panel, end_panel, part, threads);
    const int64_t end = first_panel_of(weight, first_panel, end_panel, part + 1, threads);
    const int64_t offset = (first - first_panel) * kPanelRows * weight.in_features * value_bytes(weight.dtype);
    kernel.expand(weight, static_cast<char*>(dense) + offset, first, end);
  }
}

}  // namespace sparsekern
