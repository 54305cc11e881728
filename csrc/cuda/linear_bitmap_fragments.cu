// linear_bitmap_fragments: decode with an unstructured weight, 1 to 64 tokens, on dense tensor cores.
//
// A warp owns 16 outputs and every warps_k-th segment of 512 inputs. It copies the segment's masks and kept values into
// shared memory as they lie, rebuilds one fragment of 16 x 16 weights after the other in registers, and multiplies each
// by up to 8 tiles of 8 tokens. Warps with the same segment and other outputs share x; those with the same outputs add
// their sums in shared memory.
// While some warps of a multiprocessor wait for their copies, others multiply: there are 8 to 20 on each.
//
// Where the outputs alone would not fill the card, blocks share them: each writes its sums, and a second kernel adds
// them up, always in the same order.

#include <algorithm>

#include "bitmap_fragments.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kTileTokens = 8;
// 16 bytes more than the inputs, so that the rows of a fragment lie in different banks
constexpr int kXRowBytes = kSegmentInputs * 2 + 16;
constexpr int kSumThreads = 256;

__host__ __device__ constexpr int token_tiles_of(int64_t tokens) {
  return tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
}

// Of x in shared memory.
__host__ __device__ constexpr int x_rows(int64_t tokens) {
  return tokens < kTileTokens ? static_cast<int>(tokens) : token_tiles_of(tokens) * kTileTokens;
}

struct Work {
  int64_t out_features;
  int in_features, tokens, panels, segments;
  int warps_m_log2, warps_k, splits;
  int cell_rows, capacity;
};

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// Asks for every row_step-th token's inputs of a segment, from first_row on, zeros behind the last input.
template <typename Value>
__device__ void copy_x(unsigned char* x_smem, const Value* x, int first_input, int tokens, int in_features,
                       int first_row, int row_step, int lane) {
  constexpr int kPieceInputs = 8, kRowPieces = kSegmentInputs / kPieceInputs;
  // cp.async moves 16 bytes between multiples of 16
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | in_features * sizeof(Value)) % 16 == 0;
#pragma unroll
  for (int piece = lane; piece < kRowPieces; piece += 32) {
    const int input = first_input + piece * kPieceInputs;
    const int there = min(max(in_features - input, 0), kPieceInputs);
    const Value* from = x + static_cast<int64_t>(first_row) * in_features + (there > 0 ? input : 0);
    unsigned char* x_smem_write = x_smem + first_row * kXRowBytes + piece * 16;
#pragma unroll 1
    for (int row = first_row; row < tokens; row += row_step) {
      if (aligned) {
        ptx::cp_async_16(x_smem_write, from, there * static_cast<int>(sizeof(Value)));
      } else {
#pragma unroll 1
        for (int i = 0; i < kPieceInputs; ++i) {
          reinterpret_cast<uint16_t*>(x_smem_write)[i] =
              i < there ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t{0};
        }
      }
      x_smem_write += row_step * kXRowBytes;
      from += static_cast<int64_t>(row_step) * in_features;
    }
  }
}

template <typename Value, int kTokenTiles>
__global__ void __launch_bounds__(256) linear_bitmap_fragments_kernel(
    const Value* __restrict__ x,              // [tokens, in_features]
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentBlocks, 32]
    const unsigned char* __restrict__ cells,  // [cell_rows, kQuadRowBytes]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    const Value* __restrict__ bias,           // [out_features] or null
    Value* __restrict__ y,                    // [tokens, out_features], where splits == 1
    float* __restrict__ partial,              // [splits, tokens, out_features], where splits > 1
    Work work) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps_m = 1 << work.warps_m_log2;
  const int warp_m = warp & (warps_m - 1), warp_k = warp >> work.warps_m_log2;
  const int tokens = work.tokens;
  // fewer than 8 tokens have as many rows, a lane without one reads the last; more have all rows, some never written:
  // what stands there reaches only columns that are never stored
  const int rows = x_rows(tokens);

  // every warp's cells begin on a row of cells
  const int warp_smem = warp * warp_bytes(work.capacity);
  const int x_smem =
      (blockDim.x / 32) * warp_bytes(work.capacity) + kGuardRows * kCellRowBytes + warp_k * rows * kXRowBytes;
  const unsigned char* x_smem_read =
      ptx::shared_memory() + x_smem + min(lane / 4, rows - 1) * kXRowBytes + lane % 4 * 32;
  const uint32_t first_run = (warp_smem + kMaskBytes) / 8;
  const uint32_t last_run = first_run + work.capacity * kCellValues * 8;
  const uint32_t column = lane * 2 * kCellValues;
  const uint32_t spread = spread_of(lane % 16);

  const auto meet_slot = [&] {
    if (warps_m == 1) {
      __syncwarp();
    } else {
      ptx::barrier(1 + warp_k, 32 * warps_m);
    }
  };

  // past the last panel: the last one again, never stored
  const int panel = min((static_cast<int>(blockIdx.x) << work.warps_m_log2) + warp_m, work.panels - 1);
  float sums[kTokenTiles][4] = {};
