// linear_bitmap_fragments: decode with an unstructured weight, 1 to 64 tokens, on dense tensor cores.
//
// A warp owns 16 outputs, above 16 tokens 32, and every warps_k-th segment of 256 inputs. It copies a segment's masks and
// kept values into shared memory as they lie, rebuilds one fragment of 16 x 16 weights after the other in registers, and
// multiplies each by up to 8 tiles of 8 tokens; meanwhile the next segment is under way, and where that one's cells lie
// is known one segment earlier still. Warps with the same segment and other outputs share x; those with the same outputs
// add their sums in shared memory.
//
// Where the outputs alone would not fill the card, blocks share them: each writes its sums, and a second kernel adds
// them up, always in the same order. How many warps and blocks share what, division.h decides.
//
// Counted, none of it measured, for an H200 at 50 % and up to 8, 16, 32 and 64 tokens:
//
//     instructions a dense weight          3.2   3.4   3.6   4.2    to rebuild and multiply
//                                          4.0   4.2   4.4   5.0    with what the loop does beside
//     clocks of shared memory, 256 weights  13    15    15    19    which memory brings in 19
//     registers, sm_90a                     80    90   130   166
//
// and 0.2 instructions more where a segment has more than 12 rows of cells to copy. An H200 affords 7.8. Of each tile of
// tokens two HMMA and a load of x are left; that load is what shared memory has no time for at 64 tokens, so that there
// it meets two panels. A segment of a panel is 4.9 KB on average: 8 to 16 panels of a multiprocessor have 39 to 78 KB of
// weights under way while as much is multiplied (tests/cuda_on_host/divisions.py); latency x bandwidth is 26 KB.

#include <algorithm>

#include "bitmap_fragments.cuh"
#include "division.h"

