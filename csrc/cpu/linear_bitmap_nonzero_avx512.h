// linear_bitmap without the arithmetic of the zeros, on AVX-512: x packed with tokens as lanes, and the blocks of a
// panel expanded with the kept steps of each row. Included by one file an instruction set, after its target pragma and
// after the expand_words of that set. No STL here, as in panel_kinds_avx512.h.
#pragma once

#include "linear_bitmap_avx512.h"
#include "linear_bitmap_nonzero.h"
#include "nonzero_product_avx512.h"

namespace sparsekern {
namespace {

// Two bfloat16 inputs a step: tiles are stored as they are expanded.
struct PairTiles {
  static constexpr int64_t kBlockSteps = kBlockMasks;
  template <class Kind>
  static void store(Tile<1> tile, uint32_t* block, int64_t mask) {
    _mm512_store_si512(block + mask * kPanelRows, tile.part[0]);
  }
};

// One input a step, of each block of kBlockInputs first the even, then the odd ones.
struct SingleTiles {
  static constexpr int64_t kBlockSteps = kBlockInputs;
  static void store(__m512 even, __m512 odd, uint32_t* block, int64_t mask) {
    _mm512_store_ps(block + mask * kPanelRows, even);
    _mm512_store_ps(block + (kBlockMasks + mask) * kPanelRows, odd);
  }
  // dwords of both inputs
  template <class Kind>
  static void store(Tile<1> tile, uint32_t* block, int64_t mask) {
    const auto weights = Kind::weights(tile);
    store(weights.even, weights.odd, block, mask);
  }
  // rows 0 to 7 and 8 to 15, lane 2 n + j = (row n, input j)
  template <class Kind>
  static void store(Tile<2> tile, uint32_t* block, int64_t mask) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const auto weights = Kind::weights(tile);
    store(_mm512_permutex2var_ps(weights.low, even, weights.high),
          _mm512_permutex2var_ps(weights.low, odd, weights.high), block, mask);
  }
};

// Bytes 4 i + b of four registers of masks to register b, byte i: bits 2 n and 2 n + 1 of a mask are those of row n.
inline void transpose_masks(__m512i* masks) {
  const __m512i by_byte =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i by_lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) masks[i] = _mm512_permutexvar_epi32(by_lane, _mm512_shuffle_epi8(masks[i], by_byte));
  const __m512i low_first = _mm512_shuffle_i32x4(masks[0], masks[1], 0x44);
  const __m512i high_first = _mm512_shuffle_i32x4(masks[0], masks[1], 0xee);
  const __m512i low_second = _mm512_shuffle_i32x4(masks[2], masks[3], 0x44);
  const __m512i high_second = _mm512_shuffle_i32x4(masks[2], masks[3], 0xee);
  masks[0] = _mm512_shuffle_i32x4(low_first, low_second, 0x88);
  masks[1] = _mm512_shuffle_i32x4(low_first, low_second, 0xdd);
  masks[2] = _mm512_shuffle_i32x4(high_first, high_second, 0x88);
  masks[3] = _mm512_shuffle_i32x4(high_first, high_second, 0xdd);
}

// kept[row], bit i: whether the row has one of the bits of mask i; pairs.
inline void kept_steps(PairTiles, __m512i* masks, uint64_t* kept) {
  transpose_masks(masks);
#pragma GCC unroll 16
  for (int row = 0; row < kPanelRows; ++row) {
    const __m512i bits = _mm512_set1_epi8(static_cast<char>(3 << (row % 4 * 2)));
    kept[row] = _mm512_test_epi8_mask(masks[row / 4], bits);
  }
}

// The same of two registers of masks, in the order of SingleTiles.
inline void kept_steps(SingleTiles, __m512i* masks, uint64_t* kept) {
  masks[2] = masks[1];
  masks[3] = masks[1];
  masks[1] = masks[0];
  transpose_masks(masks);
  // lanes of even and of odd inputs
  const __m512i even_or_odd = _mm512_setr_epi64(0x0101010101010101, 0x0101010101010101, 0x0202020202020202,
                                                0x0202020202020202, 0x0101010101010101, 0x0101010101010101,
                                                0x0202020202020202, 0x0202020202020202);
#pragma GCC unroll 16
  for (int row = 0; row < kPanelRows; ++row) {
    const __m512i bits = _mm512_slli_epi64(even_or_odd, static_cast<unsigned>(row % 4 * 2));
    kept[row] = _mm512_test_epi8_mask(masks[row / 4], bits);
  }
}

