// A grid on one thread of the CPU: the threads of a block are fibers.
//
// A fiber runs until it meets others: its warp at a shuffle, a ballot, ldmatrix or mma, its block at a barrier. Who goes
// first is an argument, so that what leans on one order shows in another. Whoever does not come, or comes elsewhere, is
// told and ends the program.
//
// In order, blocks follow one another. Shuffled, as many as a multiprocessor takes run at once, and one of them may be held
// up for long just after an atomic, which is how it tells others something: what not all of its threads have written by
// then is read as it was. A block that waited for one that has not begun would wait for ever.
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

struct Block {
  dim3 index;
  std::vector<Thread> threads;
  unsigned left = 0;  // threads that have not ended
  // a sweep gives each thread a turn
  std::vector<unsigned> turns;  // the threads in this order
  size_t next_turn = 0;
  bool anyone = false;  // has gone on in this sweep
  bool told = false;    // other blocks something, in this turn
  std::vector<Warp> warps;
  std::vector<unsigned> at_barrier;  // the threads that have come to it
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

inline void wait_at_barrier() {
  block->at_barrier.push_back(current->number);
  current->waits_at = "a barrier";
  yield();
}

// Lets all go on when those that have not ended have come.
inline void open_barrier() {
  unsigned alive = 0;
  for (const Thread& thread : block->threads) alive += !thread.done;
  if (block->at_barrier.size() < alive) return;
  for (unsigned number : block->at_barrier) block->threads[number].waits_at = nullptr;
  block->at_barrier.clear();
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

inline std::vector<char*> free_stacks;

inline char* take_stack() {
  if (free_stacks.empty()) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    free_stacks.push_back(static_cast<char*>(stack));
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
  // what an earlier thread left there
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  return stack;
}

inline void begin(Thread& thread, unsigned number) {
  thread.number = number;
  thread.stack = take_stack();
  thread.copies.resize(1);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

inline std::unique_ptr<Block> begin_block(dim3 index, unsigned threads, size_t shared_bytes,
                                          const std::function<void()>& body) {
  auto made = std::make_unique<Block>();
  made->index = index;
  made->threads = std::vector<Thread>(threads);
  made->warps.resize((threads + 31) / 32);
  // exactly as much as was asked for, so that the sanitizer sees one byte more; all ones is NaN in every type
  made->shared.reset(new unsigned char[shared_bytes]);
  std::memset(made->shared.get(), 0xff, shared_bytes);
  made->shared_bytes = shared_bytes;
  made->body = body;
  for (unsigned i = 0; i < threads; ++i) begin(made->threads[i], i);
  made->left = threads;
  made->turns = in_order(threads);
  put_in_order(made->turns);
  return made;
}

inline bool can_go_on(const Thread& thread) { return !thread.done && !thread.waits_at; }

inline void give_turn(Thread& thread) {
  block->anyone = true;
  switch_to(thread);
  block->left -= thread.done;
}

// After it has given every thread its turn.
inline void end_sweep() {
  open_barrier();
  const auto& threads = block->threads;
  if (!block->anyone && block->left > 0 && std::none_of(threads.begin(), threads.end(), can_go_on)) tell_who_waits();
  block->next_turn = 0;
  block->anyone = false;
  put_in_order(block->turns);
}

// One warp goes as far as it can before the next begins: to the block's barrier.
inline void sweep_in_order() {
  const unsigned threads = static_cast<unsigned>(block->threads.size());
  for (unsigned first = 0; first < threads; first += warpSize) {
    for (bool again = true; again;) {
      again = false;
      for (unsigned i = first; i < std::min(first + warpSize, threads); ++i) {
        Thread& thread = block->threads[block->turns[i]];
        if (!can_go_on(thread)) continue;
        again = true;
        give_turn(thread);
      }
    }
  }
  end_sweep();
}

// The warps keep step, but it may end in the middle of a sweep. Returns whether the last turn told others something.
inline bool take_turns(unsigned count) {
  block->told = false;
  for (; count > 0 && block->left > 0 && !block->told; --count) {
    Thread& thread = block->threads[block->turns[block->next_turn]];
    if (can_go_on(thread)) give_turn(thread);
    if (++block->next_turn == block->threads.size()) end_sweep();
  }
  return block->told;
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  // what a multiprocessor takes; turns of a block in a row; in how many of them the one that is held up stays so
  constexpr unsigned kThreadsAtOnce = 2048, kTurns = 1024, kHeldUp = 64;
  gridDim = grid;
  blockDim = threads;
  const unsigned block_threads = threads.x * threads.y * threads.z;
  std::vector<unsigned> numbers = in_order(grid.x * grid.y * grid.z);
  put_in_order(numbers);
  const bool shuffled = order == Order::kShuffled;
  const size_t most = shuffled ? std::max(kThreadsAtOnce / block_threads, 1u) : 1;
  std::vector<std::unique_ptr<Block>> there;
  const Block* held_up = nullptr;
  for (size_t begun = 0; begun < numbers.size() || !there.empty();) {
    while (there.size() < most && begun < numbers.size()) {
      const unsigned number = numbers[begun++];
      const dim3 index(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
      there.push_back(begin_block(index, block_threads, shared_bytes, body));
    }
    if (there.size() == 1 || (shuffled && random_numbers() % kHeldUp == 0)) held_up = nullptr;
    const size_t which = shuffled ? random_numbers() % there.size() : 0;
    block = there[which].get();
    if (block == held_up) continue;
    blockIdx = block->index;
    if (shuffled) {
      const bool told = take_turns(1 + random_numbers() % kTurns);
      if (told && held_up == nullptr && random_numbers() % 2 == 0) held_up = block;
    } else {
      while (block->left > 0) sweep_in_order();
    }
    if (block->left > 0) continue;
    for (const Thread& thread : block->threads) free_stacks.push_back(thread.stack);
    if (block == held_up) held_up = nullptr;
    there.erase(there.begin() + static_cast<ptrdiff_t>(which));
  }
  block = nullptr;
  current = nullptr;
}

}  // namespace on_host
