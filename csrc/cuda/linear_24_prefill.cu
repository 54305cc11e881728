// linear_24 for many tokens: the sparse product of the tensor cores, mma.sp, on tiles of outputs x tokens.
//
// D = W x^T: W is the sparse operand, 16 outputs x 32 inputs an instruction, x^T the dense one, 32 inputs x 8 tokens.
//
// A block owns Tile::kOutputs x Tile::kTokens of D and walks the inputs in stages of 64. Its threads copy a stage of x to
// shared memory with cp.async, kStages ahead; pieces of 16 bytes are swizzled, so that neither the copies nor ldmatrix
// meet in a bank. The weight needs no shared memory: it lies in the order of the instruction's registers, so that 16
// bytes are a lane's part of a tile, asked for Tile::kAhead steps of 32 inputs before they are multiplied; the warps of
// a block that own the same outputs meet in the L1 cache. A warp refills each register of x and W as soon as its last
// product has read it, so nothing waits between stages but for the barrier. At the end D, with the bias added and
// rounded, is turned in shared memory, and y is written 16 bytes a thread.
//
// Past the last token or input zeros are read; past the last output a tile is computed again and not stored.
//
// What the large tile, 256 outputs x 128 tokens, costs for 32 inputs: 256 instructions, which are 512 cycles of an sm_80
// multiprocessor's tensor cores (2048 multiply-adds a cycle, the pruned half counted); from the L2 cache 8 KB of values,
// 1 KB of metadata and 8 KB of x, 34 of some 47 bytes a cycle; through L1 and shared memory 8 KB of x written, 32 KB
// read by ldmatrix and 18 KB of W, 464 cycles of 128 bytes. Predicted on sm_80: 60 to 75 % of the tensor cores' rate.
// sm_86 and sm_89 multiply at half of that rate or less for the same traffic, so nearer to it. sm_90 needs 256 cycles for
// the products but the same 464 for L1: at most 55 % of its sparse rate, 1.1 of its dense one. Its own instruction,
// wgmma.sp, reads x from shared memory once for four warps; this kernel serves there without it. Nothing of this has
// been measured on a card yet.
//
//                      outputs x tokens  threads  registers  blocks a multiprocessor  bytes of shared memory
//   Large              256 x 128         256      <= 254     1                        67584
//   Small               64 x 64          128      <= 128     4                        32768
//   Unaligned           64 x 64          128      <= 138     2                        32768

#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

// of the instruction: outputs are kPanelRows, inputs kTileInputs
constexpr int kMmaTokens = 8;

constexpr int kPanel = kPanelRows;
constexpr int kChunk = kChunkInputs;
constexpr int kStepInputs = kTileInputs;
constexpr int kChunkSteps = kChunkTiles;

constexpr int kWarp = 32;
constexpr int kPiece = 8;         // elements in 16 bytes
constexpr int kStageInputs = 64;  // 128 bytes of a token: every bank once
constexpr int kStagePieces = kStageInputs / kPiece;
constexpr int kStageSteps = kStageInputs / kStepInputs;
constexpr int kStages = 4;
static_assert(kStages * kStageInputs == kChunk, "which stage's memory a step reads is known when it is compiled");

// tiles side by side along the tokens before the outputs move on: the resident blocks share rows of x and of W in L2
constexpr int kStripTiles = 8;

// rows are counted in 32 bits, and with kLinear24PrefillInputs the elements of a tile's rows of x
constexpr int64_t kMostRows = int64_t{1} << 30;

template <int kOutputWarps_, int kTokenWarps_, int kPanels_, int kTokenTiles_, int kAhead_, int kBlocks_,
          bool kAligned_ = true>
