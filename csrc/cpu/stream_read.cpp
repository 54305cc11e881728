// stream_read: how fast this machine reads memory. Eight sums of 64-bit words keep every vector unit busy enough
// that only the memory is waited for; each thread reads one contiguous part.

#include <cstring>

#include "../ops.h"

namespace sparsekern {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kWordsPerLine = 8;
// measured on Zen 5, one thread: 29 GB/s at 1 KB ahead, 35 at 4 KB, 39 at 8 KB and more
constexpr int64_t kPrefetchBytes = 8192;

uint64_t sum_lines(const char* buffer, int64_t first_line, int64_t end_line) {
  uint64_t sums[kWordsPerLine] = {};
  for (int64_t line = first_line; line < end_line; ++line) {
    const char* here = buffer + line * kLineBytes;
    __builtin_prefetch(here + kPrefetchBytes);
    uint64_t words[kWordsPerLine];
    std::memcpy(words, here, kLineBytes);
    for (int64_t word = 0; word < kWordsPerLine; ++word) sums[word] += words[word];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

uint64_t stream_read(const void* buffer, int64_t bytes, int threads) {
  const char* start = static_cast<const char*>(buffer);
  const int64_t lines = bytes / kLineBytes;
  uint64_t sum = 0;
  if (threads <= 1) {
    sum = sum_lines(start, 0, lines);
  } else {
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
      sum += sum_lines(start, lines * part / threads, lines * (part + 1) / threads);
    }
  }
  for (int64_t byte = lines * kLineBytes; byte < bytes; byte += 8) {
    uint64_t word = 0;
    std::memcpy(&word, start + byte, static_cast<size_t>(bytes - byte < 8 ? bytes - byte : 8));
    sum += word;
  }
  return sum;
}

}  // namespace sparsekern
