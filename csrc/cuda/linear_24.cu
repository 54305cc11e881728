// linear_24, 1 to 64 tokens: the weight streams through the tensor cores once, at the speed of memory.
//
// y^T = W x^T + bias by mma.sp.m16n8k32: its rows are outputs, its columns tokens, so that 8 tokens cost what one does.
// A warp multiplies chunks of 16 outputs x 256 inputs: nine 16-byte loads a lane, all under way at once, go straight to
// the registers that mma.sp reads. A block has warps_m x warps_k warps: the former share x, each with 16 outputs of its
// own, the latter share the outputs, each with every warps_k-th chunk. Their sums meet in shared memory, in a fixed
// order. Where that leaves multiprocessors idle, `splits` blocks share the chunks of the same outputs; the last one to
// come adds what they left in `workspace`, again in a fixed order: the same bits every time.
//
// x comes in chunks of 256 inputs, row by row, 16 bytes apart from a multiple of 512, where ldmatrix finds B fragments
// without bank conflicts. There is room for two: while one is multiplied the next one is on its way, so that one barrier
// a chunk says both that it has come and that the other is free. Inputs past the last one are zeros in both. Barriers
// are __syncthreads: of those with a number of their own a Hopper multiprocessor has 64 for all its blocks together.
//
// Bytes: 4608 a chunk of 4096 weights (1.125 a dense element, 0.5625 of dense bf16), read once, and 512 of x for each
// token and warps_m chunks, from L2. A chunk is 8 ldmatrix and 8 mma.sp for 8 tokens, 16 instructions more for each 8
// beyond: in all at most 156 of a warp at 1 token, 1.2 of a thread for a dense element, of which an H200 affords 7.8.
// ldmatrix reads 4 KB for 8 tokens, 32 cycles of shared memory; memory takes some 250 for a chunk. Registers for up to 8,
// 16, 32 and 64 tokens: 63, 74, 82 and 99 (sm_90a, nvcc 13.0), so 32, 24, 23 and 19 warps on a multiprocessor at most,
// with 88 KB of weights under way and more, where latency x bandwidth = 0.8 us x 4.3 TB/s / 132 = 26 KB. How the work is
// divided, division.h decides. All of this is counted, none of it measured.

#include <algorithm>
#include <cstddef>

#include "division.h"
#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kTileTokens = 8;
constexpr int kRowBytes = kChunkInputs * 2 + 16;  // of x in shared memory
constexpr int kPieceInputs = 8;                   // 16 bytes
constexpr int kSelectors = 2;                     // tiles whose positions share a register
constexpr int kResultFloats = 32 * 4;             // a warp's sums of 16 outputs x 8 tokens

// Warps of a block at most, and blocks of so many that a multiprocessor must have room for: 64 or 128 registers a thread.
constexpr int kMaxWarps = 16;
constexpr int blocks_by_bounds(int token_tiles) { return token_tiles == 1 ? 2 : 1; }
// The most registers that a thread has (tests/test_cuda_module.py), given out by eights.
constexpr int registers_of(int token_tiles) {
  return token_tiles == 1 ? 64 : token_tiles == 2 ? 80 : token_tiles == 4 ? 88 : 104;
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// How the work is divided, worked out once on the host: a block's first instructions are on the way of its first load.
struct Work {
  int out_features, in_features, tokens, panels, chunks;
  int warps_m_log2, warps_k;
  int splits, split_chunks;  // blocks that share outputs, and chunks of each; the last have fewer
  int stage_bytes;           // of shared memory: a chunk of x for each of warps_k
};

// What a lane holds of a chunk.
struct Weights {
  uint32_t values[kChunkTiles][4];
  uint32_t metadata[4];
};

template <typename Value>
__device__ __forceinline__ void load_weights(Weights& weights, const Value* values, const uint32_t* metadata,
                                             int64_t chunk, int lane) {
  const Value* values_read = values + chunk * kChunkValues + lane * 8;
#pragma unroll
  for (int tile = 0; tile < kChunkTiles; ++tile) {
    ptx::load_once(weights.values[tile], values_read + tile * (kChunkValues / kChunkTiles));
  }
  ptx::load_once(weights.metadata, metadata + chunk * kChunkWords + lane * 4);
}

// Asks for rows first_row, first_row + row_step ... of the chunk of x that starts at `input`; a lane has a piece of each.
template <typename Value>
__device__ __forceinline__ void copy_x(unsigned char* x_smem, const Value* x, int input, int tokens, int in_features,
                                       int first_row, int row_step, int lane) {
  input += lane * kPieceInputs;
  const int there = max(min(in_features - input, kPieceInputs), 0);
  const Value* x_read = x + (there > 0 ? input : 0);
  unsigned char* x_smem_write = x_smem + lane * 16;
  // cp.async moves 16 bytes between multiples of 16
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | in_features * sizeof(Value)) % 16 == 0;
#pragma unroll 1
  for (int row = first_row; row < tokens; row += row_step) {
    const Value* from = x_read + static_cast<int64_t>(row) * in_features;
    unsigned char* to = x_smem_write + row * kRowBytes;
    if (aligned) {
      ptx::cp_async_16(to, from, there * static_cast<int>(sizeof(Value)));
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < kPieceInputs; ++i) {
      reinterpret_cast<uint16_t*>(to)[i] = i < there ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t{0};
    }
  }
}

