// pack_24: a dense 2:4 weight to values and metadata as formats/semi_structured.py has them, and back.
//
// A warp has a stretch of 1024 weights of one row, a lane four times eight neighbouring ones: 16 bytes of 2-byte weights
// are two groups, 8 bytes of values and a byte of metadata. Which of a group's weights are not zero is a number of four
// bits, which of them are kept is a table of sixteen entries, and lane i of each half warp holds entry i: a group costs a
// shuffle and a prmt. Every byte is read once and written once.

#include "eight_weights.cuh"
#include "groups_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kPackingBlocks = 3;  // on a multiprocessor at least: asked for more, the compiler spills
constexpr unsigned kAll = 0xffffffff;

// an entry: the selector of prmt that brings the two kept 2-byte weights together, the group's four bits of metadata,
// and whether there are too many
constexpr int kPositionsAt = 16;
constexpr int kCrowdedAt = 20;

// For the four bits of a group, one for each weight that is not zero: what is kept.
__device__ __forceinline__ uint32_t kept_of(unsigned nonzero) {
  // the last nonzero and, unless there are two above it, weight 0: the lowest free places are filled up
  const uint32_t second = nonzero & 8 ? 3 : nonzero & 4 ? 2 : 1;
  uint32_t first = 0;
  if ((nonzero & 1) == 0) {
    if ((nonzero & 2) && (nonzero & 12)) first = 1;
    if (nonzero == 12) first = 2;
  }
  const uint32_t selector = (0x10 + 0x22 * first) | (0x10 + 0x22 * second) << 8;
  const uint32_t crowded = __popc(nonzero) > 2;
  return selector | (first | second << 2) << kPositionsAt | crowded << kCrowdedAt;
}

// Where a lane's first eight weights stand, and how many weights its row has from there on, as far as that matters.
struct Place {
  int64_t row, column;
  int there;

  __device__ __forceinline__ Place(uint32_t stretch, uint32_t row_stretches, int64_t in_features) {
    row = stretch / row_stretches;
    column = static_cast<int64_t>(stretch % row_stretches) * kStretch + threadIdx.x % 32 * 8;
    there = static_cast<int>(min(in_features - column, static_cast<int64_t>(kStretch)));
  }
};

template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, kPackingBlocks) pack_24_kernel(
    const unsigned char* __restrict__ dense,  // [out_features, in_features]
    unsigned char* __restrict__ values,       // [out_features, in_features / 2]
    uint8_t* __restrict__ metadata,           // [out_features, row_bytes], two groups a byte
    unsigned long long* __restrict__ status,  // [3], see ops.h
    int64_t in_features, int64_t row_bytes, uint32_t stretches, uint32_t row_stretches, uint32_t to_sign,
    unsigned long long groups) {
  const uint32_t stretch = blockIdx.x * kWarps + threadIdx.x / 32;
  if (stretch >= stretches) return;
  const Place place(stretch, row_stretches, in_features);
  const int64_t at = place.row * in_features + place.column;
  // of metadata a row has up to one byte more than it has eights
  const int bytes_there = static_cast<int>(min(row_bytes - place.column / 8, static_cast<int64_t>(kStretch)));

  uint32_t words[kEights][kWordsOfEight<kBytes>];
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int ahead = e * kEightsApart;
    load_eight<kBytes, kAligned>(words[e], dense + (at + ahead) * kBytes, place.there - ahead);
  }

  const uint32_t kept = kept_of(threadIdx.x % 16);
  unsigned char* values_write = values + at / 2 * kBytes;
  uint8_t* metadata_write = metadata + place.row * row_bytes + place.column / 8;
  uint32_t wrong = 0, crowded = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int there = place.there - e * kEightsApart;
    const uint32_t nonzero = nonzero_bits<kBytes>(words[e]);
    const uint32_t entries[2] = {__shfl_sync(kAll, kept, static_cast<int>(nonzero), 16),
                                 __shfl_sync(kAll, kept, static_cast<int>(nonzero >> 4), 16)};
    uint32_t pairs[2][kBytes / 2];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t* group = words[e] + g * kBytes;
