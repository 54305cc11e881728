// linear_dense on AVX-512 without VBMI2, which a dense weight has no use for.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt,bmi2")

#include "linear_dense_avx512.h"

namespace sparsekern {

const LinearDensePanels kLinearDenseAvx512Bw = {DType::kFloat32, linear_any<Bf16ByFma>};

}  // namespace sparsekern

#endif
