// Small kernels for test_emulator.py: each shows one thing that the emulator does, or one mistake that it must see.

#include "operands.h"
#include "ptx.cuh"

namespace ptx = sparsekern::cuda::ptx;
using sparsekern::cuda::launch;

// one warp: the tile [16, 32] of the fragments a and metadata by b [32, 8], whose fragments are read from x [8, 32]
template <typename Value, int kSelector>
__global__ void mma_sp_kernel(const uint32_t* a, const uint32_t* metadata, const Value* x, float* c) {
  const int lane = threadIdx.x;
  auto* rows = reinterpret_cast<Value*>(ptx::shared_memory());
  for (int i = lane; i < 8 * 32; i += 32) rows[i] = x[i];
  __syncwarp();
  uint32_t a_reg[4], b_reg[4];
  ptx::load_once(a_reg, a + 4 * lane);
  // matrix i is 8 tokens by inputs 8 i to 8 i + 7
  ptx::ldmatrix(b_reg, rows + lane % 8 * 32 + lane / 8 * 8);
  float sum[4] = {};
  ptx::mma_sp_m16n8k32<Value, kSelector>(sum, a_reg, b_reg, metadata[lane]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// c [16, 8] = a [16, 16] b [16, 8], both row by row: a through ldmatrix, b through its transposing form
template <typename Value>
__global__ void mma_kernel(const Value* a, const Value* b, float* c) {
  const int lane = threadIdx.x;
  auto* a_smem = reinterpret_cast<Value*>(ptx::shared_memory());
  Value* b_smem = a_smem + 16 * 16;
  for (int i = lane; i < 16 * 2; i += 32) ptx::cp_async_16(a_smem + 8 * i, a + 8 * i);
  for (int i = lane; i < 16; i += 32) ptx::cp_async_16(b_smem + 8 * i, b + 8 * i);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t a_reg[4], b_reg[2];
  ptx::ldmatrix(a_reg, a_smem + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix<2, true>(b_reg, b_smem + lane % 16 * 8);
  float sum[4] = {};
  ptx::mma_m16n8k16<Value>(sum, a_reg, b_reg);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// y[i] of a block = the sum of x: each warp by shuffles, then the warps through shared memory
__global__ void sum_kernel(const float* x, float* y, bool barrier) {
  auto* sums = reinterpret_cast<float*>(ptx::shared_memory());
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (barrier) __syncthreads();
  float all = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) all += sums[warp];
  y[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

// y = x in groups of 16 bytes through shared memory, the last `short_by` bytes of each as zeros
__global__ void copy_kernel(const unsigned char* x, unsigned char* y, int short_by, bool wait) {
  unsigned char* smem = ptx::shared_memory() + 16 * threadIdx.x;
  ptx::cp_async_16(smem, x + 16 * threadIdx.x, 16 - short_by);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) y[16 * threadIdx.x + i] = smem[i];
  ptx::cp_async_wait<0>();
}

__global__ void overrun_kernel(float* y) {
  auto* smem = reinterpret_cast<float*>(ptx::shared_memory());
  smem[threadIdx.x] = 1.0f;
  y[threadIdx.x] = smem[threadIdx.x];
}

__global__ void diverged_kernel(float* y) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    y[threadIdx.x] = __shfl_sync(0xffffffff, 1.0f, 0);
  }
}

__global__ void deserted_kernel(float* y) {
  if (threadIdx.x == 5) return;
  __syncwarp();
  y[threadIdx.x] = 0.0f;
}

// y[0..] = what the intrinsics make of x[0], x[1], x[2]
__global__ void bits_kernel(const uint32_t* x, uint32_t* y) {
  y[0] = ptx::prmt(x[0], x[1], 0x6240);
  y[1] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(x[0], x[1], x[2]);
  y[2] = ptx::bfe(x[0], 4, 8);
  y[3] = __popc(x[0]);
  y[4] = __funnelshift_r(x[0], x[1], 12);
  y[5] = __brev(x[0]);
  y[6] = __ballot_sync(0xffffffff, threadIdx.x % 3 == 0);
  y[7] = atomicAdd(&y[8], 1u);
}

// y[i] = the sum of what thread i of every block has left: the last block to come adds up. arrived is zero
__global__ void last_block_kernel(float* left, unsigned* arrived, float* y, bool barrier) {
  auto* is_last = reinterpret_cast<int*>(ptx::shared_memory());
  left[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
  __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!*is_last) return;
  float sum = 0.0f;
  for (unsigned other = 0; other < gridDim.x; ++other) sum += left[other * blockDim.x + threadIdx.x];
  y[threadIdx.x] = sum;
}

template <typename Value>
int run_mma_sp(Operands& in) {
  const auto* a = in.tensor<uint32_t>();
  const auto* metadata = in.tensor<uint32_t>();
  const auto* x = in.tensor<Value>();
  const auto kernel = in.number(0) ? mma_sp_kernel<Value, 1> : mma_sp_kernel<Value, 0>;
  return in.finish(launch(kernel, 1, 32, 8 * 32 * sizeof(Value), nullptr, a, metadata, x, in.result<float>(16 * 8)));
}

template <typename Value>
int run_mma(Operands& in) {
  const auto* a = in.tensor<Value>();
  const auto* b = in.tensor<Value>();
  return in.finish(launch(mma_kernel<Value>, 1, 32, 24 * 16 * sizeof(Value), nullptr, a, b, in.result<float>(16 * 8)));
}

int main(int argc, char** argv) {
  Operands in(argc, argv);
  const std::string op = in.op();
  if (op == "mma_sp_bf16") return run_mma_sp<__nv_bfloat16>(in);
  if (op == "mma_sp_fp16") return run_mma_sp<__half>(in);
  if (op == "mma_bf16") return run_mma<__nv_bfloat16>(in);
  if (op == "mma_fp16") return run_mma<__half>(in);
  if (op == "sum") {
    const auto* x = in.tensor<float>();
    return in.finish(launch(sum_kernel, 2, 128, 4 * sizeof(float), nullptr, x, in.result<float>(256), in.number(0) != 0));
  }
  if (op == "copy") {
    const auto* x = in.tensor<unsigned char>();
    auto* y = in.result<unsigned char>(64);
    return in.finish(launch(copy_kernel, 1, 4, 64, nullptr, x, y, in.number(0), in.number(1) != 0));
  }
  if (op == "bits") {
    const auto* x = in.tensor<uint32_t>();
    return in.finish(launch(bits_kernel, 1, 32, 0, nullptr, x, in.result<uint32_t>(9)));
  }
  auto* y = in.result<float>(128);
  if (op == "last block") {
    auto* left = reinterpret_cast<float*>(in.workspace(3 * 128 * sizeof(float)));
    auto* arrived = reinterpret_cast<unsigned*>(in.workspace(sizeof(unsigned)));
    *arrived = 0;
    return in.finish(launch(last_block_kernel, 3, 128, sizeof(int), nullptr, left, arrived, y, in.number(0) != 0));
  }
  if (op == "overrun") return in.finish(launch(overrun_kernel, 1, 32, 32 * sizeof(float) - 1, nullptr, y));
  if (op == "diverged") return in.finish(launch(diverged_kernel, 1, 32, 0, nullptr, y));
  if (op == "deserted") return in.finish(launch(deserted_kernel, 1, 32, 0, nullptr, y));
  if (op == "too many threads") return in.finish(launch(overrun_kernel, 1, 1025, 0, nullptr, y));
  on_host::fail("no such op");
}
