// The other face of csrc/cuda/ptx.cuh: each PTX instruction in plain C++, after the PTX ISA's description of it.
//
// What a wrong kernel would get away with on one card and not on another is made to show: cp.async spoils its target at
// once and fills it no sooner than at the wait, every address is held to its alignment, and a warp-wide instruction
// needs all 32 lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace on_host {

inline float to_float(__half value) { return __half2float(value); }
inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// the `half`th 16 bits of a register
template <typename Value>
float element(uint32_t reg, int half) {
  return to_float(Value{static_cast<uint16_t>(reg >> 16 * half)});
}

inline void must_lie_on(const void* address, unsigned bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail(what);
}

struct Mma {
  float* c;
  const uint32_t *a, *b;
  uint32_t metadata;
};

inline const Mma& operands_of(const Meeting& all, int lane) { return *static_cast<const Mma*>(all.in[lane]); }

// c[row][column] of m16n8: lane 4 g + t has rows g (0, 1) and g + 8 (2, 3), columns 2 t and 2 t + 1
template <typename Product>
void add_to_c(const Meeting& all, Product product) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float& c = operands_of(all, lane).c[i];
      c = static_cast<float>(c + product(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2));
    }
  }
}

// a[row][k] of the 16 x 16 fragment: registers 0, 1 are rows g and g + 8 of columns 2 t, 2 t + 1; 2, 3 the same, 8 later
template <typename Value>
void read_a(const Meeting& all, float (&a)[16][16]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
          element<Value>(operands_of(all, lane).a[i / 2], i % 2);
    }
  }
}

// b[k][column]: register r of lane 4 g + t is rows 8 r + 2 t and the next one of column g
template <typename Value, int kRows>
void read_b(const Meeting& all, float (&b)[kRows][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kRows / 4; ++i) {
      b[i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4] = element<Value>(operands_of(all, lane).b[i / 2], i % 2);
    }
  }
}

template <typename Value, int kSelector>
void mma_sp(const Meeting& all) {
  float a[16][16], b[32][8];
  read_a<Value>(all, a);
  read_b<Value>(all, b);
  int position[16][16];  // which of its four inputs each kept value stands for
  for (int lane = 2 * kSelector; lane < 32; lane += lane % 2 ? 3 : 1) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = operands_of(all, lane).metadata >> 16 * half & 0xffff;
      for (int group = 0; group < 4; ++group) {
        int* at = &position[lane / 4 + 8 * half][(lane % 2 * 4 + group) * 2];
        at[0] = word >> 4 * group & 3;
        at[1] = word >> 4 * group >> 2 & 3;
        if (at[0] >= at[1]) fail("mma.sp::ordered_metadata: the two positions must rise");
      }
    }
  }
  add_to_c(all, [&](int row, int column) {
    double sum = 0.0;
    // what is not kept is not multiplied: NaN there stays unseen
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k / 2 * 4 + position[row][k]][column];
    return sum;
  });
}

template <typename Value>
void mma(const Meeting& all) {
  float a[16][16], b[16][8];
  read_a<Value>(all, a);
  read_b<Value>(all, b);
  add_to_c(all, [&](int row, int column) {
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
    return sum;
  });
}

template <int kMatrices, bool kTranspose>
void ldmatrix(const Meeting& all) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTranspose ? lane % 4 * 2 + i : lane / 4, column = kTranspose ? lane / 4 : lane % 4 * 2 + i;
        const void* from = all.in[8 * matrix + row];
        must_lie_on(from, 16, "ldmatrix: a row must lie on 16 bytes");
        pair[i] = static_cast<const uint16_t*>(from)[column];
      }
      static_cast<uint32_t*>(all.out[lane])[matrix] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
    }
  }
}

inline void need_whole_warp() {
  if (existing_lanes() != kAllLanes) fail("a warp-wide instruction in a warp of fewer than 32 threads");
}

}  // namespace on_host

namespace sparsekern::cuda::ptx {

inline unsigned char* shared_memory() { return on_host::block->shared.get(); }

template <typename Value, int kSelector>
void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two selectors share a register");
  on_host::need_whole_warp();
  const on_host::Mma operands{c, a, b, metadata};
  on_host::meet(on_host::kAllLanes, kSelector ? "mma.sp, selector 1" : "mma.sp, selector 0", &operands, nullptr,
                on_host::mma_sp<Value, kSelector>);
}

template <typename Value>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_host::need_whole_warp();
  const on_host::Mma operands{c, a, b, 0};
  on_host::meet(on_host::kAllLanes, "mma", &operands, nullptr, on_host::mma<Value>);
}

template <int kMatrices, bool kTranspose = false>
void ldmatrix(uint32_t (&to)[kMatrices], const void* shared_row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "1, 2 or 4 matrices");
  on_host::need_whole_warp();
  on_host::meet(on_host::kAllLanes, "ldmatrix", shared_row, to, on_host::ldmatrix<kMatrices, kTranspose>);
}

inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  on_host::must_lie_on(shared, 16, "cp.async: shared memory must lie on 16 bytes");
  on_host::must_lie_on(global, 16, "cp.async: global memory must lie on 16 bytes");
  if (bytes < 0 || bytes > 16) on_host::fail("cp.async: 0 to 16 bytes");
  // the card may write from now on
  std::memset(shared, 0xff, 16);
  on_host::current->copies.back().push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes});
}

inline void cp_async_commit() { on_host::current->copies.emplace_back(); }

template <int kGroups>
void cp_async_wait() {
  auto& groups = on_host::current->copies;
  // the last one is open
  while (groups.size() > kGroups + 1) {
    for (const on_host::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline void load(uint32_t (&to)[4], const void* global) {
  on_host::must_lie_on(global, 16, "ld.global.v4.b32: an address must lie on 16 bytes");
  std::memcpy(to, global, 16);
}

inline void load_once(uint32_t (&to)[4], const void* global) { load(to, global); }

inline void load_once(uint32_t (&to)[2], const void* global) {
  on_host::must_lie_on(global, 8, "ld.global.v2.b32: an address must lie on 8 bytes");
  std::memcpy(to, global, 8);
}

inline uint32_t load_once(const void* global) {
  on_host::must_lie_on(global, 4, "ld.global.b32: an address must lie on 4 bytes");
  uint32_t to;
  std::memcpy(&to, global, 4);
  return to;
}

inline int lane() { return static_cast<int>(on_host::lane()); }

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row) {
    if (kTable >> row & 1) d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return d;
}

inline uint32_t bfe(uint32_t a, uint32_t start, uint32_t length) {
  start &= 0xff;
  length &= 0xff;
  const uint64_t shifted = start < 32 ? a >> start : 0;
  return static_cast<uint32_t>(length < 32 ? shifted & ((uint64_t{1} << length) - 1) : shifted);
}

}  // namespace sparsekern::cuda::ptx
