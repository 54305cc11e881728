// The bits of a bitmap in plain C++: words of them, and how many are ones.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsekern {
namespace {

// The next four bytes, zeros after the last of `bytes`.
inline uint32_t load_word(const uint8_t* bits, int64_t bytes) {
  uint32_t word = 0;
  std::memcpy(&word, bits, static_cast<size_t>(bytes < 4 ? bytes : 4));
  return word;
}

inline int64_t ones_of_word(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  return static_cast<int64_t>((((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
}

inline int64_t count_ones(const uint8_t* bits, int64_t bytes) {
  int64_t ones = 0;
  for (; bytes >= 8; bits += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, bits, sizeof word);
    ones += ones_of_word(word);
  }
  uint64_t rest = 0;
  std::memcpy(&rest, bits, static_cast<size_t>(bytes));
  return ones + ones_of_word(rest);
}

}  // namespace
}  // namespace sparsekern
