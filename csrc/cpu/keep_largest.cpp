// keep_largest: radix select. A float's bits, with the sign turned, order as an unsigned integer as the floats do. One
// pass counts the upper 11 bits, a second collects those that share them with the threshold, which are few, and the
// rest is decided among those; a last pass compares everything with the threshold. Long sets are cut into parts, short
// ones are shared out whole, small ones ranked by comparing all with all.

#include <cstdlib>
#include <cstring>

#include "../ops.h"

namespace sparsekern {
namespace {

// the upper two digits of a key have 11 bits, the last one 10
constexpr int kDigits = 2048;
constexpr int kTopShift = 21;
constexpr int kMiddleShift = 10;
// counters of one digit that are used in turn: close saliencies share their upper bits, and an addition to a counter
// waits for the one before it
constexpr int kTurns = 4;
// sets no larger are ranked by comparing all with all
constexpr int64_t kSmallSet = 32;
// what a part of a set is worth cutting at
constexpr int64_t kPartSize = 1 << 15;
constexpr int kMostParts = 64;

uint32_t key_of(float x) {
  // + 0.0 makes -0.0 the 0.0 that it is equal to
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

float float_of(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Part {
  int64_t first;
  int64_t end;
  int64_t missing;     // NaN seen
  int64_t candidates;  // keys collected at `first` of the scratch
  uint32_t counts[kDigits];
};

void count_top(const float* saliency, Part& part) {
  uint32_t counts[kTurns][kDigits] = {};
  int64_t missing = 0;
  int64_t i = part.first;
  for (; i + kTurns <= part.end; i += kTurns) {
    for (int turn = 0; turn < kTurns; ++turn) {
      const float x = saliency[i + turn];
      missing += x != x;
      ++counts[turn][key_of(x) >> kTopShift];
    }
  }
  for (; i < part.end; ++i) {
    missing += saliency[i] != saliency[i];
    ++counts[0][key_of(saliency[i]) >> kTopShift];
  }
  part.missing = missing;
  for (int digit = 0; digit < kDigits; ++digit) {
    part.counts[digit] = counts[0][digit] + counts[1][digit] + counts[2][digit] + counts[3][digit];
  }
}

void collect(const float* saliency, uint32_t top, uint32_t* scratch, Part& part) {
  uint32_t* candidates = scratch + part.first;
  int64_t count = 0;
  for (int64_t i = part.first; i < part.end; ++i) {
    const uint32_t key = key_of(saliency[i]);
    candidates[count] = key;
    count += key >> kTopShift == top;
  }
  part.candidates = count;
}

// The digit in which the kept-th largest lies; `kept` becomes its rank among those of that digit.
uint32_t digit_of_kept(const uint32_t* counts, int64_t& kept) {
  int digit = kDigits - 1;
  while (digit > 0 && counts[digit] < kept) kept -= counts[digit--];
  return static_cast<uint32_t>(digit);
}

// The kept-th largest of the keys; `kept` becomes how many of those equal to it are kept, `tied` how many there are.
uint32_t select_key(uint32_t* keys, int64_t size, int64_t& kept, int64_t& tied) {
  uint32_t digit = 0;
  constexpr int kShifts[] = {kMiddleShift, 0};
  for (const int shift : kShifts) {
    // the last digit is read with the bit before it, which all keys that are left share
    uint32_t counts[kDigits] = {};
    for (int64_t i = 0; i < size; ++i) ++counts[keys[i] >> shift & (kDigits - 1)];
    digit = digit_of_kept(counts, kept);
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t key = keys[i];
      keys[count] = key;
      count += (key >> shift & (kDigits - 1)) == digit;
    }
    size = count;
  }
  tied = size;
  return keys[0];
}

void write_mask(const float* saliency, float threshold, bool with_tied, uint8_t* mask, int64_t first, int64_t end) {
  if (with_tied) {
    for (int64_t i = first; i < end; ++i) mask[i] = saliency[i] >= threshold;
  } else {
    for (int64_t i = first; i < end; ++i) mask[i] = saliency[i] > threshold;
  }
}

// One set in `parts` parts on as many threads. Returns the NaN seen; the mask is not written when there are any.
int64_t keep_in_set(const float* saliency, int64_t kept, uint8_t* mask, int64_t size, uint32_t* scratch, Part* parts,
                    int count) {
  if (kept == 0 || kept == size) {
    int64_t missing = 0;
    for (int64_t i = 0; i < size; ++i) missing += saliency[i] != saliency[i];
    std::memset(mask, kept != 0, static_cast<size_t>(size));
    return missing;
  }
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int part = 0; part < count; ++part) {
    parts[part].first = size * part / count;
    parts[part].end = size * (part + 1) / count;
    count_top(saliency, parts[part]);
  }
  for (int part = 1; part < count; ++part) {
    parts[0].missing += parts[part].missing;
    for (int digit = 0; digit < kDigits; ++digit) parts[0].counts[digit] += parts[part].counts[digit];
  }
  if (parts[0].missing) return parts[0].missing;
  const uint32_t top = digit_of_kept(parts[0].counts, kept);
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int part = 0; part < count; ++part) collect(saliency, top, scratch, parts[part]);
  int64_t candidates = parts[0].candidates;
  for (int part = 1; part < count; ++part) {
    std::memmove(scratch + candidates, scratch + parts[part].first, static_cast<size_t>(parts[part].candidates) * 4);
    candidates += parts[part].candidates;
  }
  int64_t tied;
  const float threshold = float_of(select_key(scratch, candidates, kept, tied));
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int part = 0; part < count; ++part) {
    write_mask(saliency, threshold, kept == tied, mask, parts[part].first, parts[part].end);
  }
  if (kept == tied) return 0;
  for (int64_t i = 0; kept > 0; ++i) {
    if (saliency[i] == threshold) {
      mask[i] = 1;
      --kept;
    }
  }
  return 0;
}

