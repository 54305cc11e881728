// x as the products over panels read it: tokens in groups, within a group input pairs, [pairs, group, 2], so that a
// kernel reads one stream. Tokens and inputs that do not exist are zeros.
#pragma once

#include <cstring>

#include "../ops.h"
#include "float16.h"

namespace sparsekern {

// Two panels by twelve tokens are 24 sums, which leaves registers for the weights and for x.
constexpr int64_t kMaxGroup = 12;

// Up to kMaxGroup tokens are one group; more are shared out evenly, so that no group is much smaller than the others.
// Inlined always: a copy compiled for one instruction set could be the one that all others call.
struct Groups {
  int64_t tokens;
  int64_t count;

  [[gnu::always_inline]] explicit Groups(int64_t all) : tokens(all), count((all + kMaxGroup - 1) / kMaxGroup) {}

  // Even, but for a lone group of one or three; at most one token is padding, in a lone group.
  [[gnu::always_inline]] int64_t size(int64_t group) const {
    return count == 1 ? lone_size() : shared_out(group + 1) - shared_out(group);
  }
  [[gnu::always_inline]] int64_t first(int64_t group) const {
    return count == 1 ? group * lone_size() : shared_out(group);
  }

 private:
  [[gnu::always_inline]] int64_t lone_size() const { return tokens <= 4 ? tokens : (tokens + 1) / 2 * 2; }
  [[gnu::always_inline]] int64_t shared_out(int64_t group) const { return (tokens + 1) / 2 * group / count * 2; }
};

struct CopyFloat {
  using Source = float;
  using Target = float;
  static void pair(const Source* x, Target* target) { std::memcpy(target, x, 2 * sizeof(float)); }
};

struct CopyBf16 {
  using Source = uint16_t;
  using Target = uint16_t;
  static void pair(const Source* x, Target* target) { std::memcpy(target, x, 2 * sizeof(uint16_t)); }
};

struct WidenBf16 {
  using Source = uint16_t;
  using Target = float;
  static void pair(const Source* x, Target* target) {
    const uint32_t bits[2] = {static_cast<uint32_t>(x[0]) << 16, static_cast<uint32_t>(x[1]) << 16};
    std::memcpy(target, bits, sizeof bits);
  }
};

struct WidenFp16 {
  using Source = uint16_t;
  using Target = float;
  static void pair(const Source* x, Target* target) {
    target[0] = widen_half(x[0]);
    target[1] = widen_half(x[1]);
  }
};

// Input pairs first_pair to end_pair - 1 of every group.
template <class Convert>
void pack_pairs(const void* x, void* packed, const Groups& groups, int64_t in_features, int64_t pairs,
                int64_t first_pair, int64_t end_pair) {
  using Source = typename Convert::Source;
  // what is written several times, once a token, stays in L1
  constexpr int64_t kPairs = 256;
  const auto* source = static_cast<const Source*>(x);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t size = groups.size(group);
    auto* target = static_cast<typename Convert::Target*>(packed) + groups.first(group) * pairs * 2;
    for (int64_t begin = first_pair; begin < end_pair; begin += kPairs) {
      const int64_t end = begin + kPairs < end_pair ? begin + kPairs : end_pair;
      for (int64_t token = 0; token < size; ++token) {
        const bool inside = groups.first(group) + token < groups.tokens;
        const int64_t inputs = inside ? in_features : 0;
        const Source* row = source + (inside ? (groups.first(group) + token) * in_features : 0);
        const int64_t whole = end < inputs / 2 ? end : inputs / 2;
        int64_t pair = begin;
        for (; pair < whole; ++pair) Convert::pair(row + pair * 2, target + (pair * size + token) * 2);
        for (; pair < end; ++pair) {
          const Source last[2] = {pair * 2 < inputs ? row[pair * 2] : Source{}, Source{}};
          Convert::pair(last, target + (pair * size + token) * 2);
        }
      }
    }
  }
}

// x_type: that of the packed x; bfloat16 only for a bfloat16 x.
inline void pack_x(const void* x, DType dtype, void* packed, DType x_type, const Groups& groups, int64_t in_features,
                   int64_t pairs, int64_t first_pair, int64_t end_pair) {
  const auto pack = dtype == DType::kFloat32     ? pack_pairs<CopyFloat>
                    : dtype == DType::kFloat16   ? pack_pairs<WidenFp16>
                    : x_type == DType::kBFloat16 ? pack_pairs<CopyBf16>
                                                 : pack_pairs<WidenBf16>;
  pack(x, packed, groups, in_features, pairs, first_pair, end_pair);
}

}  // namespace sparsekern