#pragma unroll
      for (int i = 0; i < kBytes; ++i) wrong |= not_finite<kBytes>(group[i], to_sign);
      if constexpr (kBytes == 2) {
        pairs[g][0] = plus_zero<2>(ptx::prmt(group[0], group[1], entries[g]));
      } else {
        const uint32_t first = entries[g] >> kPositionsAt & 3, second = entries[g] >> (kPositionsAt + 2) & 3;
        pairs[g][0] = plus_zero<4>(first == 0 ? group[0] : first == 1 ? group[1] : group[2]);
        pairs[g][1] = plus_zero<4>(second == 1 ? group[1] : second == 2 ? group[2] : group[3]);
      }
      crowded |= entries[g];
    }
    if (e * 32 < bytes_there) {
      // a group behind the last weight keeps 0 and 1, as every empty one does
      metadata_write[e * 32] =
          static_cast<uint8_t>((entries[0] >> kPositionsAt & 15) | (entries[1] >> (kPositionsAt - 4) & 0xf0));
    }
    unsigned char* to = values_write + e * (kEightsApart / 2) * kBytes;
    if constexpr (kAligned) {
      if (there <= 0) continue;
      if constexpr (kBytes == 2) *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0][0], pairs[1][0]);
      else *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        if (i / (kBytes / 2) * 4 < there) reinterpret_cast<uint32_t*>(to)[i] = pairs[i / (kBytes / 2)][i % (kBytes / 2)];
      }
    }
  }

  // what is refused costs what it costs
  if (wrong & kSigns<kBytes>) {
    int count = 0;
#pragma unroll
    for (const auto& eight : words) count += count_not_finite<kBytes>(eight, to_sign);
    atomicAdd(status, static_cast<unsigned long long>(count));
  }
  if (crowded >> kCrowdedAt) {
    int count = 0;
    int64_t first = 0;
#pragma unroll
    for (int i = 2 * kEights - 1; i >= 0; --i) {
      if (__popc(nonzero_bits<kBytes>(words[i / 2]) >> i % 2 * 4 & 15) <= 2) continue;
      ++count;
      first = (at + i / 2 * kEightsApart) / 4 + i % 2;
    }
    atomicAdd(status + 1, static_cast<unsigned long long>(count));
    atomicMax(status + 2, groups - static_cast<unsigned long long>(first));
  }
}

template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) unpack_24_kernel(
    const unsigned char* __restrict__ values,  // [out_features, in_features / 2]
    const uint8_t* __restrict__ metadata,      // [out_features, row_bytes], two groups a byte
    unsigned char* __restrict__ dense,         // [out_features, in_features]
    unsigned long long* __restrict__ status,   // [1], see ops.h
    int64_t in_features, int64_t row_bytes, uint32_t stretches, uint32_t row_stretches) {
  const uint32_t stretch = blockIdx.x * kWarps + threadIdx.x / 32;
  if (stretch >= stretches) return;
  const Place place(stretch, row_stretches, in_features);
  const int64_t at = place.row * in_features + place.column;
  const int bytes_there = static_cast<int>(min(row_bytes - place.column / 8, static_cast<int64_t>(kStretch)));

  const unsigned char* values_read = values + at / 2 * kBytes;
  const uint8_t* metadata_read = metadata + place.row * row_bytes + place.column / 8;
  uint32_t four[kEights][kBytes], positions = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int there = place.there - e * kEightsApart;
    const unsigned char* from = values_read + e * (kEightsApart / 2) * kBytes;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) four[e][i] = 0;
    if constexpr (kAligned) {
      if (there > 0) ptx::load_once(four[e], from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (2 * i >= there) continue;
        if constexpr (kBytes == 4) four[e][i] = reinterpret_cast<const uint32_t*>(from)[i];
        else four[e][i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i]) << 16 * (i % 2);
      }
    }
    const uint32_t both = e * 32 < bytes_there ? metadata_read[e * 32] : 0x44;
    positions |= both << 8 * e;
  }

  bool wrong = falls(positions);
  const uint32_t places = places_of(threadIdx.x % 16);
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int there = place.there - e * kEightsApart;
    const uint32_t both = positions >> 8 * e & 0xff;
    // groups behind the last weight keep 0 and 1
    if (there < 8) wrong |= there < 4 ? both != 0x44 : both >> 4 != 4;
    uint32_t words[kWordsOfEight<kBytes>];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if constexpr (kBytes == 2) {
        const uint32_t selectors = __shfl_sync(kAll, places, static_cast<int>(both >> 4 * g), 16);
        words[2 * g] = ptx::prmt(four[e][g], 0, selectors);
        words[2 * g + 1] = ptx::prmt(four[e][g], 0, selectors >> 16);
      } else {
        const uint32_t first = both >> 4 * g & 3, second = both >> (4 * g + 2) & 3;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          words[4 * g + i] = first == i ? four[e][2 * g] : second == i ? four[e][2 * g + 1] : 0;
        }
      }
    }
    store_eight<kBytes, kAligned>(dense + (at + e * kEightsApart) * kBytes, words, there);
  }
  // whoever finds something says the same
  if (wrong) *status = 1;
}

