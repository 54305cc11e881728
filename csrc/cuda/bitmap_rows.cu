// bitmap_rows: a dense weight to a bitmap as formats/bitmap.py has it, and back.
//
// A block has a row, and goes along it 1024 weights a warp at a time; a lane has four times eight neighbouring ones: 16
// bytes of 2-byte weights and a byte of bits. Packing reads the weight twice: bits and counts first, then, when the rows'
// offsets are known, the values. The second kernel goes from the last row to the first, so that what it begins with is
// what the first one left in L2. Where a lane's kept values stand follows from a sum over the warp, of the counts of all
// four eights at once, and one over the block's warps. Values pass through shared memory, which takes them one at a time;
// to and from global memory they go in 16 bytes.

#include "eight_weights.cuh"

namespace sparsekern::cuda {
namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kMostWarps = 4;
constexpr int kCountBytes = 4 * kMostWarps;  // of shared memory, before the values

// A lane's bits of its four eights, a byte each.
__device__ __forceinline__ uint32_t load_bits(const uint8_t* row_bits, int64_t byte, int64_t row_bytes) {
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    if (byte + e * 32 < row_bytes) bits |= static_cast<uint32_t>(row_bits[byte + e * 32]) << 8 * e;
  }
  return bits;
}

// How many of the block's weights are kept before each of this lane's eights, and how many in all.
//   bits   the lane's
//   total  of the block
__device__ __forceinline__ void count_before(int (&before)[kEights], int& total, uint32_t bits) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // ones of each byte
  uint32_t counts = bits - (bits >> 1 & 0x55555555);
  counts = (counts & 0x33333333) + (counts >> 2 & 0x33333333);
  counts = (counts + (counts >> 4)) & 0x0f0f0f0f;
  // of the lanes before: at most 31 * 8 in a byte, so that none overflows
  uint32_t below = __shfl_up_sync(kAll, counts, 1);
  if (lane == 0) below = 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t more = __shfl_up_sync(kAll, below, distance);
    if (lane >= distance) below += more;
  }
  const uint32_t last_below = __shfl_sync(kAll, below, 31), last = __shfl_sync(kAll, counts, 31);
  int of_warp = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    before[e] = of_warp + (below >> 8 * e & 0xff);
    of_warp += (last_below >> 8 * e & 0xff) + (last >> 8 * e & 0xff);
  }
  if (lane == 0) reinterpret_cast<int*>(ptx::shared_memory())[warp] = of_warp;
  __syncthreads();
  const int4 all = *reinterpret_cast<const int4*>(ptx::shared_memory());
  const int of_each[kMostWarps] = {all.x, all.y, all.z, all.w};
  int of_lower = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kMostWarps; ++w) {
    if (w == warp) of_lower = total;
    // a short row has fewer warps, and nothing where theirs would be
    if (w < static_cast<int>(blockDim.x) / 32) total += of_each[w];
  }
#pragma unroll
  for (int e = 0; e < kEights; ++e) before[e] += of_lower;
}

