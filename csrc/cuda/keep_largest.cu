// keep_largest: of each small set the largest saliencies, ties to the lower index: the mask of N:M.
//
// A saliency stays where fewer than `kept` others of its set come before it: those that are larger and, of equal ones,
// those with a lower index. Each pair is compared once. A thread has 16 saliencies, four times four neighbouring ones for
// sets of 2 and 4, a whole set of 8 or 16 otherwise; it loads them in 16 bytes and writes their mask in 4 to 16. Every
// byte is read once and written once.

#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOfThread = 16;  // saliencies

// kSize  saliencies of a set
template <int kSize>
__global__ void __launch_bounds__(kThreads) keep_largest_kernel(
    const float* __restrict__ saliency,       // [sets, kSize]
    const int64_t* __restrict__ kept,         // [sets], kept_stride apart
    int64_t kept_stride,
    uint8_t* __restrict__ mask,               // [sets, kSize]
    unsigned long long* __restrict__ status,  // [2], see ops.h
    int64_t sets) {
  constexpr int kRun = kSize < 4 ? 4 : kSize;      // neighbouring saliencies that a thread has
  constexpr int kRuns = kOfThread / kRun;
  const int64_t first_run = static_cast<int64_t>(blockIdx.x) * (kThreads * kRuns) + threadIdx.x;
  const int64_t size = sets * kSize;

  float s[kRuns][kRun];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t at = (first_run + r * kThreads) * kRun;
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      uint32_t four[4] = {};
      if (at + i + 4 <= size) {
        // of longer runs a load takes a part of what memory sends: the rest is to be found in L1
        if constexpr (kRun == 4) ptx::load_once(four, saliency + at);
        else ptx::load(four, saliency + at + i);
      } else if (kSize == 2 && at + i < size) {
        // two sets are in a load, the last one is alone
        four[0] = __float_as_uint(saliency[at + i]);
        four[1] = __float_as_uint(saliency[at + i + 1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) s[r][i + j] = __uint_as_float(four[j]);
    }
  }

  const int64_t common = kept[0];
  bool missing = false, impossible = false;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t at = (first_run + r * kThreads) * kRun;
    if (at >= size) break;
    uint32_t stays[kRun / 4] = {};
#pragma unroll
    for (int begin = 0; begin < kRun; begin += kSize) {
      int64_t room = common;
      if (kept_stride != 0 && at + begin < size) room = kept[(at + begin) / kSize * kept_stride];
      impossible |= static_cast<uint64_t>(room) > kSize;
      // small counts: in float they leave the integer units to the comparisons
      const float count = static_cast<float>(static_cast<int>(room));
      float before[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) before[i] = static_cast<float>(i);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        missing |= s[r][begin + i] != s[r][begin + i];
#pragma unroll
        for (int j = i + 1; j < kSize; ++j) {
          // the lower index comes first unless the other one is larger
          const float larger = s[r][begin + j] > s[r][begin + i] ? 1.0f : 0.0f;
          before[i] += larger;
          before[j] -= larger;
        }
        stays[(begin + i) / 4] |= static_cast<uint32_t>(before[i] < count) << (begin + i) % 4 * 8;
      }
    }
    if constexpr (kRun == 16) {
      *reinterpret_cast<uint4*>(mask + at) = make_uint4(stays[0], stays[1], stays[2], stays[3]);
    } else if constexpr (kRun == 8) {
      *reinterpret_cast<uint2*>(mask + at) = make_uint2(stays[0], stays[1]);
    } else if (kSize == 4 || at + 4 <= size) {
      *reinterpret_cast<uint32_t*>(mask + at) = stays[0];
    } else {
      *reinterpret_cast<uint16_t*>(mask + at) = static_cast<uint16_t>(stays[0]);
    }
  }
  // what is refused costs what it costs
  if (missing) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) count += s[i / kRun][i % kRun] != s[i / kRun][i % kRun];
    atomicAdd(status, static_cast<unsigned long long>(count));
  }
  if (impossible) status[1] = 1;
}

template <int kSize>
cudaError_t select(const float* saliency, const int64_t* kept, int64_t kept_stride, bool* mask, uint64_t* status,
                   int64_t sets, cudaStream_t stream) {
  const int64_t threads = (sets * kSize + kOfThread - 1) / kOfThread;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(keep_largest_kernel<kSize>, static_cast<unsigned>(blocks), kThreads, 0, stream, saliency, kept,
                kept_stride, reinterpret_cast<uint8_t*>(mask), reinterpret_cast<unsigned long long*>(status), sets);
}

}  // namespace

cudaError_t keep_largest(const float* saliency, const int64_t* kept, int64_t kept_stride, bool* mask, uint64_t* status,
                         int64_t sets, int64_t size, cudaStream_t stream) {
  switch (size) {
    case 2: return select<2>(saliency, kept, kept_stride, mask, status, sets, stream);
    case 4: return select<4>(saliency, kept, kept_stride, mask, status, sets, stream);
    case 8: return select<8>(saliency, kept, kept_stride, mask, status, sets, stream);
    case 16: return select<16>(saliency, kept, kept_stride, mask, status, sets, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sparsekern::cuda