// sums += one tile of 16 outputs x 32 inputs times x, of kTogether tiles of tokens
template <typename Value, int kSelector, int kTogether>
__device__ __forceinline__ void multiply_tile(float (*sums)[4], const uint32_t (&values)[4], uint32_t metadata,
                                              const unsigned char* x_smem_read) {
  uint32_t x_reg[kTogether][4];
#pragma unroll
  for (int n = 0; n < kTogether; ++n) ptx::ldmatrix(x_reg[n], x_smem_read + n * (kTileTokens * kRowBytes));
#pragma unroll
  for (int n = 0; n < kTogether; ++n) ptx::mma_sp_m16n8k32<Value, kSelector>(sums[n], values, x_reg[n], metadata);
}

// part(0) + part(1) + ... in this order
template <typename Part>
__device__ __forceinline__ float4 sum_of(int count, Part part) {
  float4 sum = part(0);
#pragma unroll 4
  for (int k = 1; k < count; ++k) {
    const float4 next = part(k);
    sum = make_float4(sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w);
  }
  return sum;
}

// Of x in shared memory: two tiles of tokens are multiplied side by side.
__host__ __device__ constexpr int x_rows(int tokens) {
  return tokens <= kTileTokens ? tokens : (tokens + 2 * kTileTokens - 1) / (2 * kTileTokens) * (2 * kTileTokens);
}

template <typename Value, int kTokenTiles>
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_by_bounds(kTokenTiles)) linear_24_kernel(
    const Value* __restrict__ x,            // [tokens, in_features]
    const Value* __restrict__ values,       // [panels, chunks, kChunkValues]
    const uint32_t* __restrict__ metadata,  // [panels, chunks, kChunkWords]
    const Value* __restrict__ bias,         // [out_features] or null
    Value* __restrict__ y,                  // [tokens, out_features]
    float4* __restrict__ partial,           // [splits, gridDim.x, warps_m, kTokenTiles, 32 lanes], where splits > 1
    unsigned* __restrict__ arrived,         // [gridDim.x] zero before and after, where splits > 1
    Work work) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warps_m = 1 << work.warps_m_log2;
  const int warp_m = warp & (warps_m - 1), warp_k = warp >> work.warps_m_log2;
  const int begin = blockIdx.y * work.split_chunks, end = min(begin + work.split_chunks, work.chunks);

  // past the last panel: the last one again, never stored
  const int panel = min((static_cast<int>(blockIdx.x) << work.warps_m_log2) + warp_m, work.panels - 1);
  const int first_chunk = panel * work.chunks;  // of the panel, in the weight
  Weights weights;
  if (begin + warp_k < end) load_weights(weights, values, metadata, first_chunk + begin + warp_k, lane);
  // one of the block's outputs for each of the first threads: on the way with the weight, not waited for at the end
  const int block_outputs = warps_m * static_cast<int>(kPanelRows);
  const int first_output = static_cast<int>(blockIdx.x) * block_outputs;
  const bool has_bias = bias != nullptr && thread < block_outputs && first_output + thread < work.out_features;
  const Value own_bias = has_bias ? bias[first_output + thread] : Value{};

  // fewer than 8 tokens have as many rows, a lane without one reads the last; more have all rows, some never written:
  // what stands there reaches only columns that are never stored
  const int tokens = work.tokens, rows = x_rows(tokens);
  unsigned char* x_smem = ptx::shared_memory() + warp_k * rows * kRowBytes;
  const unsigned char* x_smem_read = x_smem + min(lane % 8, rows - 1) * kRowBytes + lane / 8 * 16;
  const auto ask_for_x = [&](int chunk, int stage) {
    if (chunk >= end) return;
    copy_x(x_smem + stage, x, chunk * static_cast<int>(kChunkInputs), tokens, work.in_features, warp_m, warps_m, lane);
    ptx::cp_async_commit();
  };

  float sums[kTokenTiles][4] = {};
  // where in shared memory the x of these chunks lies, before or behind that of the next ones
  int stage = 0;
  ask_for_x(begin + warp_k, stage);
  // a warp without a chunk goes along: the barrier is for all
