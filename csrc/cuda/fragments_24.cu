// fragments_24: a 2:4 weight as it is saved to the order of mma.sp (ops.h), and that order to the dense weight.
//
// A warp has a chunk of a panel: 16 outputs x 256 inputs. On the way there its 16 x 256 bytes of values come into shared
// memory row by row, and leave it as ldmatrix hands them out: tile after tile the fragment of mma.sp. The metadata need
// no exchange: register r of lane 4 g + t is word 4 r + t of the rows g and g + 8. On the way to dense a lane has two
// groups of each of two rows of a tile, whose positions two of its neighbours hold. Every byte is read once and written
// once.

#include "groups_24.cuh"
#include "ops.h"
#include "ptx.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kAll = 0xffffffff;
constexpr int kRowBytes = kChunkInputs / 2 * 2;  // of values, of a row of a chunk
constexpr int kRowVectors = kRowBytes / 16;
constexpr int kChunkBytes = kPanelRows * kRowBytes;
constexpr uint32_t kEmptyWord = 0x4444;  // positions 0 and 1 in four groups

// Where vector `vector` of a row lies in shared memory: eight rows that are read at once begin in eight places.
__device__ __forceinline__ int place_of(int row, int vector) { return row * kRowBytes + (vector ^ (row & 7)) * 16; }

template <bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) fragments_24_kernel(
    const uint16_t* __restrict__ values,     // [out_features, in_features / 2]
    const uint16_t* __restrict__ metadata,   // [out_features, row_words]
    uint16_t* __restrict__ fragments,        // [panels, chunks, kChunkTiles, 32, 8]
    uint32_t* __restrict__ ordered,          // [panels, chunks, 32, 4]
    unsigned long long* __restrict__ status,  // [1], see ops.h
    int64_t out_features, int64_t in_features, int64_t row_words, uint32_t panel_chunks, uint32_t chunks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t at = blockIdx.x * kWarps + warp;
  if (at >= panel_chunks) return;
  const int64_t first_row = static_cast<int64_t>(at / chunks) * kPanelRows;
  const int64_t first_input = static_cast<int64_t>(at % chunks) * kChunkInputs;
  unsigned char* chunk_smem = ptx::shared_memory() + warp * kChunkBytes;

#pragma unroll
  for (int i = 0; i < kChunkBytes / 16 / 32; ++i) {
    const int row = i * (32 / kRowVectors) + lane / kRowVectors, vector = lane % kRowVectors;
    // of kept values a vector is eight, of inputs sixteen
    const int64_t there = first_row + row < out_features ? (in_features - first_input) / 2 - vector * 8 : 0;
    const uint16_t* from = values + (first_row + row) * (in_features / 2) + first_input / 2 + vector * 8;
    unsigned char* to = chunk_smem + place_of(row, vector);
    if constexpr (kAligned) {
      ptx::cp_async_16(to, there > 0 ? from : values, there > 0 ? 16 : 0);
    } else {
      for (int j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(to)[j] = j < there ? from[j] : 0;
    }
  }
  if constexpr (kAligned) ptx::cp_async_commit();

  uint32_t words[4];
  bool wrong = false;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t word = first_input / 16 + 4 * r + lane % 4;
    words[r] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + lane / 4 + 8 * h;
      uint32_t each = kEmptyWord;
      if (row < out_features && word < row_words) {
        each = metadata[row * row_words + word];
        // groups behind the last input have positions 0 and 1
        const int used = static_cast<int>(min(in_features - word * 16, int64_t{16}));
        wrong |= falls(each | kEmptyWord << 16) || each >> used != kEmptyWord >> used;
      }
      words[r] |= each << 16 * h;
    }
  }
  reinterpret_cast<uint4*>(ordered)[static_cast<int64_t>(at) * 32 + lane] =
      make_uint4(words[0], words[1], words[2], words[3]);
  if (wrong) *status = 1;

  if constexpr (kAligned) ptx::cp_async_wait<0>();
  __syncwarp();
  // lane 8 i + j brings the address of row j of matrix i: rows 0 to 7, 8 to 15, then both again eight columns later
  const int matrix = lane / 8, row = lane % 8 + matrix % 2 * 8;
  uint4* fragments_write = reinterpret_cast<uint4*>(fragments) + static_cast<int64_t>(at) * (kChunkTiles * 32) + lane;
#pragma unroll
  for (int tile = 0; tile < kChunkTiles; ++tile) {
    uint32_t a[4];
    ptx::ldmatrix(a, chunk_smem + place_of(row, 2 * tile + matrix / 2));
    fragments_write[tile * 32] = make_uint4(a[0], a[1], a[2], a[3]);
  }
}

