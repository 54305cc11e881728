// linear_24 on AVX-512 with VDPBF16PS.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512dq,avx512bf16,fma,popcnt,bmi2")

#include "linear_24_avx512.h"
#include "panel_dot_avx512.h"

namespace sparsekern {

void linear_24_avx512_bf16(const Weight24& weight, const uint16_t* x, const void* bias, void* y, int64_t tokens,
                 int64_t first_panel, int64_t end_panel) {
  panels_24<Bf16ByDot>(weight, x, bias, y, tokens, first_panel, end_panel);
}

}  // namespace sparsekern

#endif
