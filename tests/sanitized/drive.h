// What the drivers share: random numbers, buffers that end where their contents end, and expectations.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "ops.h"

using namespace sparsekern;

inline std::mt19937_64 generator(0);

inline int64_t below(int64_t bound) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound)); }

inline void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// `size` elements and not a byte more, so that the sanitizer sees what lies behind them.
template <class T>
struct Buffer {
  std::unique_ptr<char[]> bytes;
  int64_t size;
  explicit Buffer(int64_t n, int fill = 0) : bytes(new char[static_cast<size_t>(n) * sizeof(T)]), size(n) {
    std::memset(bytes.get(), fill, static_cast<size_t>(n) * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(bytes.get()); }
  T& operator[](int64_t i) { return data()[i]; }
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A small number that is exact in every dtype, 0 with probability 1 - density.
inline void fill(void* target, DType dtype, int64_t size, double density) {
  static const uint16_t kHalves[] = {0x3c00, 0xc000, 0x4200, 0x3800};
  static const float kFloats[] = {1.0f, -2.0f, 3.0f, 0.5f};
  for (int64_t i = 0; i < size; ++i) {
    const bool kept = static_cast<double>(below(1 << 20)) < density * (1 << 20);
    const int64_t which = below(4);
    const float x = kept ? kFloats[which] : 0.0f;
    if (dtype == DType::kFloat32) static_cast<float*>(target)[i] = x;
    if (dtype == DType::kBFloat16) static_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(bits_of(x) >> 16);
    if (dtype == DType::kFloat16) static_cast<uint16_t*>(target)[i] = kept ? kHalves[which] : 0;
  }
}

template <class Function>
void each_set(const InstructionSet* sets, Function&& function) {
  for (int set = 0; sets[set].name != nullptr; ++set) {
    if (sets[set].supported()) function(set);
  }
}

// Each in a file of its own.
void drive_dense();
void drive_24();
void drive_linear_bitmap_index();
void drive_linear_bitmap_int8();
void drive_linear_bitmap_nonzero();
void drive_tiles();

// Does with tiles what a processor refuses, each in its own way; must not return.
void refuse_tiles(char which);
