// linear_24, 1 to 64 tokens: the weight streams through the tensor cores once, at the speed of memory.
//
// y^T = W x^T + bias by mma.sp.m16n8k32: its rows are outputs, its columns tokens, so that 8 tokens cost what one
// does. A warp multiplies steps of 8 tiles: a chunk, 16 outputs x 256 inputs, or from 17 tokens on 32 outputs x 128
// inputs. Nine or ten loads a lane, all under way at once, go straight to the registers that mma.sp reads. A block has
// warps_m x warps_k warps: the former share x, each with outputs of its own, the latter share the outputs, each with
// every warps_k-th step. Their sums meet in shared memory, in a fixed order. Where that leaves multiprocessors idle,
// `splits` blocks share the steps of the same outputs; the last one to come adds what they left in `workspace`, again
// in a fixed order: the same bits every time.
//
// x comes a step at a time, row by row, 16 bytes apart from a multiple of 256, where ldmatrix finds B fragments
// without bank conflicts. There is room for two: while one is multiplied the next one is on its way, so that one
// barrier a step says both that it has come and that the other is free. Barriers are __syncthreads: of those with a
// number of their own a Hopper multiprocessor has 64 for all its blocks together. Inputs past the last one are zeros
// in both.
//
// Bytes: 4608 a step of 4096 weights (1.125 a dense element, 0.5625 of dense bf16), read once, and of x, from L2, 512
// for each token and warps_m steps, or 256. Of a warp for a step, at most 158, 156, 194 and 252 instructions up to 8,
// 16, 32 and 64 tokens: 1.2 to 2 of a thread for a dense element, of which an H200 affords 7.8. ldmatrix takes 32, 64,
// 64 and 128 cycles of shared memory, where memory takes some 250 for a step. Registers: 64, 75, 100 and 125 (sm_90a,
// nvcc 13.0), so 32, 25, 19 and 16 warps on a multiprocessor at most, with 74 KB of weights under way and more, where
// latency x bandwidth = 0.8 us x 4.3 TB/s / 132 = 26 KB. How the work is divided, division.h decides. All of this is
// counted, none of it measured.

#include <algorithm>
#include <cstddef>

#include "division.h"
#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kTileTokens = 8;
constexpr int kPieceInputs = 8;                   // 16 bytes
constexpr int kSelectors = 2;                     // tiles whose positions share a register
constexpr int kResultFloats = 32 * 4;             // a warp's sums of 16 outputs x 8 tokens

// Warps of a block at most, and blocks of so many that a multiprocessor must have room for: 64 or 128 registers.
constexpr int kMaxWarps = 16;
constexpr int blocks_by_bounds(int token_tiles) { return token_tiles == 1 ? 2 : 1; }
// The most registers that a thread has (tests/test_cuda_module.py), given out by eights.
constexpr int registers_of(int token_tiles) {
  return token_tiles == 1 ? 64 : token_tiles == 2 ? 80 : token_tiles == 4 ? 104 : 128;
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// What a warp multiplies at once: 8 tiles, a step. Of one panel they are a chunk; from 17 tokens on they are of two
// panels by half of its inputs, so that one ldmatrix of x serves both.
__host__ __device__ constexpr int panels_of(int token_tiles) { return token_tiles >= 4 ? 2 : 1; }

template <int kPanels>
struct Step {
  static constexpr int kTiles = kChunkTiles / kPanels;
  static constexpr int kInputs = kTiles * static_cast<int>(kTileInputs);
  static constexpr int kRowBytes = kInputs * 2 + 16;  // of x in shared memory
};

// How the work is divided, worked out once on the host: a block's first instructions are on the way of its first load.
struct Work {
  int out_features, in_features, tokens, panels, chunks;
  int warps_m_log2, warps_k;
  int splits, split_steps;  // blocks that share outputs, and steps of each; the last have fewer
  int stage_bytes;          // of shared memory: the x of a step for each of warps_k
};

// What a lane holds of a step.
template <int kPanels>
struct Weights {
  uint32_t values[kPanels][Step<kPanels>::kTiles][4];
  uint32_t metadata[kPanels][4 / kPanels];
};

// A step of the panels that begin with these chunks.
template <typename Value, int kPanels>
__device__ __forceinline__ void load_weights(Weights<kPanels>& weights, const Value* values, const uint32_t* metadata,
                                             const int (&first_chunks)[kPanels], int step, int lane) {
  constexpr int kTileValues = kChunkValues / kChunkTiles;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    const int64_t chunk = first_chunks[p] + step / kPanels;
    const int first_tile = step % kPanels * Step<kPanels>::kTiles;
    const Value* values_read = values + chunk * kChunkValues + first_tile * kTileValues + lane * 8;
#pragma unroll
    for (int tile = 0; tile < Step<kPanels>::kTiles; ++tile) {
      ptx::load_once(weights.values[p][tile], values_read + tile * kTileValues);
    }
    ptx::load_once(weights.metadata[p], metadata + chunk * kChunkWords + lane * 4 + first_tile / kSelectors);
  }
}