template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(32 * kMostWarps) bitmap_bits_kernel(
    const unsigned char* __restrict__ dense,  // [out_features, in_features], rows `stride` weights apart
    int64_t stride,
    uint8_t* __restrict__ bitmap,             // [out_features, row_bytes]
    int64_t* __restrict__ counts,             // [out_features]
    unsigned long long* __restrict__ status,  // [2], see ops.h
    int64_t in_features, int64_t row_bytes, uint32_t to_sign) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  const unsigned char* dense_read = dense + row * stride * kBytes;
  uint8_t* bitmap_write = bitmap + row * row_bytes;
  unsigned kept = 0;
  for (int64_t column = warp * kStretch + lane * 8; column < in_features + lane * 8;
       column += blockDim.x / 32 * kStretch) {
    const int there = static_cast<int>(min(in_features - column, static_cast<int64_t>(kStretch)));
    uint32_t words[kEights][kWordsOfEight<kBytes>], bits = 0, wrong = 0;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      load_eight<kBytes, kAligned>(words[e], dense_read + (column + e * kEightsApart) * kBytes,
                                   there - e * kEightsApart);
    }
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const uint32_t nonzero = nonzero_bits<kBytes>(words[e]);
#pragma unroll
      for (const uint32_t word : words[e]) wrong |= not_finite<kBytes>(word, to_sign);
      if (there > e * kEightsApart) bitmap_write[column / 8 + e * 32] = static_cast<uint8_t>(nonzero);
      bits |= nonzero << 8 * e;
    }
    kept += __popc(bits);
    if (wrong & kSigns<kBytes>) {
      int count = 0, first = 0;
#pragma unroll
      for (int e = kEights - 1; e >= 0; --e) {
        const int here = count_not_finite<kBytes>(words[e], to_sign);
        count += here;
        if (here != 0) first = e;
      }
      atomicAdd(status, static_cast<unsigned long long>(count));
      // the eight that holds the first one: which of them it is, is seen there
      atomicMax(status + 1, static_cast<unsigned long long>((gridDim.x - row) * row_bytes) -
                                static_cast<unsigned long long>(column / 8 + first * 32));
    }
  }
  kept = __reduce_add_sync(kAll, kept);
  auto* kept_smem = reinterpret_cast<unsigned*>(ptx::shared_memory());
  if (lane == 0) kept_smem[warp] = kept;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t of_row = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) of_row += kept_smem[w];
  counts[row] = of_row;
}

template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(32 * kMostWarps) bitmap_values_kernel(
    const unsigned char* __restrict__ dense,  // [out_features, in_features], rows `stride` weights apart
    int64_t stride,
    const uint8_t* __restrict__ bitmap,       // [out_features, row_bytes]
    const int64_t* __restrict__ row_offsets,  // [out_features + 1]
    unsigned char* __restrict__ values,       // [kept]
    int64_t kept, int64_t in_features, int64_t row_bytes) {
  constexpr int kVector = 16 / kBytes;  // values
  using Value = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = gridDim.x - 1 - blockIdx.x;
  const unsigned char* dense_read = dense + row * stride * kBytes;
  auto* values_smem = reinterpret_cast<Value*>(ptx::shared_memory() + kCountBytes);
  int64_t offset = row_offsets[row];
  for (int64_t begin = 0; begin < in_features; begin += blockDim.x / 32 * kStretch) {
    const int64_t column = begin + warp * kStretch + lane * 8;
    const int there = static_cast<int>(min(in_features - column, static_cast<int64_t>(kStretch)));
    uint32_t words[kEights][kWordsOfEight<kBytes>];
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      load_eight<kBytes, kAligned>(words[e], dense_read + (column + e * kEightsApart) * kBytes,
                                   there - e * kEightsApart);
    }
    const uint32_t bits = load_bits(bitmap + row * row_bytes, column / 8, row_bytes);
    int before[kEights], count;
    count_before(before, count, bits);
    // in shared memory values lie as they will on 16 bytes
    const int shift = static_cast<int>((reinterpret_cast<uintptr_t>(values) / kBytes + offset) % kVector);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      Value* write = values_smem + shift + before[e];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((bits >> (8 * e + i) & 1) == 0) continue;
        *write++ = static_cast<Value>(kBytes == 4 ? words[e][i] : words[e][i / 2] >> 16 * (i % 2));
      }
    }
    __syncthreads();
    // offsets that lie lead nowhere
    if (offset >= 0 && offset <= kept - count) {
      auto* to = reinterpret_cast<Value*>(values) + offset - shift;
#pragma unroll 1
      for (int at = threadIdx.x * kVector; at < shift + count; at += blockDim.x * kVector) {
        if (at >= shift && at + kVector <= shift + count) {
          *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(values_smem + at);
          continue;
        }
#pragma unroll 1
        for (int i = max(at, shift); i < min(at + kVector, shift + count); ++i) to[i] = values_smem[i];
      }
    }
    offset += count;
  }
}