namespace sparsekern::cuda {
namespace {

constexpr int kTileTokens = 8;
constexpr int kThreads = 256;  // of the small kernels
constexpr int kPieceInputs = 8;  // 16 bytes of x
// of weights and x: while one is multiplied the next one is under way
constexpr int kStages = 2;
constexpr int kMostWarps = 8;

__host__ __device__ constexpr int token_tiles_of(int64_t tokens) {
  return tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
}

// That a warp owns: what is loaded of x meets them all.
__host__ __device__ constexpr int panels_of(int token_tiles) { return token_tiles <= 2 ? 1 : 2; }

// Of x in shared memory.
__host__ __device__ constexpr int x_rows(int64_t tokens) {
  return tokens < kTileTokens ? static_cast<int>(tokens) : token_tiles_of(tokens) * kTileTokens;
}

// A stage of x is a segment or half of one, where many tokens would leave no room for weights.
__host__ __device__ constexpr int x_blocks_of(int token_tiles) {
  return token_tiles <= 2 ? kSegmentBlocks : kSegmentBlocks / 2;
}

// 16 bytes more than the inputs, so that the rows of a fragment lie in different banks.
__host__ __device__ constexpr int x_row_bytes_of(int token_tiles) { return x_blocks_of(token_tiles) * 128 + 16; }

struct Work {
  int64_t out_features;
  int x_row_inputs, tokens, panels, segments;
  int warps_m, warps_k, splits;
  int cell_rows, capacity;
  // between the rows of x that a lane copies: tokens, bytes of x, bytes in shared memory
  int x_row_step, x_smem_step;
  int64_t x_step;
};

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename Value, int kTokenTiles>
__global__ void __launch_bounds__(32 * kMostWarps, panels_of(kTokenTiles) == 1 ? 2 : 1) linear_bitmap_fragments_kernel(
    const Value* __restrict__ x,              // [tokens, x_row_inputs], every row on 16 bytes
    const uint32_t* __restrict__ masks,       // [panels, segments, kSegmentWords]
    const unsigned char* __restrict__ cells,  // [cell_rows, kQuadRowBytes]
    const int32_t* __restrict__ quad_rows,    // [panels, segments, kLaneQuads] and the end
    const Value* __restrict__ bias,           // [out_features] or null
    Value* __restrict__ y,                    // [tokens, out_features], where splits == 1
    float* __restrict__ partial,              // [splits, tokens, out_features], where splits > 1
    Work work) {
  constexpr int kPanels = panels_of(kTokenTiles), kXBlocks = x_blocks_of(kTokenTiles);
  constexpr int kXInputs = kXBlocks * 64, kXRowBytes = x_row_bytes_of(kTokenTiles);
  const int lane = ptx::lane(), warp = threadIdx.x / 32;
  const int warps_m = work.warps_m, warp_m = warp % warps_m, warp_k = warp / warps_m;
  const int tokens = work.tokens, segments = work.segments, capacity = work.capacity;
  // fewer than 8 tokens have as many rows, a lane without one reads the last; more have all rows, some never written:
  // what stands there reaches only columns that are never stored
  const int rows = x_rows(tokens);
  const Spread spread = spread_of(lane);

  const int panel_bytes = warp_bytes(capacity);
  unsigned char* const warp_smem = ptx::shared_memory() + warp * (kStages * kPanels * panel_bytes);
  unsigned char* const x_smem = ptx::shared_memory() + (blockDim.x / 32) * (kStages * kPanels * panel_bytes) +
                                kGuardRows * kCellRowBytes + warp_k * (kStages * rows * kXRowBytes);

  // all warps of a block come here equally often
  const auto meet = [&] {
    if (warps_m == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  const int step = work.warps_k * work.splits;
  int segment = blockIdx.y * work.warps_k + warp_k;
  // past the last panel: the last one again, never stored
  const unsigned char* masks_read[kPanels];
  const int32_t* quads_read[kPanels];
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    const int owner = static_cast<int>(blockIdx.x) * warps_m + warp_m;
    const int panel = min(owner * kPanels + p, work.panels - 1);
    const int64_t part = static_cast<int64_t>(panel) * segments + segment;
    masks_read[p] = reinterpret_cast<const unsigned char*>(masks) + part * kMaskBytes + lane * 16;
    quads_read[p] = quad_rows + part * kLaneQuads + lane / 4;
  }
  QuadRows quads[kPanels];
  const auto read_quads = [&](int of_segment) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      quads[p] = of_segment < segments ? rows_of(quads_read[p]) : QuadRows{0, 0};
      quads_read[p] += step * kLaneQuads;
    }
  };
  const auto copy_weights = [&](int of_segment, unsigned char* stage_smem) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      copy_segment(stage_smem + p * panel_bytes, masks_read[p], cells, quads[p],
                   of_segment < segments, work.cell_rows, capacity, lane);
      masks_read[p] += step * kMaskBytes;
    }
  };

  // as many lanes as a stage has 16 bytes of a token; zeros behind the last input
  constexpr int kPieces = kXInputs / kPieceInputs;
  const int first_row = warp_m * (32 / kPieces) + lane / kPieces;
  // the last ones ahead may lie behind 2^31
  uint32_t input = segment * static_cast<uint32_t>(kSegmentInputs) + lane % kPieces * kPieceInputs;
  const auto* x_read =
      reinterpret_cast<const unsigned char*>(x + static_cast<int64_t>(first_row) * work.x_row_inputs + input);
  unsigned char* const x_smem_write = x_smem + first_row * kXRowBytes + lane % kPieces * 16;
  // a stage of inputs from `ahead` of this segment's first on
  const auto copy_x = [&](int x_stage_at, int ahead) {
    const int bytes = input + ahead < static_cast<uint32_t>(work.x_row_inputs) ? 16 : 0;
    const unsigned char* from = x_read + ahead * 2;
    unsigned char* to = x_smem_write + x_stage_at;
#pragma unroll 1
    for (int row = first_row; row < tokens; row += work.x_row_step) {
      ptx::cp_async_16(to, from, bytes);
      from += work.x_step;
      to += work.x_smem_step;
    }
  };

  float sums[kPanels][kTokenTiles][4] = {};
  // a lane's place in the cells of a segment
  struct Place {
    uint32_t run;
    int column;
  };
  const auto begin = [&](Place (&places)[kPanels], const unsigned char* stage_smem) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) places[p] = {0, column_of(stage_smem + p * panel_bytes, lane)};
  };
  // a stage of x by the blocks of weights from first_block on
  const auto multiply = [&](int x_stage_at, const unsigned char* stage_smem, int first_block, Place (&places)[kPanels]) {
    const unsigned char* x_smem_read =
        x_smem + x_stage_at + min(lane / 4, rows - 1) * kXRowBytes + lane % 4 * 32;
    const uint32_t last_run = capacity * kCellValues * 8;
#pragma unroll
    for (int block = 0; block < kXBlocks; ++block) {
      uint32_t mask[kPanels];
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        mask[p] = *reinterpret_cast<const uint32_t*>(stage_smem + p * panel_bytes + (first_block + block) * 128 +
                                                     lane * 4);
        places[p].run = min(places[p].run, last_run);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t a[kPanels][2][4];
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          const unsigned char* cells_smem_read = stage_smem + p * panel_bytes + kMaskBytes;
          auto& [run, column] = places[p];
          expand(a[p][0], mask[p] >> 16 * pair, spread, run, cells_smem_read, column);
          expand(a[p][1], mask[p] >> (16 * pair + 8), spread, run, cells_smem_read, column);
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4 x_reg =
              *reinterpret_cast<const uint4*>(x_smem_read + n * (kTileTokens * kXRowBytes) + block * 128 + pair * 16);
          const uint32_t b_0[2] = {x_reg.x, x_reg.y}, b_1[2] = {x_reg.z, x_reg.w};
#pragma unroll
          for (int p = 0; p < kPanels; ++p) ptx::mma_m16n8k16<Value>(sums[p][n], a[p][0], b_0);
#pragma unroll
          for (int p = 0; p < kPanels; ++p) ptx::mma_m16n8k16<Value>(sums[p][n], a[p][1], b_1);
        }
      }
    }
  };

  // quads are asked for one segment before they are needed: the copies would wait for them
  read_quads(segment);
  copy_weights(segment, warp_smem);
  read_quads(segment + step);
  copy_x(0, 0);
  ptx::cp_async_commit();
  const int step_inputs = step * static_cast<int>(kSegmentInputs);
  const int x_stage_bytes = rows * kXRowBytes;
  // the stages that are multiplied, and those that come next
  unsigned char *stage_smem = warp_smem, *next_smem = warp_smem + kPanels * panel_bytes;
  int x_stage_at = 0, next_x_stage_at = x_stage_bytes;