// Asks for a warp's share of the x of a step, which starts at `input`: rows of 16 bytes a lane.
//   turn, turns  which of how many warps that share it
template <typename Value, int kPanels>
__device__ __forceinline__ void copy_x(unsigned char* x_smem, const Value* x, int input, int tokens, int in_features,
                                       int turn, int turns, int lane) {
  constexpr int kRowLanes = Step<kPanels>::kInputs / kPieceInputs, kRows = 32 / kRowLanes;
  input += lane % kRowLanes * kPieceInputs;
  const int there = max(min(in_features - input, kPieceInputs), 0);
  const Value* x_read = x + (there > 0 ? input : 0);
  unsigned char* x_smem_write = x_smem + lane % kRowLanes * 16;
  // cp.async moves 16 bytes between multiples of 16
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | in_features * sizeof(Value)) % 16 == 0;
#pragma unroll 1
  for (int row = turn * kRows + lane / kRowLanes; row < tokens; row += turns * kRows) {
    const Value* from = x_read + static_cast<int64_t>(row) * in_features;
    unsigned char* to = x_smem_write + row * Step<kPanels>::kRowBytes;
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

// sums += a step's tile times kTogether tiles of tokens of x, from tile n on
template <typename Value, int kTile, int kTogether, int kTokenTiles, int kPanels>
__device__ __forceinline__ void multiply_tile(float (&sums)[kPanels][kTokenTiles][4], const Weights<kPanels>& weights,
                                              const unsigned char* x_smem_read, int n) {
  uint32_t x_reg[kTogether][4];
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    ptx::ldmatrix(x_reg[i], x_smem_read + i * (kTileTokens * Step<kPanels>::kRowBytes) + kTile * (kTileInputs * 2));
  }
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      ptx::mma_sp_m16n8k32<Value, kTile % kSelectors>(sums[p][n + i], weights.values[p][kTile], x_reg[i],
                                                      weights.metadata[p][kTile / kSelectors]);
    }
  }
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
    float4* __restrict__ partial,           // [splits, gridDim.x, results], where splits > 1
    unsigned* __restrict__ arrived,         // [gridDim.x] zero before and after, where splits > 1
    Work work) {
  constexpr int kPanels = panels_of(kTokenTiles), kRowBytes = Step<kPanels>::kRowBytes;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warps_m = 1 << work.warps_m_log2;
  const int warp_m = warp & (warps_m - 1), warp_k = warp >> work.warps_m_log2;
  const int begin = blockIdx.y * work.split_steps, end = min(begin + work.split_steps, work.chunks * kPanels);

  int first_chunks[kPanels];
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    // past the last panel: the last one again, never stored
    const int owner = (static_cast<int>(blockIdx.x) << work.warps_m_log2) + warp_m;
    first_chunks[p] = min(owner * kPanels + p, work.panels - 1) * work.chunks;
  }
  Weights<kPanels> weights;
  if (begin + warp_k < end) load_weights(weights, values, metadata, first_chunks, begin + warp_k, lane);
  // one of the block's outputs for each of the first threads: on the way with the weight, not waited for at the end
  const int block_outputs = warps_m * (kPanels * static_cast<int>(kPanelRows));
  const int first_output = static_cast<int>(blockIdx.x) * block_outputs;
  const bool has_bias = bias != nullptr && thread < block_outputs && first_output + thread < work.out_features;
  const Value own_bias = has_bias ? bias[first_output + thread] : Value{};

  // fewer than 8 tokens have as many rows, a lane without one reads the last; more have all rows, some never written:
  // what stands there reaches only columns that are never stored
  const int tokens = work.tokens, rows = x_rows(tokens);
  unsigned char* x_smem = ptx::shared_memory() + warp_k * rows * kRowBytes;
  const unsigned char* x_smem_read = x_smem + min(lane % 8, rows - 1) * kRowBytes + lane / 8 * 16;
  const auto ask_for_x = [&](int step, int stage) {
    if (step >= end) return;
    copy_x<Value, kPanels>(x_smem + stage, x, step * Step<kPanels>::kInputs, tokens, work.in_features, warp_m, warps_m,
                           lane);
    ptx::cp_async_commit();
  };

  float sums[kPanels][kTokenTiles][4] = {};
  // where in shared memory the x of these steps lies, before or behind that of the next ones
  int stage = 0;
  ask_for_x(begin + warp_k, stage);
  // a warp without a step goes along: the barrier is for all