__global__ void __launch_bounds__(32 * kWarps) fragments_24_to_dense_kernel(
    const uint16_t* __restrict__ fragments,  // [panels, chunks, kChunkTiles, 32, 8]
    const uint32_t* __restrict__ ordered,    // [panels, chunks, 32, 4]
    uint16_t* __restrict__ dense,            // [out_features, in_features]
    int64_t out_features, int64_t in_features, uint32_t panel_chunks, uint32_t chunks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t at = blockIdx.x * kWarps + warp;
  if (at >= panel_chunks) return;
  const int64_t row = static_cast<int64_t>(at / chunks) * kPanelRows + lane / 4;
  const int64_t first_input = static_cast<int64_t>(at % chunks) * kChunkInputs + lane % 4 * 4;
  const int inputs_there = static_cast<int>(min(in_features - first_input, kChunkInputs));

  uint32_t words[4];
  ptx::load_once(words, ordered + (static_cast<int64_t>(at) * 32 + lane) * 4);
  const uint32_t places = places_of(lane % 16);
  const uint16_t* fragments_read = fragments + (static_cast<int64_t>(at) * (kChunkTiles * 32) + lane) * 8;
  uint16_t* dense_write = dense + row * in_features + first_input;
#pragma unroll
  for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
    uint32_t a[kChunkTiles / 2][4];
#pragma unroll
    for (int i = 0; i < kChunkTiles / 2; ++i) {
      ptx::load_once(a[i], fragments_read + (half_chunk * (kChunkTiles / 2) + i) * 32 * 8);
    }
#pragma unroll
    for (int i = 0; i < kChunkTiles / 2; ++i) {
      const int tile = half_chunk * (kChunkTiles / 2) + i;
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        // of row g in the low half, of row g + 8 in the high one
        const uint32_t positions =
            __shfl_sync(kAll, words[tile / 2], (lane & ~3) + 2 * (tile % 2) + right) >> lane % 4 * 4;
        const int ahead = tile * kTileInputs + right * 16;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t selectors = __shfl_sync(kAll, places, static_cast<int>(positions >> 16 * h), 16);
          if (row + 8 * h >= out_features || ahead >= inputs_there) continue;
          const uint32_t pair = a[i][2 * right + h];
          *reinterpret_cast<uint2*>(dense_write + 8 * h * in_features + ahead) =
              make_uint2(ptx::prmt(pair, 0, selectors), ptx::prmt(pair, 0, selectors >> 16));
        }
      }
    }
  }
}

// Panels times chunks, a warp each; false where there are more than a launch can count.
bool count(int64_t out_features, int64_t in_features, uint32_t& panel_chunks, uint32_t& chunks) {
  const int64_t of_a_panel = (in_features + kChunkInputs - 1) / kChunkInputs;
  int64_t all;
  if (__builtin_mul_overflow((out_features + kPanelRows - 1) / kPanelRows, of_a_panel, &all)) return false;
  if (all > INT32_MAX) return false;
  chunks = static_cast<uint32_t>(of_a_panel);
  panel_chunks = static_cast<uint32_t>(all);
  return true;
}

}  // namespace

cudaError_t fragments_24(const void* values, const int16_t* metadata, void* fragments, uint32_t* ordered,
                         uint64_t* status, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  uint32_t panel_chunks, chunks;
  if (!count(out_features, in_features, panel_chunks, chunks)) return cudaErrorInvalidValue;
  if (panel_chunks == 0) return cudaSuccess;
  const bool aligned = (reinterpret_cast<uintptr_t>(values) | static_cast<uintptr_t>(in_features)) % 16 == 0;
  return launch(aligned ? fragments_24_kernel<true> : fragments_24_kernel<false>,
                (panel_chunks + kWarps - 1) / kWarps, 32 * kWarps, kWarps * kChunkBytes, stream,
                static_cast<const uint16_t*>(values), reinterpret_cast<const uint16_t*>(metadata),
                static_cast<uint16_t*>(fragments), ordered, reinterpret_cast<unsigned long long*>(status),
                out_features, in_features, (in_features + 15) / 16, panel_chunks, chunks);
}

cudaError_t fragments_24_to_dense(const void* fragments, const uint32_t* ordered, void* dense, int64_t out_features,
                                  int64_t in_features, cudaStream_t stream) {
  uint32_t panel_chunks, chunks;
  if (!count(out_features, in_features, panel_chunks, chunks)) return cudaErrorInvalidValue;
  if (panel_chunks == 0) return cudaSuccess;
  return launch(fragments_24_to_dense_kernel, (panel_chunks + kWarps - 1) / kWarps, 32 * kWarps, 0, stream,
                static_cast<const uint16_t*>(fragments), ordered, static_cast<uint16_t*>(dense), out_features,
                in_features, panel_chunks, chunks);
}

}  // namespace sparsekern::cuda
