// linear_bitmap on AVX-512 with VDPBF16PS, which takes two inputs at once: twice the arithmetic of two fused
// multiply-adds on Zen 5. It rounds every pair to nearest and takes subnormal weights and inputs for zero.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512dq,avx512bf16,fma,popcnt,bmi2")

#include "expand_words_vbmi2.h"
#include "linear_bitmap_avx512.h"
#include "panel_dot_avx512.h"

namespace sparsekern {

const LinearBitmapPanels kLinearBitmapAvx512Bf16 = {DType::kBFloat16, linear_any<Bf16ByDot>, expand_any};

}  // namespace sparsekern

#endif