// How the rows are cut into stretches, a warp each; false where there are more than a launch can count.
struct Stretches {
  uint32_t of_row, all;
  unsigned blocks;

  bool count(int64_t out_features, int64_t in_features) {
    const int64_t of_a_row = (in_features + kStretch - 1) / kStretch;
    int64_t of_all;
    if (__builtin_mul_overflow(out_features, of_a_row, &of_all) || of_all > INT32_MAX) return false;
    of_row = static_cast<uint32_t>(of_a_row);
    all = static_cast<uint32_t>(of_all);
    blocks = (all + kWarps - 1) / kWarps;
    return true;
  }
};

template <int kBytes>
cudaError_t pack(const void* dense, Float dtype, void* values, int16_t* metadata, uint64_t* status,
                 int64_t out_features, int64_t in_features, cudaStream_t stream) {
  Stretches stretches;
  if (!stretches.count(out_features, in_features)) return cudaErrorInvalidValue;
  if (stretches.all == 0) return cudaSuccess;
  const bool aligned = in_features % 8 == 0 && rows_on_16_bytes(dense, in_features, kBytes) &&
                       reinterpret_cast<uintptr_t>(values) % 16 == 0;
  return launch(aligned ? pack_24_kernel<kBytes, true> : pack_24_kernel<kBytes, false>, stretches.blocks, 32 * kWarps, 0, stream,
                static_cast<const unsigned char*>(dense), static_cast<unsigned char*>(values),
                reinterpret_cast<uint8_t*>(metadata), reinterpret_cast<unsigned long long*>(status), in_features,
                (in_features + 15) / 16 * 2, stretches.all, stretches.of_row, to_sign(dtype),
                static_cast<unsigned long long>(out_features * (in_features / 4)));
}

template <int kBytes>
cudaError_t unpack(const void* values, const int16_t* metadata, void* dense, uint64_t* status, int64_t out_features,
                   int64_t in_features, cudaStream_t stream) {
  Stretches stretches;
  if (!stretches.count(out_features, in_features)) return cudaErrorInvalidValue;
  if (stretches.all == 0) return cudaSuccess;
  const bool aligned = in_features % 8 == 0 && rows_on_16_bytes(dense, in_features, kBytes) &&
                       reinterpret_cast<uintptr_t>(values) % 16 == 0;
  return launch(aligned ? unpack_24_kernel<kBytes, true> : unpack_24_kernel<kBytes, false>, stretches.blocks, 32 * kWarps, 0, stream,
                static_cast<const unsigned char*>(values), reinterpret_cast<const uint8_t*>(metadata),
                static_cast<unsigned char*>(dense), reinterpret_cast<unsigned long long*>(status), in_features,
                (in_features + 15) / 16 * 2, stretches.all, stretches.of_row);
}

}  // namespace

cudaError_t pack_24(const void* dense, Float dtype, void* values, int16_t* metadata, uint64_t* status,
                    int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return (bytes_of(dtype) == 4 ? pack<4> : pack<2>)(dense, dtype, values, metadata, status, out_features, in_features,
                                                    stream);
}

cudaError_t unpack_24(const void* values, Float dtype, const int16_t* metadata, void* dense, uint64_t* status,
                      int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return (bytes_of(dtype) == 4 ? unpack<4> : unpack<2>)(values, metadata, dense, status, out_features, in_features,
                                                        stream);
}

}  // namespace sparsekern::cuda
