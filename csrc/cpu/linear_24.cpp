// linear_24: chooses the instruction set, packs x, and splits the panels, which all are as long, over the threads. The
// work itself is in linear_24_<set>.cpp.

#include "linear_24.h"

#include <cstdlib>
#include <cstring>

#include "has_avx512.h"
#include "panel_product.h"

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512_vbmi() { return has_avx512_vbmi2() && __builtin_cpu_supports("avx512vbmi"); }
bool has_avx512_bf16() { return has_avx512_vbmi() && __builtin_cpu_supports("avx512bf16"); }
#endif

// in the order of kLinear24Sets
const Linear24Panels kPanels[] = {
#if defined(__x86_64__)
    linear_24_avx512_bf16,
    linear_24_avx512,
#endif
    linear_24_portable,
};

// Blocks first to end - 1 of x as the kernels read it: what a block of a panel meets, of all tokens, behind each other.
void pack_blocks(const uint16_t* x, uint16_t* packed, int64_t tokens, int64_t in_features, int64_t first, int64_t end) {
  for (int64_t block = first; block < end; ++block) {
    const int64_t left = in_features - block * kBlockInputs;
    const int64_t inputs = left < kBlockInputs ? left : kBlockInputs;
    uint16_t* target = packed + block * tokens * kBlockInputs;
    for (int64_t token = 0; token < tokens; ++token, target += kBlockInputs) {
      std::memcpy(target, x + token * in_features + block * kBlockInputs, static_cast<size_t>(inputs) * 2);
      std::memset(target + inputs, 0, static_cast<size_t>(kBlockInputs - inputs) * 2);
    }
  }
}

}  // namespace

const InstructionSet kLinear24Sets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16},
    {"avx512", has_avx512_vbmi},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

bool linear_24(const Weight24& weight, const void* x, const void* bias, void* y, int64_t tokens, int set, int threads) {
  const Linear24Panels kernel = kPanels[set];
  const int64_t panels = panel_count(weight.out_features);
  const int64_t blocks = blocks_24(weight.in_features);
  const auto* source = static_cast<const uint16_t*>(x);
  // one token of whole blocks is packed as it is
  const bool as_it_is = tokens == 1 && weight.in_features == blocks * kBlockInputs;
  uint16_t* scratch = nullptr;
  if (!as_it_is) {
    // one line more: aligned_alloc never of zero bytes
    scratch = static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>(blocks * tokens * 64 + 64)));
    if (scratch == nullptr) return false;
  }
  const uint16_t* packed = as_it_is ? source : scratch;
  const int64_t bytes = panels * blocks * kGroups24 * kGroupBytes24;
  threads = worth_threads(threads, bytes * Turns(tokens).count);
  const auto pack = [&](int64_t part, int64_t parts) {
    pack_blocks(source, scratch, tokens, weight.in_features, blocks * part / parts, blocks * (part + 1) / parts);
  };
  pack_and_run(threads, !as_it_is, pack, [&](int64_t part, int64_t parts) {
    kernel(weight, packed, bias, y, tokens, panels * part / parts, panels * (part + 1) / parts);
  });
  std::free(scratch);
  return true;
}

}  // namespace sparsekern
