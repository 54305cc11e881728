// How a kernel that reads a weight once is divided into blocks: the time that a division should take on this card.
//
// The busiest multiprocessor decides. Of `count` equal blocks it gets ceil(count / multiprocessors), of which `resident`
// run at once, in waves. Its time is the longest of five,
//
//     memory     its blocks' bytes from memory, at its share of the card's bandwidth
//     L2         its blocks' bytes from memory and from L2, at its share of that
//     in flight  the same bytes, so many at once as its blocks have asked for, each time after the latency
//     issue      its warps' instructions: four a clock, but of one warp only every kWarpClocks-th clock
//     shared     what its warps move in shared memory, 128 bytes a clock, and shuffles, one of a warp a clock
//
// and a tenth of all five, for they do not overlap perfectly, and a latency for each wave, in which nothing has come yet;
// where blocks share outputs, two more, for the sums that meet. Bandwidth, clock and multiprocessors are what the card
// says of itself. The latency, L2's bandwidth and how often a warp can go on no card says; they decide only between
// divisions that all give the right result.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace sparsekern::cuda {

constexpr double kLatencyUs = 1.2;  // of memory under load
// Of a multiprocessor, from L2, which follows the clock and not the memory: an H100 and an H200 have the same. 28 were
// seen on an H100 with nothing else to do (chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth").
constexpr double kL2BytesAClock = 24;
constexpr double kWarpClocks = 3;
constexpr double kOverlapLost = 0.1;
constexpr int kMostResident = 8;  // beyond that blocks' own beginnings and ends count

struct Card {
  int device, multiprocessors, shared_bytes_per_block, shared_bytes_per_multiprocessor, registers_per_multiprocessor;
  double bytes_per_us;  // of memory, a multiprocessor's share
  double clocks_per_us;
};

inline cudaError_t read_card(Card& card, int device) {
  int memory_khz, bus_bits, khz;
  cudaError_t error = cudaSuccess;
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(card.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(card.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(card.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(card.registers_per_multiprocessor, cudaDevAttrMaxRegistersPerMultiprocessor);
  read(memory_khz, cudaDevAttrMemoryClockRate);
  read(bus_bits, cudaDevAttrGlobalMemoryBusWidth);
  read(khz, cudaDevAttrClockRate);
  if (error != cudaSuccess) return error;
  card.device = device;
  // two bits a line and clock
  card.bytes_per_us = 2.0 * std::max(memory_khz, 1) * std::max(bus_bits, 8) / 8 / 1e3 / card.multiprocessors;
  card.clocks_per_us = std::max(khz, 1) / 1e3;
  return cudaSuccess;
}

// The current device. A thread reads each card once, for its clocks are slow to read: NVIDIA, "CUDA Pro Tip: The Fast
// Way to Query Device Properties".
inline cudaError_t this_card(Card& card) {
  constexpr int kDevices = 16;  // later ones are read each time
  thread_local bool known[kDevices] = {};
  thread_local Card cards[kDevices];
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kDevices) return read_card(card, device);
  if (!known[device]) {
    error = read_card(cards[device], device);
    if (error != cudaSuccess) return error;
    known[device] = true;
  }
  card = cards[device];
  return cudaSuccess;
}

// What `divide` says for these sizes on this card: a thread remembers the latest answers of each kernel, for a model
// asks again and again, and an answer costs some microseconds.
template <typename Division, size_t kSizes, typename Divide>
Division remembered(const Card& card, const std::array<int64_t, kSizes>& sizes, Divide divide) {
  constexpr size_t kAnswers = 128;
  struct Answer {
    int device = -1;
    std::array<int64_t, kSizes> sizes;
    Division division;
  };
  thread_local Answer answers[kAnswers];
  // Fibonacci hashing, 2^64 over the golden ratio
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  uint64_t hash = static_cast<uint64_t>(card.device) * kGolden;
  for (const int64_t size : sizes) hash = (hash + static_cast<uint64_t>(size)) * kGolden;
  Answer& answer = answers[hash >> 40 & (kAnswers - 1)];
  if (answer.device != card.device || answer.sizes != sizes) answer = {card.device, sizes, divide()};
  return answer.division;
}

// What a division's blocks are like.
struct Blocks {
  int64_t count;
  int resident;             // on a multiprocessor
  double memory_bytes;      // that one block reads from memory
  double l2_bytes;          // that it reads from L2 beside them, and writes
  double in_flight_bytes;   // that it has asked for, at most
  double instructions;      // of all its warps
  int warps;
  bool shares_outputs;
  double shared_clocks = 0;  // of all its warps
};

// How many blocks fit on a multiprocessor, by shared memory and by registers.
inline int resident_blocks(const Card& card, int64_t shared_bytes, int threads, int registers) {
  constexpr int kReservedBytes = 1024;  // of each block, for the system
  const int64_t by_memory = card.shared_bytes_per_multiprocessor / (shared_bytes + kReservedBytes);
  const int64_t by_registers = card.registers_per_multiprocessor / (int64_t{threads} * registers);
  return static_cast<int>(std::clamp<int64_t>(std::min(by_memory, by_registers), 1, kMostResident));
}

inline double expected_us(const Card& card, const Blocks& blocks) {
  const int64_t busiest = (blocks.count + card.multiprocessors - 1) / card.multiprocessors;
  const int64_t together = std::min<int64_t>(blocks.resident, busiest);
  const int64_t waves = (busiest + together - 1) / together;
  const double from_memory = busiest * blocks.memory_bytes, all = from_memory + busiest * blocks.l2_bytes;
  const double memory_us = from_memory / card.bytes_per_us, l2_us = all / (kL2BytesAClock * card.clocks_per_us);
  const double in_flight_us = all / (together * blocks.in_flight_bytes) * kLatencyUs;
  const double issue_us = busiest * blocks.instructions /
                          (card.clocks_per_us * std::min(4.0, together * blocks.warps / kWarpClocks));
  const double shared_us = busiest * blocks.shared_clocks / card.clocks_per_us;
  const double us = std::max({memory_us, l2_us, in_flight_us, issue_us, shared_us}) +
                    kOverlapLost * (memory_us + l2_us + in_flight_us + issue_us + shared_us);
  return us + static_cast<double>(waves + (blocks.shares_outputs ? 2 : 0)) * kLatencyUs;
}

}  // namespace sparsekern::cuda