#pragma unroll 1
  for (int segment = blockIdx.y * work.warps_k + warp_k; segment < work.segments;
       segment += work.warps_k * work.splits) {
    const int64_t at = static_cast<int64_t>(panel) * work.segments + segment;
    copy_segment(ptx::shared_memory() + warp_smem, masks + at * (kMaskBytes / 4), cells, quad_rows + at * kLaneQuads,
                 work.cell_rows, work.capacity, lane);
    copy_x(ptx::shared_memory() + x_smem, x, segment * static_cast<int>(kSegmentInputs), tokens, work.in_features,
           warp_m, warps_m, lane);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    meet_slot();

    const unsigned char* mask_smem_read = ptx::shared_memory() + warp_smem + lane * 4;
    uint32_t run = first_run;
#pragma unroll 2
    for (int block = 0; block < kSegmentBlocks; ++block) {
      const uint32_t mask = *reinterpret_cast<const uint32_t*>(mask_smem_read + block * 128);
      run = min(run, last_run);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t a[2][4];
        expand(a[0], mask >> 16 * pair, spread, run, column);
        expand(a[1], mask >> (16 * pair + 8), spread, run, column);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4 x_reg = *reinterpret_cast<const uint4*>(x_smem_read + n * (kTileTokens * kXRowBytes) +
                                                              block * 128 + pair * 16);
          const uint32_t b_0[2] = {x_reg.x, x_reg.y}, b_1[2] = {x_reg.z, x_reg.w};
          ptx::mma_m16n8k16<Value>(sums[n], a[0], b_0);
          ptx::mma_m16n8k16<Value>(sums[n], a[1], b_1);
        }
      }
    }
    // neither the weights nor x are read any more
    meet_slot();
  }

  // the sums of all warps: [warps_k, warps_m, kTokenTiles, 32 lanes]
  auto* sums_smem = reinterpret_cast<float4*>(ptx::shared_memory());
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    sums_smem[(warp * kTokenTiles + n) * 32 + lane] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
  }
  __syncthreads();

  const int results = warps_m * kTokenTiles * 32;
  for (int i = threadIdx.x; i < results; i += blockDim.x) {
    float4 sum = sums_smem[i];
    for (int k = 1; k < work.warps_k; ++k) {
      const float4 part = sums_smem[k * results + i];
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    const int64_t first_out =
        ((static_cast<int64_t>(blockIdx.x) << work.warps_m_log2) + i / (32 * kTokenTiles)) * kFragmentRows;
    const float parts[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t out = first_out + i % 32 / 4 + j / 2 * 8;
      const int token = i / 32 % kTokenTiles * kTileTokens + i % 4 * 2 + j % 2;
      if (out >= work.out_features || token >= tokens) continue;
      if (work.splits > 1) {
        partial[(static_cast<int64_t>(blockIdx.y) * tokens + token) * work.out_features + out] = parts[j];
      } else {
        store(y + token * work.out_features + out, parts[j] + (bias == nullptr ? 0.0f : to_float(bias[out])));
      }
    }
  }
}

template <typename Value>
__global__ void __launch_bounds__(kSumThreads) sum_splits_kernel(
    const float* __restrict__ partial,  // [splits, size]
    const Value* __restrict__ bias,     // [out_features] or null
    Value* __restrict__ y,              // [size], size = tokens * out_features
    int64_t size, int64_t out_features, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = partial[i];
  for (int split = 1; split < splits; ++split) sum += partial[split * size + i];
  store(y + i, sum + (bias == nullptr ? 0.0f : to_float(bias[i % out_features])));
}

// Warps of a block and blocks that share outputs.
struct Division {
  int warps_m_log2, warps_k, splits;
  int64_t groups, shared_bytes;
};

int64_t shared_bytes(const Division& division, int64_t tokens, int capacity) {
  const int warps = division.warps_k << division.warps_m_log2;
  const int64_t segments_bytes = int64_t{warps} * warp_bytes(capacity) + kGuardRows * kCellRowBytes;
  return std::max(segments_bytes + int64_t{division.warps_k} * x_rows(tokens) * kXRowBytes,
                  int64_t{warps} * token_tiles_of(tokens) * 32 * 16);
}

