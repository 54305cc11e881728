// linear_dense: chooses the instruction set and splits the panels over the threads. The work itself is in
// linear_dense_<set>.cpp.

#include "linear_dense.h"

#include "has_avx512.h"

namespace sparsekern {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512_bf16() { return has_avx512_vbmi2() && __builtin_cpu_supports("avx512bf16"); }
#endif

// in the order of kLinearDenseSets
const LinearDensePanels* const kPanels[] = {
#if defined(__x86_64__)
    &kLinearDenseAvx512Bf16,
    &kLinearDenseAvx512,
    &kLinearDenseAvx512Bw,
    &kLinearDenseAvx2,
#endif
    &kLinearDensePortable,
};

}  // namespace

const InstructionSet kLinearDenseSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, dot_is_faster},
    {"avx512", has_avx512_vbmi2},
    {"avx512bw", has_avx512bw},
    {"avx2", has_avx2},
#endif
    {"portable", always},
    {nullptr, nullptr},
};

bool linear_dense(const DenseWeight& weight, const void* x, const void* bias, void* y, int64_t tokens, int set,
                  int threads) {
  const LinearDensePanels& kernel = *kPanels[set];
  const int64_t panels = panel_count(weight.out_features);
  const bool narrow = weight.dtype == DType::kBFloat16 && kernel.x_type == DType::kBFloat16;
  const LinearCall call = {weight.dtype, narrow ? DType::kBFloat16 : DType::kFloat32, x, tokens, weight.in_features};
  const int64_t bytes = panels * pair_count(weight.in_features) * kPanelRows * 2 * value_bytes(weight.dtype);
  return run_parts(call, bytes, threads, [&](const void* packed_x, const Groups& groups, int64_t part, int64_t parts) {
    kernel.linear(weight, packed_x, groups, bias, y, panels * part / parts, panels * (part + 1) / parts);
  });
}

}  // namespace sparsekern
