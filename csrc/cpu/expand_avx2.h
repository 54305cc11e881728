// Bytes of a mask expanded on AVX2, which has no such instruction: a byte is four rows by two inputs, and a table of
// shuffles puts the values behind it into eight lanes, lane 2 n + j = (row n, input j). Included after the target pragma;
// no STL here, as in linear_bitmap_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sparsekern {
namespace {

constexpr int kLanes = 8;
constexpr int kMaskBytes = 4;
constexpr int kTileFloats = kMaskBytes * kLanes;

constexpr uint8_t kZeroLane = 0x80;

// Which of the values behind a byte goes to each of its lanes.
struct Tables {
  alignas(64) uint8_t upper_words[256][kLanes * 4];  // of sixteen bits each, to the upper half of a dword
  alignas(64) uint8_t words[256][kLanes * 2];
  alignas(64) uint8_t dwords[256][kLanes];  // by number, negative where none

  constexpr Tables() : upper_words(), words(), dwords() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t next = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool kept = (byte >> lane & 1) != 0;
        const auto low = static_cast<uint8_t>(kept ? 2 * next : kZeroLane);
        const auto high = static_cast<uint8_t>(kept ? 2 * next + 1 : kZeroLane);
        upper_words[byte][4 * lane] = upper_words[byte][4 * lane + 1] = kZeroLane;
        upper_words[byte][4 * lane + 2] = words[byte][2 * lane] = low;
        upper_words[byte][4 * lane + 3] = words[byte][2 * lane + 1] = high;
        dwords[byte][lane] = kept ? next : kZeroLane;
        if (kept) ++next;
      }
    }
  }
};

constexpr Tables kTables;

// Byte `number` of a mask, times the 2^kShift bytes of a table's entry: a shift and an and.
template <int kShift>
inline uint32_t entry(uint32_t mask, int number) {
  const uint32_t shifted = number == 0 ? mask << kShift : mask >> (8 * number - kShift);
  return shifted & 0xffu << kShift;
}

constexpr int kWordsShift = 4, kUpperWordsShift = 5, kDwordsShift = 3;

inline __m128i expand_words(uint32_t mask, int byte, const uint16_t* values) {
  const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const uint8_t* lanes = kTables.words[0] + entry<kWordsShift>(mask, byte);
  return _mm_shuffle_epi8(next, _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
}

struct Bf16 {
  using Value = uint16_t;
  static constexpr int64_t kAtOnce = 3;

  // a bfloat16 is the upper half of a float32
  static __m256 expand(uint32_t mask, int byte, const Value* values) {
    const __m256i next = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const uint8_t* lanes = kTables.upper_words[0] + entry<kUpperWordsShift>(mask, byte);
    const __m256i wide = _mm256_shuffle_epi8(next, _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
    return _mm256_castsi256_ps(wide);
  }
  static __m256 widen(const Value* source) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  // to nearest, ties to even; rounding up the bits of a NaN could make it infinite
  static void narrow(__m256 wide, Value* target) {
    const __m256i bits = _mm256_castps_si256(wide);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(wide, wide, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(words));
  }
};

struct Fp16 {
  using Value = uint16_t;
  static constexpr int64_t kAtOnce = 3;

  static __m256 expand(uint32_t mask, int byte, const Value* values) {
    return _mm256_cvtph_ps(expand_words(mask, byte, values));
  }
  static __m256 widen(const Value* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static void narrow(__m256 wide, Value* target) {
    const __m128i halves = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), halves);
  }
};

inline __m256 expand_dwords(uint32_t mask, int byte, const void* values) {
  const uint8_t* numbers = kTables.dwords[0] + entry<kDwordsShift>(mask, byte);
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers)));
  const __m256 next = _mm256_loadu_ps(static_cast<const float*>(values));
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)), _mm256_permutevar8x32_ps(next, lanes));
}

struct Float32 {
  using Value = float;
  // its expansion needs a register more
  static constexpr int64_t kAtOnce = 2;

  static __m256 expand(uint32_t mask, int byte, const Value* values) { return expand_dwords(mask, byte, values); }
  static __m256 widen(const Value* source) { return _mm256_loadu_ps(source); }
  static void narrow(__m256 wide, Value* target) { _mm256_storeu_ps(target, wide); }
};

}  // namespace
}  // namespace sparsekern