template <class TileKind, class TileMath, class Tiles>
struct NonzeroBitmap {
  using Kind = TileKind;
  using Math = TileMath;
  using Value = typename Kind::Value;
  static constexpr int64_t kBlocks = kNonzeroSteps / Tiles::kBlockSteps;
  static_assert(Math::kInputs == kBlocks * kBlockInputs, "a tile is whole blocks");

  struct Cursor {
    const uint32_t* masks;
    const uint32_t* masks_end;
    const Value* values;
    const Value* end;
    int64_t tile_bytes;  // of the values of a tile, on average

    Streams streams() const {
      return {{reinterpret_cast<const char*>(values), reinterpret_cast<const char*>(masks)},
              {tile_bytes / 64 + 2, kBlocks}};
    }
    void expand(NonzeroTile& tile) {
      const int64_t left = (masks_end - masks) / kBlockMasks, blocks = left < kBlocks ? left : kBlocks;
      __m512i bits[4];
#pragma GCC unroll 4
      for (int64_t block = 0; block < kBlocks; ++block) {
        bits[block] = block < blocks ? _mm512_loadu_si512(masks + block * kBlockMasks) : _mm512_setzero_si512();
      }
      kept_steps(Tiles{}, bits, tile.kept);
      uint32_t* words = tile.words;
      for (int64_t block = 0; block < blocks; ++block, words += Tiles::kBlockSteps * kPanelRows) {
        for (int64_t first = 0; first < kBlockMasks; first += kSteps) {
          // masks that lie: see kTailBytes
          values = values < end ? values : end;
          uint64_t two[kSteps / 2];
          __builtin_memcpy(two, masks, sizeof two);
          masks += kSteps;
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i) {
            const auto mask = static_cast<uint32_t>(two[i / 2] >> (i % 2 * 32));
            Tiles::template store<Kind>(expand_mask(Kind{}, mask, values), words, first + i);
            values += __builtin_popcount(mask);
          }
        }
      }
    }
  };

  const BitmapWeight& weight;

  double kept_share() const { return sparsekern::kept_share(weight); }
  Cursor cursor(int64_t panel) const {
    const auto* values = static_cast<const Value*>(weight.values);
    const int64_t blocks = block_count(weight);
    const int64_t first = weight.panel_offsets[panel], end = weight.panel_offsets[panel + 1];
    const uint32_t* masks = weight.masks + panel * blocks * kBlockMasks;
    const int64_t bytes = (end - first) * static_cast<int64_t>(sizeof(Value));
    return {masks, masks + blocks * kBlockMasks, values + first, values + end, bytes * kBlocks / blocks};
  }
};

inline __mmask16 lanes_inside(int64_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(count < 0 ? 0 : count < 16 ? count : 16)));
}

// How x is read: 16 dwords of one token, zeros from `inputs` on; and of the bits of many such, or'ed where an exponent
// is all ones, whether there was one.
struct BFloat16Pairs {
  using Value = uint16_t;
  static constexpr int64_t kInputs = 32;
  static constexpr int64_t step(int64_t input) { return input / 2; }
  static __m512i load(const Value* x, int64_t inputs) {
    const auto inside = _bzhi_u32(~0u, static_cast<unsigned>(inputs < 0 ? 0 : inputs < 32 ? inputs : 32));
    return _mm512_maskz_loadu_epi16(inside, x);
  }
  static bool not_finite(__m512i x) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent) != 0;
  }
};

// One input to a dword, as float32. Of a block of kBlockInputs the even inputs are the first steps.
template <class TypeOfValue>
struct Singles {
  using Value = TypeOfValue;
  static constexpr int64_t kInputs = 16;
  static constexpr int64_t step(int64_t input) { return input % kBlockInputs / 2 + input % 2 * kBlockMasks; }
  static bool not_finite(__m512i x) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(x, exponent), exponent) != 0;
  }
};

