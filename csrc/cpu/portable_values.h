// Values in plain C++: how each dtype is widened to float and narrowed back.
#pragma once

#include <cstdint>
#include <cstring>

#include "float16.h"

namespace sparsekern {
namespace {

struct Bf16 {
  using Value = uint16_t;
  static float widen(Value value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  // to nearest, ties to even
  static Value narrow(float wide) {
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    if (wide != wide) return 0x7fc0;
    return static_cast<Value>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Fp16 {
  using Value = uint16_t;
  static float widen(Value value) { return widen_half(value); }
  static Value narrow(float wide) { return narrow_half(wide); }
};

struct Float32 {
  using Value = float;
  static float widen(Value value) { return value; }
  static Value narrow(float wide) { return wide; }
};

}  // namespace
}  // namespace sparsekern
