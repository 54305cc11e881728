// One inline function a PTX instruction, and launch(). Two faces: inline PTX under nvcc; with SPARSEKERN_ON_HOST the same
// names in plain C++ (tests/cuda_on_host), for a card that is a CPU.
//
// What the second face asks of a kernel: shared memory comes from shared_memory(), kernels are started by launch(), no
// `asm` stands anywhere else, and no block waits for another one.
#pragma once

#ifdef SPARSEKERN_ON_HOST
#include "ptx_on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace sparsekern::cuda {

// The most dynamic shared memory that needs no permission.
constexpr size_t kSharedBytesFree = 48 * 1024;

// Starts `kernel`; returns the launch error.
template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  if (shared_bytes > kSharedBytesFree) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(args)...);
  return cudaGetLastError();
}

namespace ptx {

// The block's dynamic shared memory, on 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return shared_bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// mma.sp m16n8k32: c[16 x 8] += A b, A [16 x 32] with two of every four kept, Value __half or __nv_bfloat16.
//   a         the kept values as a fragment [16 x 16]
//   b         the fragment [32 x 8]
//   metadata  two positions for each four inputs; of every four lanes the two that kSelector says contribute
template <typename Value, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two selectors share a register");
  if constexpr (std::is_same_v<Value, __half>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  }
}

// mma m16n8k16: c[16 x 8] += a [16 x 16] b [16 x 8]
template <typename Value>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Value, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ldmatrix: kMatrices (1, 2 or 4) matrices of 8 rows of 16 bytes in shared memory; lane 8 i + j has the address of row j
// of matrix i, and receives 4 bytes of each: of row lane / 4, at column lane % 4; with kTranspose of the transposed
// matrix of 2-byte elements.
template <int kMatrices, bool kTranspose = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[kMatrices], const void* shared_row) {
  const uint32_t from = shared_address(shared_row);
  if constexpr (kMatrices == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kMatrices == 4 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else {
    static_assert(kMatrices == 4, "1, 2 or 4 matrices");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// cp.async: 16 bytes of shared memory, the first `bytes` of them read from `global` and the rest zero; both on 16 bytes.
// What has been copied can be read after this thread's cp_async_wait, by others after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// The copies since the last one become a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kGroups latest of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ld.global.nc, 16 bytes that other warps of the block read too
__device__ __forceinline__ void load(uint32_t (&to)[4], const void* global) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(global)));
}

// ld.global.nc, 16 bytes that are read once: they leave no trace in L1
__device__ __forceinline__ void load_once(uint32_t (&to)[4], const void* global) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(global)));
}

// the same, 8 bytes
__device__ __forceinline__ void load_once(uint32_t (&to)[2], const void* global) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "l"(__cvta_generic_to_global(global)));
}

// the same, 4 bytes
__device__ __forceinline__ uint32_t load_once(const void* global) {
  uint32_t to;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(to) : "l"(__cvta_generic_to_global(global)));
  return to;
}

// %laneid: threadIdx.x % 32 in a register, which the compiler does not work out again wherever it is needed
__device__ __forceinline__ int lane() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// prmt: byte i of the result is byte (selector >> 4 i & 7) of {a, b}, a first
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// lop3: bit by bit, kTable >> (4 a + 2 b + c) & 1
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// bfe: `length` bits of a from bit `start` on
__device__ __forceinline__ uint32_t bfe(uint32_t a, uint32_t start, uint32_t length) {
  uint32_t d;
  asm("bfe.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(start), "r"(length));
  return d;
}

}  // namespace ptx
}  // namespace sparsekern::cuda

#endif