template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(32 * kMostWarps) bitmap_to_dense_kernel(
    const unsigned char* __restrict__ values,  // [kept]
    const uint8_t* __restrict__ bitmap,        // [out_features, row_bytes]
    const int64_t* __restrict__ row_offsets,   // [out_features + 1]
    unsigned char* __restrict__ dense,         // [out_features, in_features]
    unsigned long long* __restrict__ status,   // [1], see ops.h
    int64_t kept, int64_t in_features, int64_t row_bytes) {
  constexpr int kVector = 16 / kBytes;  // values
  using Value = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  unsigned char* dense_write = dense + row * in_features * kBytes;
  auto* values_smem = reinterpret_cast<Value*>(ptx::shared_memory() + kCountBytes);
  int64_t offset = row_offsets[row];
  bool wrong = (row == 0 && offset != 0) || (row == gridDim.x - 1 && row_offsets[row + 1] != kept);
  for (int64_t begin = 0; begin < in_features; begin += blockDim.x / 32 * kStretch) {
    const int64_t column = begin + warp * kStretch + lane * 8;
    const int there = static_cast<int>(min(in_features - column, static_cast<int64_t>(kStretch)));
    const uint32_t bits = load_bits(bitmap + row * row_bytes, column / 8, row_bytes);
    int before[kEights], count;
    count_before(before, count, bits);
    const int shift = static_cast<int>((reinterpret_cast<uintptr_t>(values) / kBytes + offset) % kVector);
    // offsets that lie lead nowhere
    const bool inside = offset >= 0 && offset <= kept - count;
    const uint32_t readable = inside ? bits : 0;
    if (inside) {
      const auto* from = reinterpret_cast<const Value*>(values) + offset - shift;
#pragma unroll 1
      for (int at = threadIdx.x * kVector; at < shift + count; at += blockDim.x * kVector) {
        if (at >= shift && at + kVector <= shift + count) {
          uint32_t vector[4];
          ptx::load_once(vector, from + at);
          *reinterpret_cast<uint4*>(values_smem + at) = make_uint4(vector[0], vector[1], vector[2], vector[3]);
          continue;
        }
#pragma unroll 1
        for (int i = max(at, shift); i < min(at + kVector, shift + count); ++i) values_smem[i] = from[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int left = there - e * kEightsApart;
      // a bit behind the last input
      if (left < 8) wrong |= (bits >> 8 * e & 0xff) >> max(left, 0) != 0;
      uint32_t words[kWordsOfEight<kBytes>];
      const Value* read = values_smem + shift + before[e];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t value = 0;
        if (readable >> (8 * e + i) & 1) value = *read++;
        if constexpr (kBytes == 4) words[i] = value;
        else words[i / 2] = i % 2 == 0 ? value : words[i / 2] | value << 16;
      }
      store_eight<kBytes, kAligned>(dense_write + (column + e * kEightsApart) * kBytes, words, left);
    }
    wrong |= !inside;
    offset += count;
  }
  // whoever finds something says the same
  if (wrong || offset != row_offsets[row + 1]) *status = 1;
}

unsigned threads_for(int64_t in_features) {
  const int64_t warps = (in_features + kStretch - 1) / kStretch;
  return 32 * static_cast<unsigned>(warps < 1 ? 1 : warps < kMostWarps ? warps : kMostWarps);
}

// of shared memory: the warps' counts, and what a block keeps of a stretch, shifted by less than 16 bytes
size_t shared_bytes(unsigned threads, int bytes) { return kCountBytes + threads * (kStretch / 32) * bytes + 16; }

bool launchable(int64_t out_features, int64_t in_features) {
  return out_features <= INT32_MAX && in_features <= INT32_MAX;
}

template <int kBytes>
cudaError_t bits(const void* dense, int64_t stride, Float dtype, uint8_t* bitmap, int64_t* counts, uint64_t* status,
                 int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (!launchable(out_features, in_features)) return cudaErrorInvalidValue;
  if (out_features == 0) return cudaSuccess;
  const bool aligned = in_features % 8 == 0 && rows_on_16_bytes(dense, stride, kBytes);
  return launch(aligned ? bitmap_bits_kernel<kBytes, true> : bitmap_bits_kernel<kBytes, false>,
                static_cast<unsigned>(out_features), threads_for(in_features), kCountBytes, stream,
                static_cast<const unsigned char*>(dense), stride, bitmap, counts,
                reinterpret_cast<unsigned long long*>(status), in_features, (in_features + 7) / 8, to_sign(dtype));
}

template <int kBytes>
cudaError_t values(const void* dense, int64_t stride, const uint8_t* bitmap, const int64_t* row_offsets, void* values,
                   int64_t kept, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (!launchable(out_features, in_features)) return cudaErrorInvalidValue;
  if (out_features == 0 || in_features == 0) return cudaSuccess;
  const bool aligned = in_features % 8 == 0 && rows_on_16_bytes(dense, stride, kBytes);
  const unsigned threads = threads_for(in_features);
  return launch(aligned ? bitmap_values_kernel<kBytes, true> : bitmap_values_kernel<kBytes, false>,
                static_cast<unsigned>(out_features), threads, shared_bytes(threads, kBytes), stream,
                static_cast<const unsigned char*>(dense), stride, bitmap, row_offsets,
                static_cast<unsigned char*>(values), kept, in_features, (in_features + 7) / 8);
}

template <int kBytes>
cudaError_t to_dense(const void* values, int64_t kept, const uint8_t* bitmap, const int64_t* row_offsets, void* dense,
                     uint64_t* status, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (!launchable(out_features, in_features)) return cudaErrorInvalidValue;
  if (out_features == 0) return cudaSuccess;
  const bool aligned = in_features % 8 == 0 && rows_on_16_bytes(dense, in_features, kBytes);
  const unsigned threads = threads_for(in_features);
  return launch(aligned ? bitmap_to_dense_kernel<kBytes, true> : bitmap_to_dense_kernel<kBytes, false>,
                static_cast<unsigned>(out_features), threads, shared_bytes(threads, kBytes), stream,
                static_cast<const unsigned char*>(values), bitmap, row_offsets, static_cast<unsigned char*>(dense),
                reinterpret_cast<unsigned long long*>(status), kept, in_features, (in_features + 7) / 8);
}

}  // namespace

cudaError_t bitmap_bits(const void* dense, int64_t stride, Float dtype, uint8_t* bitmap, int64_t* counts,
                        uint64_t* status, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return (bytes_of(dtype) == 4 ? bits<4> : bits<2>)(dense, stride, dtype, bitmap, counts, status, out_features,
                                                    in_features, stream);
}

cudaError_t bitmap_values(const void* dense, int64_t stride, Float dtype, const uint8_t* bitmap,
                          const int64_t* row_offsets, void* to, int64_t kept, int64_t out_features,
                          int64_t in_features, cudaStream_t stream) {
  return (bytes_of(dtype) == 4 ? values<4> : values<2>)(dense, stride, bitmap, row_offsets, to, kept, out_features,
                                                        in_features, stream);
}

cudaError_t bitmap_to_dense(const void* values, Float dtype, int64_t kept, const uint8_t* bitmap,
                            const int64_t* row_offsets, void* dense, uint64_t* status, int64_t out_features,
                            int64_t in_features, cudaStream_t stream) {
  return (bytes_of(dtype) == 4 ? to_dense<4> : to_dense<2>)(values, kept, bitmap, row_offsets, dense, status,
                                                            out_features, in_features, stream);
}

}  // namespace sparsekern::cuda