#pragma unroll 1
  for (int first = begin; first < end; first += work.warps_k) {
    ptx::cp_async_wait<0>();
    // all x of these steps has come, and nobody reads the other stage any more
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
        multiply_tile<Value, 0, kTogether>(sums, weights, tokens_read, n);
        multiply_tile<Value, 1, kTogether>(sums, weights, tokens_read, n);
        multiply_tile<Value, 2, kTogether>(sums, weights, tokens_read, n);
        multiply_tile<Value, 3, kTogether>(sums, weights, tokens_read, n);
        if constexpr (kPanels == 1) {
          multiply_tile<Value, 4, kTogether>(sums, weights, tokens_read, n);
          multiply_tile<Value, 5, kTogether>(sums, weights, tokens_read, n);
          multiply_tile<Value, 6, kTogether>(sums, weights, tokens_read, n);
          multiply_tile<Value, 7, kTogether>(sums, weights, tokens_read, n);
        }
      }
    }
    if (next < end) load_weights(weights, values, metadata, first_chunks, next, lane);
    stage = work.stage_bytes - stage;
  }

  // the sums of all warps: [warps_k, warps_m, kPanels, kTokenTiles, 32 lanes], then the bias of the block's outputs
  const int results = warps_m * (kPanels * kTokenTiles * 32);
  auto* sums_smem = reinterpret_cast<float4*>(ptx::shared_memory());
  auto* bias_smem = reinterpret_cast<float*>(sums_smem + work.warps_k * results);
  __syncthreads();
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float(&sum)[4] = sums[p][n];
      sums_smem[((warp * kPanels + p) * kTokenTiles + n) * 32 + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
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

constexpr int token_tiles_of(int64_t tokens) { return tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8; }
constexpr int panels_of_tokens(int64_t tokens) { return panels_of(token_tiles_of(tokens)); }

// Warps of a block and blocks that share outputs.
struct Division {
  int warps_m_log2, warps_k, splits;

  int warps() const { return warps_k << warps_m_log2; }
};

// Blocks side by side, each with outputs of its own.
int64_t groups_of(const Division& division, int64_t tokens, int64_t panels) {
  const int64_t block_panels = int64_t{panels_of_tokens(tokens)} << division.warps_m_log2;
  return (panels + block_panels - 1) / block_panels;
}

// Of a block that shares its outputs with others.
int64_t split_steps(const Division& division, int64_t tokens, int64_t chunks) {
  return (chunks * panels_of_tokens(tokens) + division.splits - 1) / division.splits;
}

int64_t stage_bytes(const Division& division, int64_t tokens) {
  const int row_bytes = panels_of_tokens(tokens) == 1 ? Step<1>::kRowBytes : Step<2>::kRowBytes;
  return int64_t{division.warps_k} * x_rows(static_cast<int>(tokens)) * row_bytes;
}

int64_t sums_bytes(const Division& division, int64_t tokens) {
  return int64_t{4} * kResultFloats * division.warps() * panels_of_tokens(tokens) * token_tiles_of(tokens);
}

int64_t shared_bytes(const Division& division, int64_t tokens, int64_t chunks) {
  const int64_t stages = split_steps(division, tokens, chunks) > division.warps_k ? 2 : 1;
  const int64_t bias_bytes = (kPanelRows * panels_of_tokens(tokens) << division.warps_m_log2) * int64_t{4};
  return std::max(stages * stage_bytes(division, tokens), sums_bytes(division, tokens) + bias_bytes);
}

int64_t partial_bytes(const Division& division, int64_t tokens, int64_t panels) {
  if (division.splits == 1) return 0;
  return division.splits * groups_of(division, tokens, panels) * sums_bytes(division, tokens) / division.warps_k;
}

// Of a warp for a step: instructions (tests/test_cuda_module.py), and cycles of shared memory for its ldmatrix, 512 bytes
// for each tile of tokens and of inputs.
constexpr double instructions_of(int token_tiles) { return token_tiles <= 2 ? 158 : 110 + 20.0 * token_tiles; }
double ldmatrix_clocks_of(int64_t tokens) {
  const int token_tiles = (x_rows(static_cast<int>(tokens)) + kTileTokens - 1) / kTileTokens;
  return 32.0 * token_tiles / panels_of_tokens(tokens);
}

// The blocks of a division, for the formula of division.h. A warp has asked for one step and the x of it, and goes on
// to the next when they have come.
Blocks blocks_of(const Division& division, const Card& card, int64_t tokens, int64_t panels, int64_t chunks) {
  constexpr double kStepBytes = kChunkValues * 2 + kChunkWords * 4;
  const int64_t count = groups_of(division, tokens, panels) * division.splits;
  const double x_bytes = static_cast<double>(tokens) * (kChunkInputs * 2) / panels_of_tokens(tokens);
  const double block_steps = static_cast<double>(split_steps(division, tokens, chunks));
  const double partial = 2.0 * partial_bytes(division, tokens, panels) / count;
  const int resident = resident_blocks(card, shared_bytes(division, tokens, chunks), 32 * division.warps(),
                                       registers_of(token_tiles_of(tokens)));
  return {count,
          resident,
          block_steps * kStepBytes * (1 << division.warps_m_log2),
          block_steps * x_bytes + partial,
          division.warps() * kStepBytes + division.warps_k * x_bytes,
          block_steps * (1 << division.warps_m_log2) * instructions_of(token_tiles_of(tokens)),
          division.warps(),
          division.splits > 1,
          block_steps * ((1 << division.warps_m_log2) * ldmatrix_clocks_of(tokens) + x_bytes / 128)};
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
  const int64_t groups = groups_of(division, tokens, panels);
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
                  static_cast<int>(split_steps(division, tokens, chunks)),
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
                  shared_bytes(division, tokens, chunks), stream, x, values, metadata, bias, y, partial, arrived,
                  work);
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
    *bytes = partial_bytes(division, tokens, panels) + groups_of(division, tokens, panels) * 4;
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
