// float16 to float32 and back in plain C++: no instruction beyond the baseline, no library call.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsekern {
namespace {

inline float widen_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // the exponent's bias is 15 there and 127 here: a product with 2^112 also makes subnormals normal
  uint32_t bits = magnitude << 13;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  wide *= 0x1p112f;
  std::memcpy(&bits, &wide, sizeof bits);
  // infinity and NaN keep the largest exponent
  bits |= (magnitude >= 0x7c00u ? 0x7f800000u : 0u) | static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To nearest, ties to even; what is too large becomes infinite.
inline uint16_t narrow_half(float wide) {
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x47800000u) {  // 2^16
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // 2^-14: a subnormal. Its step is that of float32 just above 1/2
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace sparsekern