struct Tile {
  static constexpr int kOutputWarps = kOutputWarps_;
  static constexpr int kPanels = kPanels_;          // of a warp, 16 outputs each
  static constexpr int kTokenTiles = kTokenTiles_;  // of a warp, 8 tokens each
  static constexpr int kAhead = kAhead_;            // steps of values held in registers
  static constexpr int kBlocks = kBlocks_;          // a multiprocessor
  static constexpr bool kAligned = kAligned_;       // every row of x begins on 16 bytes
  static constexpr int kThreads = kOutputWarps_ * kTokenWarps_ * kWarp;
  static constexpr int kWarpOutputs = kPanels * kPanel;
  static constexpr int kWarpTokens = kTokenTiles * kMmaTokens;
  static constexpr int kOutputs = kOutputWarps_ * kWarpOutputs;
  static constexpr int kTokens = kTokenWarps_ * kWarpTokens;
  static constexpr int kStageElements = kTokens * kStageInputs;
  // of y in shared memory: a piece more, so that tokens do not begin in the same bank
  static constexpr int kRowElements = kOutputs + kPiece;
  static constexpr int kSharedElements =
      kStages * kStageElements > kTokens * kRowElements ? kStages * kStageElements : kTokens * kRowElements;
  static_assert(kChunkSteps % kAhead == 0, "which registers a step reads is known when it is compiled");
};

using Large = Tile<4, 2, 4, 8, 2, 1>;
// where Large would leave multiprocessors without a block
using Small = Tile<2, 2, 2, 4, 4, 4>;
// x is copied element by element
using Unaligned = Tile<2, 2, 2, 4, 2, 2, false>;

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Where a piece of a token lies in a stage, in elements: the same piece of 8 tokens lies in 8 different places.
__device__ inline int swizzled(int token, int piece) { return token * kStageInputs + (piece ^ token % 8) * kPiece; }

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename Value, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) linear_24_prefill_kernel(
    const Value* __restrict__ x,         // [tokens, in_features]
    const uint4* __restrict__ values,    // [panels, chunks, kChunkTiles, kWarp]
    const uint4* __restrict__ metadata,  // [panels, chunks, kWarp]
    const Value* __restrict__ bias,      // [out_features] or null
    Value* __restrict__ y,               // [tokens, out_features]
    int tokens, int out_features, int in_features,
    bool y_aligned) {  // every row of y begins on 16 bytes
  Value* shared = reinterpret_cast<Value*>(ptx::shared_memory());
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warp_output = warp % Tile::kOutputWarps * Tile::kWarpOutputs;
  const int warp_token = warp / Tile::kOutputWarps * Tile::kWarpTokens;

  // the last strip may be narrower
  const int strip_blocks = kStripTiles * ceil_div(out_features, Tile::kOutputs);
  const int strip = blockIdx.x / strip_blocks;
  const int in_strip = blockIdx.x % strip_blocks;
  const int strip_tiles = min(kStripTiles, ceil_div(tokens, Tile::kTokens) - strip * kStripTiles);
  const int first_token = (strip * kStripTiles + in_strip % strip_tiles) * Tile::kTokens;
  const int first_output = in_strip / strip_tiles * Tile::kOutputs;

  const int stages = ceil_div(in_features, kStageInputs);
  const int chunks = ceil_div(in_features, kChunk);

  // a thread copies the same piece of every kCopyTokens-th token
  constexpr int kCopyTokens = Tile::kThreads / kStagePieces;
  static_assert(Tile::kTokens % kCopyTokens == 0 && kCopyTokens % 8 == 0, "a thread's tokens are swizzled alike");
  const int x_token = threadIdx.x / kStagePieces;
  const int x_input = threadIdx.x % kStagePieces * kPiece;
  const int x_tokens = tokens - first_token - x_token;
  const Value* x_gmem_read = x + static_cast<int64_t>(first_token + x_token) * in_features + x_input;
  Value* x_smem_write = shared + swizzled(x_token, x_input / kPiece);
  const auto copy_x = [&](int slot, int stage) {
    const int left = in_features - stage * kStageInputs - x_input;
#pragma unroll
    for (int token = 0; token < Tile::kTokens; token += kCopyTokens) {
      const bool inside = token < x_tokens && left > 0;
      const Value* from = inside ? x_gmem_read + (token * in_features + stage * kStageInputs) : x;
      Value* to = x_smem_write + slot * Tile::kStageElements + token * kStageInputs;
      if constexpr (Tile::kAligned) {
        ptx::cp_async_16(to, from, inside ? 16 : 0);
      } else {
#pragma unroll 1
        for (int i = 0; i < kPiece; ++i) to[i] = inside && i < left ? from[i] : Value{};
      }
    }
    ptx::cp_async_commit();
  };

  // past the last panel: the last one again, never stored
  const int last_panel = (out_features - 1) / kPanel;
  const int panel = min((first_output + warp_output) / kPanel, last_panel);
  const int panels_after = last_panel - panel;
  const uint4* values_gmem_read = values + static_cast<int64_t>(panel) * chunks * (kChunkSteps * kWarp) + lane;
  const uint4* metadata_gmem_read = metadata + static_cast<int64_t>(panel) * chunks * kWarp + lane;
  // steps count from the current chunk
  uint32_t values_reg[Tile::kAhead][Tile::kPanels][4];
  const auto load_values = [&](int m, int step) {
    const int tile = min(m, panels_after) * chunks * kChunkSteps + step;
    ptx::load(values_reg[step % Tile::kAhead][m], values_gmem_read + tile * kWarp);
  };
  uint32_t metadata_reg[Tile::kPanels][4];
  const auto load_metadata = [&](int m) {
    ptx::load(metadata_reg[m], metadata_gmem_read + min(m, panels_after) * chunks * kWarp);
  };

  // ldmatrix: 8 tokens by the four pieces of a step
  const Value* x_smem_read[kStageSteps];
#pragma unroll
  for (int step = 0; step < kStageSteps; ++step) {
    x_smem_read[step] = shared + swizzled(warp_token + lane % 8, step * 4 + lane / 8);
  }
  uint32_t x_reg[Tile::kTokenTiles][4];
  const auto load_x = [&](int slot, int step, int n) {
    ptx::ldmatrix<4>(x_reg[n], x_smem_read[step] + slot * Tile::kStageElements + n * kMmaTokens * kStageInputs);
  };

  float d[Tile::kPanels][Tile::kTokenTiles][4] = {};

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) copy_x(stage, stage);
#pragma unroll
  for (int m = 0; m < Tile::kPanels && chunks > 0; ++m) {
    load_metadata(m);
#pragma unroll
    for (int step = 0; step < Tile::kAhead; ++step) load_values(m, step);
  }
  ptx::cp_async_wait<kStages - 1>();
  __syncthreads();
