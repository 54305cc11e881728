// linear_bitmap_fragments: decode with an unstructured weight, 1 to 64 tokens, on dense tensor cores.
//
// A warp owns 16 outputs and every warps_k-th segment of 256 inputs. It copies a segment's masks and kept values into
// shared memory as they lie, rebuilds one fragment of 16 x 16 weights after the other in registers, and multiplies each
// by up to 8 tiles of 8 tokens; meanwhile the next segment is under way, and where that one's cells lie is known one
// segment earlier still. Warps with the same segment and other outputs share x; those with the same outputs add their
// sums in shared memory.
//
// Where the outputs alone would not fill the card, blocks share them: each writes its sums, and a second kernel adds
// them up, always in the same order. How many warps and blocks share what, division.h decides.
//
// Counted for an H200 at 50 % (tests/cuda_on_host/divisions.py), none of it measured: one stage of a warp is 5.9 KB,
// and 8 to 16 warps of a multiprocessor have 47 to 94 KB of weights under way while as much is multiplied; latency x
// bandwidth is 26 KB. Instructions a dense weight in the loop: 3.3, 3.5, 3.8 and 4.5 for up to 8, 16, 32 and 64 tokens,
// about 1.8 more for the copies, of which an H200 affords 7.8. Two HMMA and a load of x are left of each tile of tokens:
// 0.19 a weight, so that 8 tiles are 1.3 above one. Registers on sm_90a: 64, 96, 112, 118.

#include <algorithm>

#include "bitmap_fragments.cuh"
#include "division.h"

