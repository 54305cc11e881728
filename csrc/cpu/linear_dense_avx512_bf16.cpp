// linear_dense on AVX-512 with VDPBF16PS.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512dq,avx512bf16,fma,popcnt,bmi2")

#include "linear_dense_avx512.h"
#include "panel_dot_avx512.h"

namespace sparsekern {

const LinearDensePanels kLinearDenseAvx512Bf16 = {DType::kBFloat16, linear_any<Bf16ByDot>};

}  // namespace sparsekern

#endif