#pragma unroll
  for (int n = 0; n < Tile::kTokenTiles; ++n) load_x(0, 0, n);

  for (int chunk = 0; chunk < chunks; ++chunk) {
    const bool last_chunk = chunk + 1 == chunks;
    metadata_gmem_read += last_chunk ? 0 : kWarp;
#pragma unroll
    for (int step = 0; step < kChunkSteps; ++step) {
      const int slot = step / kStageSteps;
      const int stage = chunk * kStages + slot;
      const bool stage_ends = step % kStageSteps == kStageSteps - 1;
#pragma unroll
      for (int m = 0; m < Tile::kPanels; ++m) {
        const bool panels_end = m == Tile::kPanels - 1;
        if (panels_end && stage_ends) {
          // the next stage has come for all, and all have this one in registers: its memory is free
          ptx::cp_async_wait<kStages - 2>();
          __syncthreads();
          copy_x(slot, stage + kStages);
        }
        const uint32_t(&a)[4] = values_reg[step % Tile::kAhead][m];
        const uint32_t e = metadata_reg[m][step / 2];
#pragma unroll
        for (int n = 0; n < Tile::kTokenTiles; ++n) {
          // the selector is a constant of the instruction
          if (step % 2 == 0) {
            ptx::mma_sp_m16n8k32<Value, 0>(d[m][n], a, x_reg[n], e);
          } else {
            ptx::mma_sp_m16n8k32<Value, 1>(d[m][n], a, x_reg[n], e);
          }
          if (panels_end) load_x((step + 1) / kStageSteps % kStages, (step + 1) % kStageSteps, n);
        }
        if (step + Tile::kAhead < kChunkSteps || !last_chunk) load_values(m, step + Tile::kAhead);
        if (step == kChunkSteps - 1) load_metadata(m);
      }
      if (stage_ends && stage + 1 == stages) break;
    }
    values_gmem_read += kChunkSteps * kWarp;
  }

  // D lies as outputs x tokens, y as tokens x outputs
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Tile::kPanels; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_output + m * kPanel + half * 8 + lane / 4;
      const int output = first_output + row;
      const float row_bias = bias == nullptr || output >= out_features ? 0.0f : to_float(bias[output]);
