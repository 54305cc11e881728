// A grid on one thread of the CPU: the threads of a block are fibers, the blocks follow one another.
//
// A fiber runs until it meets others: its warp at a shuffle, a ballot, ldmatrix or mma, its block at a barrier. Who goes
// first is an argument, so that what leans on one order shows in another. Whoever does not come, or comes elsewhere, is
// told and ends the program. Blocks run one after the other: one that waited for another would wait for ever.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace on_host {

enum class Order { kForward, kReverse, kShuffled };
inline Order order = Order::kForward;

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kAllLanes = 0xffffffff;

// 16 bytes of cp.async: `bytes` of them from `from`, the rest zero.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

struct Thread {
  ucontext_t context;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  unsigned number = 0;
  const char* waits_at = nullptr;  // null: it can go on
  bool done = false;
  std::vector<std::vector<Copy>> copies;  // groups of cp.async that are under way; the last one is open
};

// Lanes of a warp that do something together: each lays down where its operands are and where its results go.
struct Meeting {
  const char* name = nullptr;
  unsigned came = 0;
  const void* in[32];
  void* out[32];
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by the mask of the lanes
};

struct Barrier {
  unsigned came = 0, threads = 0;
  std::vector<unsigned> who;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  std::function<void()> body;
};
inline Block* block;
inline Thread* current;
inline ucontext_t scheduler;
inline void* scheduler_asan_stack;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               current ? current->number : 0, what);
  std::_Exit(70);
}

inline void switch_to(Thread& thread) {
  current = &thread;
  threadIdx.x = thread.number % blockDim.x;
  threadIdx.y = thread.number / blockDim.x % blockDim.y;
  threadIdx.z = thread.number / blockDim.x / blockDim.y;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_asan_stack, thread.stack, kStackBytes);
#endif
  swapcontext(&scheduler, &thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
}

inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;

// Back to the scheduler; comes back when nothing holds the thread up any more.
inline void yield() {
  Thread& self = *current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.asan_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&self.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  block->body();
  if (current->copies.size() > 1 || !current->copies.back().empty()) fail("ends with a cp.async under way");
  current->done = true;
  yield();
}

inline unsigned lane() { return current->number % 32; }

// The lanes of this warp that exist: a block's last warp may be part of one.
inline unsigned existing_lanes() {
  const unsigned first = current->number / 32 * 32;
  const size_t there = std::min<size_t>(32, block->threads.size() - first);
  return there == 32 ? kAllLanes : (1u << there) - 1;
}

// Waits for the lanes of `mask`; the last one to come does `together` for all of them.
template <typename Together>
void meet(unsigned mask, const char* name, const void* in, void* out, Together together) {
  Thread& self = *current;
  if (!(mask >> lane() & 1)) fail("calls a warp-wide function with a mask that leaves its own lane out");
  Meeting& meeting = block->warps[self.number / 32].meetings[mask];
  if (meeting.came && std::strcmp(meeting.name, name)) {
    std::fprintf(stderr, "some lanes of the warp are at %s, others at %s\n", meeting.name, name);
    fail("the warp has diverged");
  }
  meeting.name = name;
  meeting.in[lane()] = in;
  meeting.out[lane()] = out;
  meeting.came |= 1u << lane();
  if (meeting.came != (mask & existing_lanes())) {
    self.waits_at = name;
    yield();
    return;
  }
  const Meeting all = meeting;
  meeting.came = 0;
  together(all);
  for (unsigned i = 0; i < 32; ++i) {
    if (all.came >> i & 1) block->threads[self.number / 32 * 32 + i].waits_at = nullptr;
  }
}

// bar.sync; threads 0 stands for all that have not ended
inline void wait_at_barrier(int id, unsigned threads) {
  if (id < 0 || id > 15) fail("there are barriers 0 to 15");
  if (threads % 32 && threads != block->threads.size()) fail("a barrier takes whole warps");
  Barrier& barrier = block->barriers[id];
  if (barrier.came && barrier.threads != threads) fail("a barrier is asked for different numbers of threads");
  barrier.threads = threads;
  barrier.who.push_back(current->number);
  ++barrier.came;
  current->waits_at = "a barrier";
  yield();
}

// Lets go whoever waits at a barrier that is complete.
inline void open_barriers() {
  unsigned alive = 0;
  for (const Thread& thread : block->threads) alive += !thread.done;
  for (auto& [id, barrier] : block->barriers) {
    if (barrier.came == 0 || barrier.came < (barrier.threads ? barrier.threads : alive)) continue;
    if (barrier.threads && barrier.came > barrier.threads) fail("more threads than were asked for came to a barrier");
    for (unsigned number : barrier.who) block->threads[number].waits_at = nullptr;
    barrier = {};
  }
}

inline void tell_who_waits() {
  std::map<const char*, unsigned> waiting;
  for (const Thread& thread : block->threads) {
    if (!thread.done) ++waiting[thread.waits_at];
  }
  for (const auto& [where, count] : waiting) std::fprintf(stderr, "%u threads wait at %s\n", count, where);
  fail("nobody can go on: the others have ended or wait elsewhere");
}

inline std::mt19937 random_numbers{1};

inline void put_in_order(std::vector<unsigned>& numbers) {
  if (order == Order::kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_numbers);
}

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
  return numbers;
}

inline char* stack_of(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    stacks.push_back(static_cast<char*>(stack));
  }
#ifdef __SANITIZE_ADDRESS__
  // what an earlier thread left there
  __asan_unpoison_memory_region(stacks[number], kStackBytes);
#endif
  return stacks[number];
}

inline void begin(Thread& thread, unsigned number) {
  thread.number = number;
  thread.stack = stack_of(number);
  thread.copies.resize(1);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

inline void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  Block here;
  here.threads = std::vector<Thread>(threads);
  here.warps.resize((threads + 31) / 32);
  // exactly as much as was asked for, so that the sanitizer sees one byte more; all ones is NaN in every type
  here.shared.reset(new unsigned char[shared_bytes]);
  std::memset(here.shared.get(), 0xff, shared_bytes);
  here.shared_bytes = shared_bytes;
  here.body = body;
  block = &here;
  for (unsigned i = 0; i < threads; ++i) begin(here.threads[i], i);
  std::vector<unsigned> numbers = in_order(threads);
  for (unsigned left = threads; left > 0;) {
    put_in_order(numbers);
    bool anyone = false;
    // shuffled, the warps keep step; in order, one goes as far as it can before the next begins: to the block's barrier
    const unsigned together = order == Order::kShuffled ? threads : warpSize;
    for (unsigned first = 0; first < threads; first += together) {
      for (bool again = true; again;) {
        again = false;
        for (unsigned i = first; i < std::min(first + together, threads); ++i) {
          Thread& thread = here.threads[numbers[i]];
          if (thread.done || thread.waits_at) continue;
          anyone = true;
          again = order != Order::kShuffled;
          switch_to(thread);
          left -= thread.done;
        }
      }
    }
    open_barriers();
    if (!anyone && std::none_of(here.threads.begin(), here.threads.end(),
                                [](const Thread& t) { return !t.done && !t.waits_at; }) && left > 0) {
      tell_who_waits();
    }
  }
  block = nullptr;
  current = nullptr;
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads;
  std::vector<unsigned> numbers = in_order(grid.x * grid.y * grid.z);
  put_in_order(numbers);
  for (unsigned number : numbers) {
    blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    run_block(threads.x * threads.y * threads.z, shared_bytes, body);
  }
}

}  // namespace on_host