// Many tokens share their x among 4 panels; as few blocks share outputs as fill the card.
cudaError_t divide(Division& division, int64_t tokens, int64_t panels, int64_t segments, int capacity) {
  int device, multiprocessors, most_bytes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  // without inputs the bias is all there is
  segments = std::max<int64_t>(segments, 1);
  const int tiles = token_tiles_of(tokens);
  division.warps_m_log2 = tiles == 1 || panels < 4 ? 0 : 2;
  division.warps_k = static_cast<int>(std::min<int64_t>(segments, tiles == 1 ? 8 : tiles == 2 ? 2 : 1));
  // as few rounds as with more warps, evenly
  const int64_t rounds = (segments + division.warps_k - 1) / division.warps_k;
  division.warps_k = static_cast<int>((segments + rounds - 1) / rounds);
  while (division.warps_k > 1 && shared_bytes(division, tokens, capacity) > most_bytes) --division.warps_k;
  while (division.warps_m_log2 > 0 && shared_bytes(division, tokens, capacity) > most_bytes) --division.warps_m_log2;
  division.groups = (panels + (1 << division.warps_m_log2) - 1) >> division.warps_m_log2;
  const int64_t most_splits = std::min<int64_t>((segments + division.warps_k - 1) / division.warps_k, 16);
  division.splits = static_cast<int>(std::clamp<int64_t>(multiprocessors / division.groups, 1, most_splits));
  division.shared_bytes = shared_bytes(division, tokens, capacity);
  return cudaSuccess;
}

bool in_range(int64_t tokens, int64_t out_features, int64_t in_features) {
  return tokens >= 0 && tokens <= kBitmapFragmentsTokens && out_features >= 0 &&
         out_features <= INT32_MAX - kFragmentRows && in_features >= 0 && in_features <= INT32_MAX - kSegmentInputs;
}

template <typename Value>
cudaError_t multiply(const BitmapFragments& weight, const Value* x, const Value* bias, Value* y, float* workspace,
                     int64_t tokens, cudaStream_t stream) {
  if (!in_range(tokens, weight.out_features, weight.in_features)) return cudaErrorInvalidValue;
  if (tokens == 0 || weight.out_features == 0) return cudaSuccess;
  Division division;
  const cudaError_t error = divide(division, tokens, weight.panels(), weight.segments(), weight.capacity);
  if (error != cudaSuccess) return error;
  const Work work{weight.out_features,
                  static_cast<int>(weight.in_features),
                  static_cast<int>(tokens),
                  static_cast<int>(weight.panels()),
                  static_cast<int>(weight.segments()),
                  division.warps_m_log2,
                  division.warps_k,
                  division.splits,
                  weight.cell_rows,
                  weight.capacity};
  const auto start = [&](auto kernel) {
    const unsigned threads = 32u * (division.warps_k << division.warps_m_log2);
    return launch(kernel, dim3(static_cast<unsigned>(division.groups), division.splits), threads,
                  division.shared_bytes, stream, x, weight.masks, weight.cells, weight.quad_rows, bias, y, workspace,
                  work);
  };
  const int tiles = token_tiles_of(tokens);
  const cudaError_t started = tiles == 1   ? start(linear_bitmap_fragments_kernel<Value, 1>)
                              : tiles == 2 ? start(linear_bitmap_fragments_kernel<Value, 2>)
                              : tiles == 4 ? start(linear_bitmap_fragments_kernel<Value, 4>)
                                           : start(linear_bitmap_fragments_kernel<Value, 8>);
  if (started != cudaSuccess || division.splits == 1) return started;
  const int64_t size = tokens * weight.out_features;
  return launch(sum_splits_kernel<Value>, dim3(static_cast<unsigned>((size + kSumThreads - 1) / kSumThreads)),
                kSumThreads, 0, stream, workspace, bias, y, size, weight.out_features, division.splits);
}

}  // namespace

cudaError_t linear_bitmap_fragments_workspace(const BitmapFragments& weight, int64_t tokens, int64_t* bytes) {
  *bytes = 0;
  if (!in_range(tokens, weight.out_features, weight.in_features)) return cudaErrorInvalidValue;
  if (tokens == 0 || weight.out_features == 0) return cudaSuccess;
  Division division;
  const cudaError_t error = divide(division, tokens, weight.panels(), weight.segments(), weight.capacity);
  if (error == cudaSuccess && division.splits > 1) {
    *bytes = division.splits * tokens * weight.out_features * static_cast<int64_t>(sizeof(float));
  }
  return error;
}

cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __nv_bfloat16* x, const __nv_bfloat16* bias,
                                    __nv_bfloat16* y, void* workspace, int64_t tokens, cudaStream_t stream) {
  return multiply(weight, x, bias, y, static_cast<float*>(workspace), tokens, stream);
}

cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __half* x, const __half* bias, __half* y,
                                    void* workspace, int64_t tokens, cudaStream_t stream) {
  return multiply(weight, x, bias, y, static_cast<float*>(workspace), tokens, stream);
}

}  // namespace sparsekern::cuda