#pragma unroll
      for (int n = 0; n < Tile::kTokenTiles; ++n) {
        Value* y_smem_write = shared + (warp_token + n * kMmaTokens + lane % 4 * 2) * Tile::kRowElements + row;
        store(y_smem_write, d[m][n][2 * half] + row_bias);
        store(y_smem_write + Tile::kRowElements, d[m][n][2 * half + 1] + row_bias);
      }
    }
  }
  __syncthreads();
  constexpr int kRowPieces = Tile::kOutputs / kPiece;
  for (int piece = threadIdx.x; piece < Tile::kTokens * kRowPieces; piece += Tile::kThreads) {
    const int row = piece / kRowPieces;
    const int column = piece % kRowPieces * kPiece;
    const int token = first_token + row;
    const int output = first_output + column;
    if (token >= tokens) break;
    const Value* y_smem_read = shared + row * Tile::kRowElements + column;
    Value* y_gmem_write = y + static_cast<int64_t>(token) * out_features + output;
    if (y_aligned && output < out_features) {
      *reinterpret_cast<uint4*>(y_gmem_write) = *reinterpret_cast<const uint4*>(y_smem_read);
    } else {
      for (int i = 0; i < kPiece && output + i < out_features; ++i) y_gmem_write[i] = y_smem_read[i];
    }
  }
}

bool aligned(const void* tensor, int64_t row) {
  return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && row % kPiece == 0;
}

template <typename Tile>
int64_t tiles(int tokens, int out_features) {
  return int64_t{ceil_div(tokens, Tile::kTokens)} * ceil_div(out_features, Tile::kOutputs);
}

template <typename Tile, typename Value>
cudaError_t launch_tiles(const Value* x, const Value* values, const uint32_t* metadata, const Value* bias, Value* y,
                         int tokens, int out_features, int in_features, cudaStream_t stream) {
  const int64_t blocks = tiles<Tile>(tokens, out_features);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kSharedBytes = Tile::kSharedElements * sizeof(Value);
  return launch(linear_24_prefill_kernel<Value, Tile>, static_cast<unsigned>(blocks), Tile::kThreads, kSharedBytes,
                stream, x, reinterpret_cast<const uint4*>(values), reinterpret_cast<const uint4*>(metadata), bias, y,
                tokens, out_features, in_features, aligned(y, out_features));
}

template <typename Value>
cudaError_t launch_best(const Value* x, const Value* values, const uint32_t* metadata, const Value* bias, Value* y,
                        int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (tokens == 0 || out_features == 0) return cudaSuccess;
  if (tokens > kMostRows || out_features > kMostRows || in_features > kLinear24PrefillInputs) {
    return cudaErrorInvalidConfiguration;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  const int rows = static_cast<int>(tokens), outputs = static_cast<int>(out_features);
  const auto launch_tile = !aligned(x, in_features)                    ? launch_tiles<Unaligned, Value>
                           : tiles<Large>(rows, outputs) < multiprocessors ? launch_tiles<Small, Value>
                                                                       : launch_tiles<Large, Value>;
  return launch_tile(x, values, metadata, bias, y, rows, outputs, static_cast<int>(in_features), stream);
}

}  // namespace

cudaError_t linear_24_prefill(const __nv_bfloat16* x, const __nv_bfloat16* values, const uint32_t* metadata,
                              const __nv_bfloat16* bias, __nv_bfloat16* y, int64_t tokens, int64_t out_features,
                              int64_t in_features, cudaStream_t stream) {
  return launch_best(x, values, metadata, bias, y, tokens, out_features, in_features, stream);
}

cudaError_t linear_24_prefill(const __half* x, const __half* values, const uint32_t* metadata, const __half* bias,
                              __half* y, int64_t tokens, int64_t out_features, int64_t in_features,
                              cudaStream_t stream) {
  return launch_best(x, values, metadata, bias, y, tokens, out_features, in_features, stream);
}

}  // namespace sparsekern::cuda
