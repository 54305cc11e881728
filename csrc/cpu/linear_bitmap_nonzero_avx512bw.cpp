// linear_bitmap without the arithmetic of the zeros on AVX-512 without VBMI2.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt,bmi,bmi2")

#include "expand_words_avx512.h"
#include "linear_bitmap_nonzero_avx512.h"

namespace sparsekern {

const LinearBitmapNonzero kLinearBitmapNonzeroAvx512Bw = {kNonzeroSteps, pack_singles, linear_singles};

}  // namespace sparsekern

#endif
