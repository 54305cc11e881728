// What the linear ops on panels share: how x is handed over and how panels are split over threads. A panel is
// kPanelRows outputs by all inputs; see ops.h for what each op stores of it.
#pragma once

#include <cstdlib>

#include "packed_x.h"
#include "shares.h"

namespace sparsekern {

constexpr int64_t panel_count(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

// Pairs of inputs, with those that fill up the last block.
constexpr int64_t pair_count(int64_t in_features) {
  return (in_features + kBlockInputs - 1) / kBlockInputs * kBlockMasks;
}

// One call of a linear op.
struct LinearCall {
  DType dtype;   // of x, bias and y
  DType x_type;  // of the packed x that the kernel wants
  const void* x;
  int64_t tokens;
  int64_t in_features;
};

// Packs x and calls run(packed_x, groups, part, parts) for every part, each on its own thread; `bytes` is what all of
// them read of the weight. Returns false when there is no memory for the packed x.
template <class Run>
bool run_parts(const LinearCall& call, int64_t bytes, int threads, Run&& run) {
  const Groups groups(call.tokens);
  const int64_t pairs = pair_count(call.in_features);
  // further groups read the weight again, from the cache
  threads = worth_threads(threads, bytes * groups.count);
  // one token of whole blocks is packed as it is
  const bool as_it_is = call.tokens == 1 && call.dtype == call.x_type && call.in_features == pairs * 2;
  void* scratch = nullptr;
  if (!as_it_is) {
    // one line more: aligned_alloc wants a multiple of the line, and never zero bytes
    const int64_t size = (pairs * groups.first(groups.count) * 2 * value_bytes(call.x_type) + 64) / 64 * 64;
    scratch = std::aligned_alloc(64, static_cast<size_t>(size));
    if (scratch == nullptr) return false;
  }
  const auto pack = [&](int64_t part, int64_t parts) {
    pack_x(call.x, call.dtype, scratch, call.x_type, groups, call.in_features, pairs, pairs * part / parts,
           pairs * (part + 1) / parts);
  };
  const void* packed = as_it_is ? call.x : scratch;
  pack_and_run(threads, !as_it_is, pack, [&](int part, int parts) { run(packed, groups, part, parts); });
  std::free(scratch);
  return true;
}

}  // namespace sparsekern
