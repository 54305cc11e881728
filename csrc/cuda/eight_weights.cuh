// Eight neighbouring weights of a row, as the kernels that pack have them: loaded by one lane in 16 bytes at a time, a
// bit for each that is not zero, a look for what is not finite. What a weight means does not matter, only its bits:
// there is a form for weights of 2 bytes, two in a word, and one for weights of 4.
#pragma once

#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {

constexpr int kEights = 4;                         // of a lane: all loaded before the first is used
constexpr int kEightsApart = 32 * 8;               // weights from one of them to the lane's next
constexpr int kStretch = kEights * kEightsApart;  // neighbouring weights of a row that a warp has at once

template <int kBytes>
constexpr int kWordsOfEight = 2 * kBytes;
template <int kBytes>
constexpr uint32_t kSigns = kBytes == 2 ? 0x80008000 : 0x80000000;

inline int bytes_of(Float dtype) { return dtype == Float::kFloat32 ? 4 : 2; }

// What carries an infinity's magnitude, and nothing smaller, into the sign bit; for each weight of a word.
inline uint32_t to_sign(Float dtype) {
  return dtype == Float::kFloat32 ? 0x00800000 : dtype == Float::kFloat16 ? 0x04000400 : 0x00800080;
}

// Whether rows of `stride` weights begin on 16 bytes.
inline bool rows_on_16_bytes(const void* first, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride * bytes)) % 16 == 0;
}

// Eight weights at `from`, those that are not there as zeros.
//   kAligned  every row begins on 16 bytes and is a multiple of eight long: all eight are there or none
//   there     how many of them exist, more than 8 or fewer than 0 too
template <int kBytes, bool kAligned>
__device__ __forceinline__ void load_eight(uint32_t (&words)[kWordsOfEight<kBytes>], const void* from, int there) {
#pragma unroll
  for (int i = 0; i < kWordsOfEight<kBytes>; ++i) words[i] = 0;
  if constexpr (kAligned) {
    if (there <= 0) return;
#pragma unroll
    for (int i = 0; i < kBytes / 2; ++i) {
      uint32_t four[4];
      // of weights of 4 bytes a load takes half of what memory sends: the other half is to be found in L1
      if constexpr (kBytes == 2) ptx::load_once(four, from);
      else ptx::load(four, static_cast<const uint4*>(from) + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * i + j] = four[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= there) continue;
      if constexpr (kBytes == 4) words[i] = static_cast<const uint32_t*>(from)[i];
      else words[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16 * (i % 2);
    }
  }
}

// Writes eight weights, or as many as are there.
template <int kBytes, bool kAligned>
__device__ __forceinline__ void store_eight(void* to, const uint32_t (&words)[kWordsOfEight<kBytes>], int there) {
  if constexpr (kAligned) {
    if (there <= 0) return;
#pragma unroll
    for (int i = 0; i < kBytes / 2; ++i) {
      static_cast<uint4*>(to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= there) continue;
      if constexpr (kBytes == 4) static_cast<uint32_t*>(to)[i] = words[i];
      else static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    }
  }
}

// Bit i: weight i is not zero, of either sign.
template <int kBytes>
__device__ __forceinline__ uint32_t nonzero_bits(const uint32_t (&words)[kWordsOfEight<kBytes>]) {
  if constexpr (kBytes == 4) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= (words[i] << 1 != 0) << i;
    return bits;
  } else {
    // the top bit of each half says it: any magnitude but 0 carries into it
    uint32_t carried[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) carried[i] = (words[i] & 0x7fff7fff) + 0x7fff7fff;
    const uint32_t lower = ptx::prmt(carried[0], carried[1], 0x7531);
    const uint32_t upper = ptx::prmt(carried[2], carried[3], 0x7531);
    // byte i holds bits 0 and 4 for weights i and 4 + i, and the product puts byte i's bits at i and 4 + i of the top byte
    return ((lower >> 7 & 0x01010101) | (upper >> 3 & 0x10101010)) * 0x01020408u >> 24;
  }
}

// The weights of a word with -0.0 as +0.0.
template <int kBytes>
__device__ __forceinline__ uint32_t plus_zero(uint32_t word) {
  constexpr uint32_t kMagnitudes = ~kSigns<kBytes>;
  return word & (kMagnitudes | ((word & kMagnitudes) + kMagnitudes));
}

// A word whose sign bits are those of the weights that are infinite or NaN; its other bits say nothing.
template <int kBytes>
__device__ __forceinline__ uint32_t not_finite(uint32_t word, uint32_t to_sign) {
  return (word & ~kSigns<kBytes>) + to_sign;
}

// How many of eight weights are infinite or NaN.
template <int kBytes>
__device__ __forceinline__ int count_not_finite(const uint32_t (&words)[kWordsOfEight<kBytes>], uint32_t to_sign) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kWordsOfEight<kBytes>; ++i) count += __popc(not_finite<kBytes>(words[i], to_sign) & kSigns<kBytes>);
  return count;
}

}  // namespace sparsekern::cuda