#pragma unroll 1
  for (int first = begin; first < end; first += work.warps_k) {
    ptx::cp_async_wait<0>();
    // all x of these chunks has come, and nobody reads the other stage any more
    if (warps_m == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    const int next = first + work.warps_k + warp_k;
    ask_for_x(next, work.stage_bytes - stage);
    if (first + warp_k < end) {
      constexpr int kTogether = kTokenTiles == 1 ? 1 : 2;
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += kTogether) {
        if (n > 0 && n * kTileTokens >= tokens) break;
        const unsigned char* tokens_read = x_smem_read + stage + n * (kTileTokens * kRowBytes);
#pragma unroll
        for (int tile = 0; tile < kChunkTiles; tile += kSelectors) {
          const uint32_t word = weights.metadata[tile / kSelectors];
          const unsigned char* tile_read = tokens_read + tile * (kTileInputs * 2);
          multiply_tile<Value, 0, kTogether>(sums + n, weights.values[tile], word, tile_read);
          multiply_tile<Value, 1, kTogether>(sums + n, weights.values[tile + 1], word, tile_read + kTileInputs * 2);
        }
      }
    }
    if (next < end) load_weights(weights, values, metadata, first_chunk + next, lane);
    stage = work.stage_bytes - stage;
  }

  // the sums of all warps: [warps_k, warps_m, kTokenTiles, 32 lanes], then the bias of the block's outputs
  const int results = warps_m * kTokenTiles * 32;
  auto* sums_smem = reinterpret_cast<float4*>(ptx::shared_memory());
  auto* bias_smem = reinterpret_cast<float*>(sums_smem + work.warps_k * results);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    sums_smem[(warp * kTokenTiles + n) * 32 + lane] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
  }
  if (thread < block_outputs) bias_smem[thread] = to_float(own_bias);
  __syncthreads();

  const auto sum_of_warps = [&](int i) {
    return sum_of(work.warps_k, [&](int k) { return sums_smem[k * results + i]; });
  };
  const auto store_y = [&](float4 sum, int i) {
    const int n = i / 32 % kTokenTiles, first_row = i / (32 * kTokenTiles) * static_cast<int>(kPanelRows);
    const float parts[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first_row + i % 32 / 4 + j / 2 * 8, token = n * kTileTokens + i % 4 * 2 + j % 2;
      if (first_output + row >= work.out_features || token >= tokens) continue;
      store(y + static_cast<int64_t>(token) * work.out_features + first_output + row, parts[j] + bias_smem[row]);
    }
  };

  if (work.splits == 1) {
    for (int i = thread; i < results; i += blockDim.x) store_y(sum_of_warps(i), i);
    return;
  }
  const int64_t split_stride = static_cast<int64_t>(gridDim.x) * results;
  partial += static_cast<int64_t>(blockIdx.x) * results;
  for (int i = thread; i < results; i += blockDim.x) partial[blockIdx.y * split_stride + i] = sum_of_warps(i);
  __threadfence();
  __syncthreads();
  auto* is_last = reinterpret_cast<int*>(sums_smem);
  // the count goes back to zero by itself
  if (thread == 0) *is_last = atomicInc(arrived + blockIdx.x, work.splits - 1) == work.splits - 1u;
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  for (int i = thread; i < results; i += blockDim.x) {
    // what other multiprocessors wrote is in L2
    store_y(sum_of(work.splits, [&](int k) { return __ldcg(partial + k * split_stride + i); }), i);
  }
}