#pragma unroll 1
  for (int first = segment - warp_k; first < segments; first += step) {
    // the last stages are not read any more
    meet();
    Place places[kPanels];
    if constexpr (kXBlocks == kSegmentBlocks) {
      copy_x(next_x_stage_at, step_inputs);
      copy_weights(segment + step, next_smem);
      ptx::cp_async_commit();
      read_quads(segment + 2 * step);
      ptx::cp_async_wait<1>();
      meet();
      begin(places, stage_smem);
      multiply(x_stage_at, stage_smem, 0, places);
      x_stage_at = next_x_stage_at;
      next_x_stage_at = x_stage_bytes - x_stage_at;
    } else {
      // the second half of x comes first: it must be there before the next weights are
      copy_x(x_stage_bytes, kXInputs);
      ptx::cp_async_commit();
      copy_weights(segment + step, next_smem);
      ptx::cp_async_commit();
      read_quads(segment + 2 * step);
      ptx::cp_async_wait<2>();
      meet();
      begin(places, stage_smem);
      multiply(0, stage_smem, 0, places);
      ptx::cp_async_wait<1>();
      meet();
      copy_x(0, step_inputs);
      ptx::cp_async_commit();
      multiply(x_stage_bytes, stage_smem, kXBlocks, places);
    }
    segment += step;
    unsigned char* const done_smem = stage_smem;
    stage_smem = next_smem;
    next_smem = done_smem;
    input += step_inputs;
    x_read += static_cast<int64_t>(step) * (kSegmentInputs * 2);
  }
  // nothing is under way but zeros
  ptx::cp_async_wait<0>();

  // the sums of all warps: [warps_k, warps_m, kPanels, kTokenTiles, 32 lanes]
  auto* sums_smem = reinterpret_cast<float4*>(ptx::shared_memory());
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPanels * kTokenTiles; ++i) {
    const float* from = sums[i / kTokenTiles][i % kTokenTiles];
    sums_smem[(warp * (kPanels * kTokenTiles) + i) * 32 + lane] = make_float4(from[0], from[1], from[2], from[3]);
  }
  __syncthreads();

  const int results = warps_m * kPanels * kTokenTiles * 32;
  for (int i = threadIdx.x; i < results; i += blockDim.x) {
    float4 sum = sums_smem[i];
    for (int k = 1; k < work.warps_k; ++k) {
      const float4 part = sums_smem[k * results + i];
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    const int64_t first_panel = static_cast<int64_t>(blockIdx.x) * warps_m * kPanels;
    const int64_t first_out = (first_panel + i / (32 * kTokenTiles)) * kFragmentRows;
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

// The rows of x, each on 16 bytes and zeros behind it.
template <typename Value>
__global__ void __launch_bounds__(kThreads) align_rows_kernel(const Value* __restrict__ x,  // [tokens, in_features]
                                                              Value* __restrict__ aligned,  // [tokens, row_inputs]
                                                              int64_t in_features, int64_t row_inputs, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const int64_t input = i % row_inputs;
  if (input < in_features) {
    aligned[i] = x[i / row_inputs * in_features + input];
  } else {
    store(aligned + i, 0.0f);
  }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(
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
  int warps_m, warps_k, splits;
  int64_t groups, shared_bytes;

  int warps() const { return warps_m * warps_k; }
};

// Of a warp, one of kStages.
int64_t stage_bytes(int64_t tokens, int capacity) {
  return int64_t{panels_of(token_tiles_of(tokens))} * warp_bytes(capacity);
}

int64_t shared_bytes(const Division& division, int64_t tokens, int capacity) {
  const int tiles = token_tiles_of(tokens);
  const int64_t segments_bytes =
      kStages * division.warps() * stage_bytes(tokens, capacity) + kGuardRows * kCellRowBytes;
  return std::max(segments_bytes + kStages * int64_t{division.warps_k} * x_rows(tokens) * x_row_bytes_of(tiles),
                  int64_t{division.warps()} * panels_of(tiles) * tiles * 32 * 16);
}

// The most registers that a thread may have (tests/test_cuda_module.py).
constexpr int registers_of(int token_tiles) {
  return token_tiles == 1 ? 88 : token_tiles == 2 ? 96 : token_tiles == 4 ? 136 : 184;
}

// Of a warp for a segment of a panel (tests/test_cuda_module.py).
constexpr double instructions_of(int token_tiles) {
  return panels_of(token_tiles) == 1 ? 512 + 24.0 * token_tiles : 510 + 20.0 * token_tiles;
}

// Of a segment of a panel, what is copied of it on average: of a random weight's longest run of cells the others have
// 0.73 at 50 %, 0.65 at 70 % and 0.49 at 90 %.
double segment_bytes(int capacity) { return kMaskBytes + 0.7 * capacity * kCellRowBytes; }

// Of shared memory, for a segment of a panel: each 8 weights of a lane are two shuffles and three loads of 8 bytes, each
// 16 a load of 16 bytes of every tile of tokens, which meets all panels of the warp.
double shared_clocks_of(int token_tiles, int capacity) {
  const double x_clocks = 2.0 * token_tiles / panels_of(token_tiles);
  return 16 * (2 + 3 * 2 + x_clocks) + kSegmentBlocks + 1 + segment_bytes(capacity) / 128;
}

// The blocks of a division, for the formula of division.h.
Blocks blocks_of(const Division& division, const Card& card, int64_t tokens, int64_t segments, int capacity,
                 int64_t out_features) {
  const int64_t count = division.groups * division.splits;
  const double block_segments = static_cast<double>((segments + division.splits - 1) / division.splits);
  const int panels = panels_of(token_tiles_of(tokens)) * division.warps_m;
  const double x_bytes = static_cast<double>(tokens) * kSegmentInputs * 2;
  const double x_stage_bytes = x_bytes * x_blocks_of(token_tiles_of(tokens)) / kSegmentBlocks;
  const double partial_bytes = division.splits > 1 ? 8.0 * tokens * out_features / division.groups : 0.0;
  return {count,
          resident_blocks(card, division.shared_bytes, 32 * division.warps(), registers_of(token_tiles_of(tokens))),
          block_segments * segment_bytes(capacity) * panels,
          block_segments * x_bytes + partial_bytes,
          division.warps_k * (segment_bytes(capacity) * panels + x_stage_bytes),
          block_segments * panels * instructions_of(token_tiles_of(tokens)),
          division.warps(),
          division.splits > 1,
          block_segments * (panels * shared_clocks_of(token_tiles_of(tokens), capacity) + x_bytes / 128)};
}

// Of all divisions that fit, the one that should take the least time; without warps where none fits.
Division best_division(const Card& card, int64_t tokens, int64_t panels, int64_t segments, int capacity,
                       int64_t out_features) {
  const int warp_panels = panels_of(token_tiles_of(tokens));
  Division best{};
  double best_us = -1.0;
  for (int splits = 1; splits <= 16 && splits <= segments; ++splits) {
    for (int warps_m = 1; warps_m <= kMostWarps && (warps_m == 1 || warp_panels * warps_m <= panels); ++warps_m) {
      const int block_panels = warp_panels * warps_m;
      for (int warps_k = 1; warps_m * warps_k <= kMostWarps && warps_k * splits <= segments; ++warps_k) {
        Division division{warps_m, warps_k, splits, (panels + block_panels - 1) / block_panels, 0};
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

int64_t row_inputs_of(int64_t in_features) { return (in_features + kPieceInputs - 1) / kPieceInputs * kPieceInputs; }

// In front of the workspace, rows of x for one that does not lie on 16 bytes.
int64_t aligned_bytes(int64_t tokens, int64_t in_features) { return (2 * tokens * row_inputs_of(in_features) + 15) / 16 * 16; }

template <typename Value>
cudaError_t multiply(const BitmapFragments& weight, const Value* x, const Value* bias, Value* y,
                     unsigned char* workspace, int64_t tokens, cudaStream_t stream) {
  if (!in_range(tokens, weight.out_features, weight.in_features)) return cudaErrorInvalidValue;
  if (tokens == 0 || weight.out_features == 0) return cudaSuccess;
  Division division;
  const cudaError_t error = divide(division, weight, tokens);
  if (error != cudaSuccess) return error;
  const int64_t row_inputs = row_inputs_of(weight.in_features);
  const auto blocks_for = [](int64_t size) { return dim3(static_cast<unsigned>((size + kThreads - 1) / kThreads)); };
  if (weight.in_features != row_inputs || reinterpret_cast<uintptr_t>(x) % 16 != 0) {
    auto* aligned = reinterpret_cast<Value*>(workspace);
    const int64_t size = tokens * row_inputs;
    const cudaError_t copied = launch(align_rows_kernel<Value>, blocks_for(size), kThreads, 0, stream, x, aligned,
                                      weight.in_features, row_inputs, size);
    if (copied != cudaSuccess) return copied;
    x = aligned;
  }
  auto* partial = reinterpret_cast<float*>(workspace + aligned_bytes(tokens, weight.in_features));
  const int tiles = token_tiles_of(tokens);
  // a warp copies a token's stage, or two tokens' halves, at once
  const int x_row_step = (kSegmentBlocks / x_blocks_of(tiles)) * division.warps_m;
  const Work work{weight.out_features,
                  static_cast<int>(row_inputs),
                  static_cast<int>(tokens),
                  static_cast<int>(weight.panels()),
                  static_cast<int>(weight.segments()),
                  division.warps_m,
                  division.warps_k,
                  division.splits,
                  weight.cell_rows,
                  weight.capacity,
                  x_row_step,
                  x_row_step * x_row_bytes_of(tiles),
                  2 * x_row_step * row_inputs};
  const auto start = [&](auto kernel) {
    const unsigned threads = 32u * division.warps();
    return launch(kernel, dim3(static_cast<unsigned>(division.groups), division.splits), threads,
                  division.shared_bytes, stream, x, weight.masks, weight.cells, weight.quad_rows, bias, y, partial,
                  work);
  };
  const cudaError_t started = tiles == 1   ? start(linear_bitmap_fragments_kernel<Value, 1>)
                              : tiles == 2 ? start(linear_bitmap_fragments_kernel<Value, 2>)
                              : tiles == 4 ? start(linear_bitmap_fragments_kernel<Value, 4>)
                                           : start(linear_bitmap_fragments_kernel<Value, 8>);
  if (started != cudaSuccess || division.splits == 1) return started;
  const int64_t size = tokens * weight.out_features;
  return launch(sum_splits_kernel<Value>, blocks_for(size), kThreads, 0, stream, partial, bias, y, size,
                weight.out_features, division.splits);
}

}  // namespace

cudaError_t linear_bitmap_fragments_workspace(const BitmapFragments& weight, int64_t tokens, int64_t* bytes) {
  *bytes = 0;
  if (!in_range(tokens, weight.out_features, weight.in_features)) return cudaErrorInvalidValue;
  if (tokens == 0 || weight.out_features == 0) return cudaSuccess;
  Division division;
  const cudaError_t error = divide(division, weight, tokens);
  if (error != cudaSuccess) return error;
  *bytes = aligned_bytes(tokens, weight.in_features);
  if (division.splits > 1) {
    *bytes += division.splits * tokens * weight.out_features * static_cast<int64_t>(sizeof(float));
  }
  return cudaSuccess;
}

cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __nv_bfloat16* x, const __nv_bfloat16* bias,
                                    __nv_bfloat16* y, void* workspace, int64_t tokens, cudaStream_t stream) {
  return multiply(weight, x, bias, y, static_cast<unsigned char*>(workspace), tokens, stream);
}

cudaError_t linear_bitmap_fragments(const BitmapFragments& weight, const __half* x, const __half* bias, __half* y,
                                    void* workspace, int64_t tokens, cudaStream_t stream) {
  return multiply(weight, x, bias, y, static_cast<unsigned char*>(workspace), tokens, stream);
}

}  // namespace sparsekern::cuda