struct Float32Singles : Singles<float> {
  static __m512i load(const float* x, int64_t inputs) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes_inside(inputs), x));
  }
};

struct Float16Singles : Singles<uint16_t> {
  static __m512i load(const uint16_t* x, int64_t inputs) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_inside(inputs), x)));
  }
};

struct BFloat16Singles : Singles<uint16_t> {
  static __m512i load(const uint16_t* x, int64_t inputs) {
    const __m256i words = _mm256_maskz_loadu_epi16(lanes_inside(inputs), x);
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
  }
};

template <class X>
bool pack_nonzero_x(const NonzeroX& x, const TokenBlocks& blocks, int64_t first_tile, int64_t end_tile) {
  const auto* source = static_cast<const typename X::Value*>(x.x);
  // dwords of a block of inputs
  constexpr int64_t kBlockSteps = kBlockInputs * 16 / X::kInputs;
  const int64_t tiles = divide_up(x.in_features, kNonzeroSteps / kBlockSteps * kBlockInputs);
  bool finite = true;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t size = blocks.size(block), first = blocks.first_vector(block);
    for (int64_t v = 0; v < size; ++v) {
      // sixteen streams are read
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        uint32_t* target = x.packed + (first * tiles + tile * size) * kNonzeroSteps * kLaneTokens;
        for (int64_t dwords = 0; dwords < kNonzeroSteps; dwords += 16) {
          const int64_t input = (tile * kNonzeroSteps + dwords) * X::kInputs / 16;
          __m512i square[kLaneTokens];
          for (int64_t token = 0; token < kLaneTokens; ++token) {
            const int64_t row = (first + v) * kLaneTokens + token;
            const int64_t inputs = row < blocks.tokens ? x.in_features - input : 0;
            square[token] = inputs > 0 ? X::load(source + row * x.in_features + input, inputs) : _mm512_setzero_si512();
            finite = finite && !X::not_finite(square[token]);
          }
          transpose_dwords(square);
          const int64_t block_step = dwords / kBlockSteps * kBlockSteps;
          for (int64_t i = 0; i < 16; ++i) {
            const int64_t step = block_step + X::step(dwords % kBlockSteps * X::kInputs / 16 + i * X::kInputs / 16);
            _mm512_store_si512(target + (step * size + v) * kLaneTokens, square[i]);
          }
        }
      }
    }
  }
  return finite;
}

template <class TileKind, class Tiles, class Math>
void nonzero_linear(const BitmapWeight& weight, const uint32_t* x, const TokenBlocks& blocks, const void* bias, void* y,
                    int64_t first_panel, int64_t end_panel, NonzeroScratch& scratch) {
  const Outputs<TileKind> outputs{bias, y, weight.out_features};
  nonzero_panels(NonzeroBitmap<TileKind, Math, Tiles>{weight}, weight.in_features, x, blocks, outputs, first_panel,
                 end_panel, scratch);
}

inline bool pack_singles(const NonzeroX& x, DType dtype, const TokenBlocks& blocks, int64_t first_tile,
                         int64_t end_tile) {
  const auto pack = dtype == DType::kBFloat16  ? pack_nonzero_x<BFloat16Singles>
                    : dtype == DType::kFloat16 ? pack_nonzero_x<Float16Singles>
                                               : pack_nonzero_x<Float32Singles>;
  return pack(x, blocks, first_tile, end_tile);
}

inline void linear_singles(const BitmapWeight& weight, const uint32_t* x, const TokenBlocks& blocks, const void* bias,
                           void* y, int64_t first_panel, int64_t end_panel, NonzeroScratch& scratch) {
  const auto run = weight.dtype == DType::kBFloat16  ? nonzero_linear<Bf16ByFma, SingleTiles, SingleSteps>
                   : weight.dtype == DType::kFloat16 ? nonzero_linear<Float16ByFma, SingleTiles, SingleSteps>
                                                     : nonzero_linear<Float32ByFma, SingleTiles, SingleSteps>;
  run(weight, x, blocks, bias, y, first_panel, end_panel, scratch);
}

}  // namespace
}  // namespace sparsekern
