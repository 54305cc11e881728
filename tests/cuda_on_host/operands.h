// The operands of a program that runs CUDA sources on the CPU: tensors from stdin, numbers from the command line, results
// to stdout. Each tensor lies in its own allocation of exactly its size, so that the sanitizer sees a read past its end.
//   PROGRAM order multiprocessors op numbers...
// order is forward, reverse or a seed of shuffling; counted: nothing is run, and stderr has a line a launch with grid x,
// grid y, threads and bytes of shared memory. emulator.py starts such programs.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <vector>

#include "launch_error.h"

class Operands {
 public:
  Operands(int argc, char** argv) : arguments_(argv, argv + argc) {
    const std::string order = argument(1);
    on_host::only_counted = order == "counted";
    on_host::order = order == "forward" || on_host::only_counted   ? on_host::Order::kForward
                     : order == "reverse" ? on_host::Order::kReverse
                                          : on_host::Order::kShuffled;
    if (on_host::order == on_host::Order::kShuffled) on_host::random_numbers.seed(std::stoul(order));
    on_host::multiprocessors = std::stoi(argument(2));
  }

  std::string op() const { return argument(3); }
  // number i of the command line
  int64_t number(size_t i) const { return std::stoll(argument(4 + i)); }

  // The next tensor of stdin: null for one that is not there. A tensor may begin `shift` bytes behind 16 bytes.
  template <typename T>
  const T* tensor() {
    int64_t header[2];
    read(header, sizeof header);
    const auto [bytes, shift] = header;
    if (bytes < 0) return nullptr;
    return reinterpret_cast<const T*>(read_into(allocate(bytes, shift), bytes));
  }

  // A result of `size` elements: all ones, which is NaN in every type, until somebody writes there.
  template <typename T>
  T* result(int64_t size) {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    unsigned char* at = allocate(bytes, 0);
    std::memset(at, 0xff, bytes);
    results_.push_back({at, bytes});
    return reinterpret_cast<T*>(at);
  }

  // Memory that an op may write to, with nothing in it that makes sense.
  unsigned char* workspace(int64_t bytes) {
    unsigned char* at = allocate(bytes, 0);
    std::memset(at, 0xff, bytes);
    return at;
  }

  // The exit status.
  int finish(cudaError_t error) const {
    if (error != cudaSuccess) {
      const std::string program = argument(0);
      const std::string op = program.substr(program.rfind('/') + 1);
      std::fprintf(stderr, "%s\n", sparsekern::cuda::launch_error(op, error).c_str());
      return 71;
    }
    for (const auto& [grid, block, shared_bytes] : on_host::launches) {
      if (!on_host::only_counted) break;
      std::fprintf(stderr, "%u %u %u %zu\n", grid.x, grid.y, block.x, shared_bytes);
    }
    for (const auto& [at, bytes] : results_) {
      if (std::fwrite(at, 1, bytes, stdout) != static_cast<size_t>(bytes)) return 72;
    }
    return 0;
  }

 private:
  struct Result {
    const unsigned char* at;
    int64_t bytes;
  };

  std::string argument(size_t i) const {
    if (i >= arguments_.size()) on_host::fail("an argument of the program is missing");
    return arguments_[i];
  }

  unsigned char* allocate(int64_t bytes, int64_t shift) {
    allocations_.emplace_back(new unsigned char[shift + bytes]);
    return allocations_.back().get() + shift;
  }

  static void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) on_host::fail("stdin holds too few tensors");
  }

  static unsigned char* read_into(unsigned char* to, int64_t bytes) {
    read(to, bytes);
    return to;
  }

  std::vector<std::string> arguments_;
  std::vector<std::unique_ptr<unsigned char[]>> allocations_;
  std::vector<Result> results_;
};