// Warps of a block and blocks that share outputs.
struct Division {
  int warps_m_log2, warps_k, splits;

  int64_t groups(int64_t panels) const { return (panels + (1 << warps_m_log2) - 1) >> warps_m_log2; }
  int warps() const { return warps_k << warps_m_log2; }
};

constexpr int token_tiles_of(int64_t tokens) { return tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8; }

// Of a block that shares its outputs with others.
int64_t split_chunks(const Division& division, int64_t chunks) { return (chunks + division.splits - 1) / division.splits; }

int64_t stage_bytes(const Division& division, int64_t tokens) {
  return int64_t{division.warps_k} * x_rows(static_cast<int>(tokens)) * kRowBytes;
}

int64_t shared_bytes(const Division& division, int64_t tokens, int64_t chunks) {
  const int64_t x_bytes = (split_chunks(division, chunks) > division.warps_k ? 2 : 1) * stage_bytes(division, tokens);
  const int64_t sums_bytes = int64_t{4} * kResultFloats * division.warps() * token_tiles_of(tokens);
  const int64_t bias_bytes = (kPanelRows << division.warps_m_log2) * int64_t{4};
  return std::max(x_bytes, sums_bytes + bias_bytes);
}

int64_t partial_bytes(const Division& division, int64_t tokens, int64_t panels) {
  if (division.splits == 1) return 0;
  const int64_t warps = division.groups(panels) << division.warps_m_log2;
  return division.splits * warps * token_tiles_of(tokens) * kResultFloats * int64_t{4};
}

// Of a warp for a chunk: the time of as many instructions as shared memory takes for its ldmatrix, 4 KB at 128 bytes a
// clock for each tile of tokens, in which four a clock could be issued. There are fewer (tests/test_cuda_module.py).
constexpr double instructions_of(int64_t token_tiles) { return 128.0 * token_tiles; }

// The blocks of a division, for the formula of division.h. A warp has asked for one chunk and the x of it, and goes on
// to the next when they have come.
Blocks blocks_of(const Division& division, const Card& card, int64_t tokens, int64_t panels, int64_t chunks) {
  constexpr double kChunkBytes = kChunkValues * 2 + kChunkWords * 4;
  const int64_t groups = division.groups(panels), count = groups * division.splits;
  const double x_bytes = static_cast<double>(tokens) * (kChunkInputs * 2);
  const double block_chunks = static_cast<double>(split_chunks(division, chunks));
  const double partial = 2.0 * partial_bytes(division, tokens, panels) / count;
  const int resident = resident_blocks(card, shared_bytes(division, tokens, chunks), 32 * division.warps(),
                                       registers_of(token_tiles_of(tokens)));
  return {count,
          resident,
          block_chunks * kChunkBytes * (1 << division.warps_m_log2),
          block_chunks * x_bytes + partial,
          division.warps() * kChunkBytes + division.warps_k * x_bytes,
          block_chunks * (1 << division.warps_m_log2) * instructions_of((x_rows(static_cast<int>(tokens)) + kTileTokens - 1) / kTileTokens),
          division.warps(),
          division.splits > 1};
}

Division best_division(const Card& card, int64_t tokens, int64_t panels, int64_t chunks) {
  Division best{0, 1, 1};
  double best_us = -1.0;
  for (int splits = 1; splits <= 8 && splits <= chunks; splits *= 2) {
    for (int warps_m_log2 = 0; warps_m_log2 <= 4 && int64_t{1} << warps_m_log2 <= panels; ++warps_m_log2) {
      for (int warps_k = 1; warps_k << warps_m_log2 <= kMaxWarps; warps_k *= 2) {
        const Division division{warps_m_log2, warps_k, splits};
        if (shared_bytes(division, tokens, chunks) > card.shared_bytes_per_block) continue;
        const double us = expected_us(card, blocks_of(division, card, tokens, panels, chunks));
        if (best_us >= 0.0 && us >= best_us) continue;
        best = division;
        best_us = us;
      }
    }
  }
  return best;
}

