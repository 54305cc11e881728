// linear_bitmap without the arithmetic of the zeros: when it is worth it, and how its work is split. The work itself is
// in linear_bitmap_nonzero_<set>.cpp.

#include "linear_bitmap_nonzero.h"

#include <atomic>
#include <cstdlib>

namespace sparsekern {
namespace {

// Up to which share of kept weights a product that leaves the zeros out is the faster one, from so many tokens on.
struct MostKept {
  int64_t tokens;
  double share;
};

// Measured on Zen 5, 10 to 80 % of the weights kept, 16 to 512 tokens. Three of four pairs are kept where half of the
// weights are. Pairs below 256 tokens: under the share at which both were as fast, because what this product keeps in L2
// makes it unsteady. At 64 tokens and 30 % five runs took 0.93 to 1.7 times as long as the product with the zeros.
constexpr MostKept kPairs[] = {{256, 0.6}, {128, 0.42}, {96, 0.35}, {64, 0.25}, {48, 0.18}, {32, 0.12}};
constexpr MostKept kSingles[] = {{256, 0.66}, {128, 0.6}, {96, 0.52}, {64, 0.42}, {48, 0.3}, {32, 0.2}};

template <int kCount>
double most_kept(const MostKept (&limits)[kCount], int64_t tokens) {
  for (const MostKept& limit : limits) {
    if (tokens >= limit.tokens) return limit.share;
  }
  return -1;
}

}  // namespace

const LinearBitmapNonzero* nonzero_kernel(int set, DType dtype) {
#if defined(__x86_64__)
  // in the order of kLinearBitmapSets; null: it multiplies the zeros faster, or there is none
  const LinearBitmapNonzero* const of_bfloat16[] = {nullptr, &kLinearBitmapNonzeroAvx512Bf16,
                                                    &kLinearBitmapNonzeroAvx512, &kLinearBitmapNonzeroAvx512Bw};
  const LinearBitmapNonzero* const of_others[] = {&kLinearBitmapNonzeroAvx512, &kLinearBitmapNonzeroAvx512,
                                                  &kLinearBitmapNonzeroAvx512, &kLinearBitmapNonzeroAvx512Bw};
  if (set < 4) return dtype == DType::kBFloat16 ? of_bfloat16[set] : of_others[set];
#endif
  return nullptr;
}

bool is_worth_nonzero(const LinearBitmapNonzero& kernel, const BitmapWeight& weight, int64_t tokens) {
  if (weight.out_features == 0 || weight.in_features == 0) return false;
  const double share = kernel.tile_inputs > kNonzeroSteps ? most_kept(kPairs, tokens) : most_kept(kSingles, tokens);
  return kept_share(weight) <= share;
}

Nonzero linear_bitmap_nonzero(const LinearBitmapNonzero& kernel, const BitmapWeight& weight, const void* x,
                              const void* bias, void* y, int64_t tokens, int threads) {
  const TokenBlocks blocks(tokens);
  const int64_t tiles = divide_up(weight.in_features, kernel.tile_inputs), panels = panel_count(weight);
  threads = worth_threads(threads, panel_bytes(weight, 0, panels) * blocks.vectors);
  const int64_t dwords = (blocks.vectors * tiles * kNonzeroSteps + kMaxVectors) * kLaneTokens;
  auto* packed = static_cast<uint32_t*>(std::aligned_alloc(64, static_cast<size_t>(dwords) * sizeof(uint32_t)));
  auto* scratch = static_cast<NonzeroScratch*>(
      std::aligned_alloc(64, static_cast<size_t>(threads > 1 ? threads : 1) * sizeof(NonzeroScratch)));
  if (packed == nullptr || scratch == nullptr) {
    std::free(packed);
    std::free(scratch);
    return Nonzero::kNoMemory;
  }
  // what a row that has no more steps is multiplied with, times zero
  std::memset(packed + dwords - kMaxVectors * kLaneTokens, 0, kMaxVectors * kLaneTokens * sizeof(uint32_t));
  const NonzeroX packed_x = {x, weight.in_features, packed};
  std::atomic<bool> finite{true};
  const auto pack = [&](int part, int parts) {
    if (!kernel.pack(packed_x, weight.dtype, blocks, tiles * part / parts, tiles * (part + 1) / parts)) finite = false;
  };
  const auto multiply = [&](int part, int parts) {
    if (!finite) return;
    kernel.linear(weight, packed, blocks, bias, y, first_panel_of(weight, 0, panels, part, parts),
                  first_panel_of(weight, 0, panels, part + 1, parts), scratch[part]);
  };
  pack_and_run(threads, true, pack, multiply);
  std::free(packed);
  std::free(scratch);
  return finite ? Nonzero::kDone : Nonzero::kNotFinite;
}

}  // namespace sparsekern