int64_t keep_in_small_set(const float* saliency, int64_t kept, uint8_t* mask, int64_t size) {
  int64_t missing = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float x = saliency[i];
    missing += x != x;
    int64_t before = 0;
    for (int64_t k = 0; k < i; ++k) before += saliency[k] >= x;
    for (int64_t k = i + 1; k < size; ++k) before += saliency[k] > x;
    mask[i] = before < kept;
  }
  return missing;
}

int at_most(int threads, int64_t worth) { return worth < threads ? static_cast<int>(worth) : threads; }

}  // namespace

int64_t keep_largest(const float* saliency, const int64_t* kept, int64_t kept_stride, uint8_t* mask, int64_t sets,
                     int64_t size, int threads) {
  const bool small = size <= kSmallSet;
  // a single set is cut, several are shared out
  const int parts = small || sets > 1 ? 1 : at_most(at_most(threads, kMostParts), 1 + size / kPartSize);
  const int workers = sets == 1 ? 1 : at_most(threads, 1 + sets * size / kPartSize);
  const int64_t scratch_bytes = small ? 0 : size * 4 + parts * static_cast<int64_t>(sizeof(Part)) + 64;
  char* scratch = small ? nullptr : static_cast<char*>(std::malloc(static_cast<size_t>(scratch_bytes * workers)));
  if (!small && scratch == nullptr) return -1;
  int64_t missing = 0;
#pragma omp parallel for num_threads(workers) schedule(static, 1) reduction(+ : missing) if (workers > 1)
  for (int worker = 0; worker < workers; ++worker) {
    // the parts first: their integers are the wider ones
    Part* mine = reinterpret_cast<Part*>(scratch + scratch_bytes / 64 * 64 * worker);
    uint32_t* keys = reinterpret_cast<uint32_t*>(mine + parts);
    for (int64_t set = sets * worker / workers; set < sets * (worker + 1) / workers; ++set) {
      const float* here = saliency + set * size;
      missing += small ? keep_in_small_set(here, kept[set * kept_stride], mask + set * size, size)
                       : keep_in_set(here, kept[set * kept_stride], mask + set * size, size, keys, mine, parts);
    }
  }
  std::free(scratch);
  return missing;
}

}  // namespace sparsekern