Division divide(const Card& card, int64_t tokens, int64_t panels, int64_t chunks) {
  return remembered<Division>(card, std::array{tokens, panels, chunks},
                              [&] { return best_division(card, tokens, panels, chunks); });
}

template <typename Value>
cudaError_t multiply(const Value* x, const Value* values, const uint32_t* metadata, const Value* bias, Value* y,
                     void* workspace, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (tokens == 0 || out_features == 0) return cudaSuccess;
  if (tokens < 0 || tokens > kLinear24Tokens || in_features % 4 != 0) return cudaErrorInvalidValue;
  if (out_features > INT32_MAX - kMaxWarps * kPanelRows) return cudaErrorInvalidValue;
  if (in_features > INT32_MAX - kChunkInputs) return cudaErrorInvalidValue;
  Card card;
  const cudaError_t error = this_card(card);
  if (error != cudaSuccess) return error;
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const int64_t chunks = (in_features + kChunkInputs - 1) / kChunkInputs;
  const Division division = divide(card, tokens, panels, chunks);
  const int64_t groups = division.groups(panels);
  // chunks are counted in int
  if (panels * chunks > INT32_MAX) return cudaErrorInvalidValue;
  const Work work{static_cast<int>(out_features),
                  static_cast<int>(in_features),
                  static_cast<int>(tokens),
                  static_cast<int>(panels),
                  static_cast<int>(chunks),
                  division.warps_m_log2,
                  division.warps_k,
                  division.splits,
                  static_cast<int>(split_chunks(division, chunks)),
                  static_cast<int>(stage_bytes(division, tokens))};
  auto* partial = static_cast<float4*>(workspace);
  auto* arrived = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) +
                                              partial_bytes(division, tokens, panels));
  if (division.splits > 1) {
    const cudaError_t cleared = cudaMemsetAsync(arrived, 0, groups * sizeof(unsigned), stream);
    if (cleared != cudaSuccess) return cleared;
  }
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(groups), division.splits), 32 * division.warps(),
                  shared_bytes(division, tokens, chunks), stream, x, values, metadata, bias, y, partial, arrived, work);
  };
  switch (token_tiles_of(tokens)) {
    case 1: return start(linear_24_kernel<Value, 1>);
    case 2: return start(linear_24_kernel<Value, 2>);
    case 4: return start(linear_24_kernel<Value, 4>);
    default: return start(linear_24_kernel<Value, 8>);
  }
}

}  // namespace

cudaError_t linear_24_workspace(int64_t tokens, int64_t out_features, int64_t in_features, int64_t* bytes) {
  *bytes = 0;
  if (tokens == 0 || out_features == 0) return cudaSuccess;
  if (tokens < 0 || tokens > kLinear24Tokens) return cudaErrorInvalidValue;
  Card card;
  const cudaError_t error = this_card(card);
  if (error != cudaSuccess) return error;
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const Division division = divide(card, tokens, panels, (in_features + kChunkInputs - 1) / kChunkInputs);
  if (division.splits > 1) {
    *bytes = partial_bytes(division, tokens, panels) + division.groups(panels) * 4;
  }
  return cudaSuccess;
}

cudaError_t linear_24(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint32_t* metadata,
                      const __nv_bfloat16* bias, __nv_bfloat16* y, void* workspace, int64_t tokens,
                      int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return multiply(x, values, metadata, bias, y, workspace, tokens, out_features, in_features, stream);
}

cudaError_t linear_24(const __half* x, const __half* values, const uint32_t* metadata, const __half* bias, __half* y,
                      void* workspace, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  return multiply(x, values, metadata, bias, y, workspace, tokens, out_features, in_features, stream);
}

}  // namespace sparsekern::cuda