namespace sparsekern::cuda {
namespace {

constexpr int kTileTokens = 8;
// 16 bytes more than the inputs, so that the rows of a fragment lie in different banks
constexpr int kXRowBytes = kSegmentInputs * 2 + 16;
constexpr int kSumThreads = 256;
// of weights and x: while one is multiplied the next one is under way
constexpr int kStages = 2;
constexpr int kMostWarps = 8;

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
  constexpr int kPieceInputs = 8;
  static_assert(kSegmentInputs == 32 * kPieceInputs, "a lane has one piece of a row");
  const int input = first_input + lane * kPieceInputs;
  const int there = min(max(in_features - input, 0), kPieceInputs);
  const Value* from = x + static_cast<int64_t>(first_row) * in_features + (there > 0 ? input : 0);
  unsigned char* x_smem_write = x_smem + first_row * kXRowBytes + lane * 16;
  // cp.async moves 16 bytes between multiples of 16
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | in_features * sizeof(Value)) % 16 == 0;
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

template <typename Value, int kTokenTiles>
__global__ void __launch_bounds__(32 * kMostWarps, 2) linear_bitmap_fragments_kernel(
    const Value* __restrict__ x,              // [tokens, in_features]
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentBlocks, 32]
    const unsigned char* __restrict__ cells,  // [cell_rows, kQuadRowBytes]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    const Value* __restrict__ bias,           // [out_features] or null
    Value* __restrict__ y,                    // [tokens, out_features], where splits == 1
    float* __restrict__ partial,              // [splits, tokens, out_features], where splits > 1
    Work work) {
  const int lane = ptx::lane(), warp = threadIdx.x / 32;
  const int warps_m = 1 << work.warps_m_log2;
  const int warp_m = warp & (warps_m - 1), warp_k = warp >> work.warps_m_log2;
  const int tokens = work.tokens;
  // fewer than 8 tokens have as many rows, a lane without one reads the last; more have all rows, some never written:
  // what stands there reaches only columns that are never stored
  const int rows = x_rows(tokens);

  // every warp's cells begin on a row of cells
  const int stage_bytes = warp_bytes(work.capacity), x_stage_bytes = rows * kXRowBytes;
  const int warp_smem = warp * (kStages * stage_bytes);
  const int x_smem = (blockDim.x / 32) * (kStages * stage_bytes) + kGuardRows * kCellRowBytes +
                     warp_k * (kStages * x_stage_bytes);
  const Spread spread = spread_of(lane);

  const auto meet_slot = [&] {
    if (warps_m == 1) {
      __syncwarp();
    } else {
      ptx::barrier(1 + warp_k, 32 * warps_m);
    }
  };

  // past the last panel: the last one again, never stored
  const int panel = min((static_cast<int>(blockIdx.x) << work.warps_m_log2) + warp_m, work.panels - 1);
  const int64_t first_part = static_cast<int64_t>(panel) * work.segments;
  const int step = work.warps_k * work.splits;
  const auto quad_of = [&](int segment) {
    return segment < work.segments ? rows_of(quad_rows + (first_part + segment) * kLaneQuads, lane) : QuadRows{0, 0};
  };
  const auto copy = [&](int segment, int stage, QuadRows quad) {
    copy_segment(ptx::shared_memory() + warp_smem + stage * stage_bytes,
                 masks + (first_part + segment) * (kMaskBytes / 4), cells, quad, work.cell_rows, work.capacity, lane);
    copy_x(ptx::shared_memory() + x_smem + stage * x_stage_bytes, x, segment * static_cast<int>(kSegmentInputs), tokens,
           work.in_features, warp_m, warps_m, lane);
  };

  float sums[kTokenTiles][4] = {};
  int segment = blockIdx.y * work.warps_k + warp_k, stage = 0;
  if (segment < work.segments) copy(segment, 0, quad_of(segment));
  ptx::cp_async_commit();
  // asked for one segment before it is needed: the copies would wait for it
  QuadRows next_quad = quad_of(segment + step);
#pragma unroll 1
  for (; segment < work.segments; segment += step, stage ^= 1) {
    if (segment + step < work.segments) copy(segment + step, stage ^ 1, next_quad);
    ptx::cp_async_commit();
    next_quad = quad_of(segment + 2 * step);
    ptx::cp_async_wait<1>();
    meet_slot();

    const unsigned char* mask_smem_read = ptx::shared_memory() + warp_smem + stage * stage_bytes + lane * 4;
    const unsigned char* x_smem_read = ptx::shared_memory() + x_smem + stage * x_stage_bytes +
                                       min(lane / 4, rows - 1) * kXRowBytes + lane % 4 * 32;
    uint32_t run = (warp_smem + stage * stage_bytes + kMaskBytes) / 8;
    const uint32_t last_run = run + work.capacity * kCellValues * 8;
#pragma unroll 2
    for (int block = 0; block < kSegmentBlocks; ++block) {
      const uint32_t mask = *reinterpret_cast<const uint32_t*>(mask_smem_read + block * 128);
      run = min(run, last_run);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t a[2][4];
        expand(a[0], mask >> 16 * pair, spread, run, lane);
        expand(a[1], mask >> (16 * pair + 8), spread, run, lane);
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
  // nothing is under way but an empty group
  ptx::cp_async_wait<0>();

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

  int warps() const { return warps_k << warps_m_log2; }
};

int64_t shared_bytes(const Division& division, int64_t tokens, int capacity) {
  const int64_t segments_bytes =
      int64_t{kStages} * division.warps() * warp_bytes(capacity) + kGuardRows * kCellRowBytes;
  return std::max(segments_bytes + int64_t{kStages} * division.warps_k * x_rows(tokens) * kXRowBytes,
                  int64_t{division.warps()} * token_tiles_of(tokens) * 32 * 16);
}

// The most registers that a thread may have (tests/test_cuda_module.py).
constexpr int registers_of(int token_tiles) {
  return token_tiles == 1 ? 88 : token_tiles == 2 ? 96 : token_tiles == 4 ? 112 : 124;
}

// Of a warp for a segment (tests/test_cuda_module.py): the loop over blocks, and the copies beside it.
constexpr double instructions_of(int token_tiles) { return 625 + 23.0 * token_tiles; }

// The blocks of a division, for the formula of division.h.
Blocks blocks_of(const Division& division, const Card& card, int64_t tokens, int64_t segments, int capacity,
                 int64_t out_features) {
  const int64_t count = division.groups * division.splits;
  const double block_segments = static_cast<double>((segments + division.splits - 1) / division.splits);
  const double x_bytes = static_cast<double>(tokens) * kSegmentInputs * 2;
  const double partial_bytes = division.splits > 1 ? 8.0 * tokens * out_features / division.groups : 0.0;
  return {count,
          resident_blocks(card, division.shared_bytes, 32 * division.warps(), registers_of(token_tiles_of(tokens))),
          block_segments * warp_bytes(capacity) * (1 << division.warps_m_log2),
          block_segments * x_bytes + partial_bytes,
          kStages * (static_cast<double>(division.warps()) * warp_bytes(capacity) + division.warps_k * x_bytes),
          block_segments * (1 << division.warps_m_log2) * instructions_of(token_tiles_of(tokens)),
          division.warps(),
          division.splits > 1};
}

// Of all divisions that fit, the one that should take the least time; without warps where none fits.
Division best_division(const Card& card, int64_t tokens, int64_t panels, int64_t segments, int capacity,
                       int64_t out_features) {
  Division best{};
  double best_us = -1.0;
  for (int splits = 1; splits <= 16 && splits <= segments; splits *= 2) {
    for (int warps_m_log2 = 0; warps_m_log2 <= 3 && (warps_m_log2 == 0 || 1 << warps_m_log2 <= panels);
         ++warps_m_log2) {
      for (int warps_k = 1; warps_k << warps_m_log2 <= kMostWarps && warps_k * splits <= segments; ++warps_k) {
        Division division{warps_m_log2, warps_k, splits, (panels + (1 << warps_m_log2) - 1) >> warps_m_log2, 0};
        division.shared_bytes = shared_bytes(division, tokens, capacity);
        if (division.shared_bytes > card.shared_bytes_per_block) continue;
        const double us = expected_us(card, blocks_of(division, card, tokens, segments, capacity, out_features));
        if (best_us >= 0.0 && us >= best_us) continue;
        best = division;
        best_us = us;
      }
    }
  }
  return best;
}

cudaError_t divide(Division& division, const BitmapFragments& weight, int64_t tokens) {
  Card card;
  const cudaError_t error = this_card(card);
  if (error != cudaSuccess) return error;
  const std::array<int64_t, 4> sizes{tokens, weight.out_features, weight.in_features, weight.capacity};
  division = remembered<Division>(card, sizes, [&] {
    // without inputs the bias is all there is
    return best_division(card, tokens, weight.panels(), std::max<int64_t>(weight.segments(), 1), weight.capacity,
                         weight.out_features);
  });
  return division.warps() == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
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
  const cudaError_t error = divide(division, weight, tokens);
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
    const unsigned threads = 32u * division.warps();
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
  const cudaError_t error = divide(division, weight, tokens);
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
