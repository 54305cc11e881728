// keep_largest: radix select. A float's bits, with the sign turned, order as an unsigned integer as the floats do; digit
// by digit the keys that share those of the threshold are kept. A long set is not read digit by digit: a sample brackets
// the threshold, one pass counts what lies above the bracket and collects what lies in it, which is little, and only
// where the sample misled is everything taken. A last pass compares all with the threshold. Long sets are cut into
// parts, short ones are shared out whole, small ones ranked by comparing all with all.

#include <cstdlib>
#include <cstring>

#include "../ops.h"

namespace sparsekern {
namespace {

// 11 bits a digit, the last one with a bit of the one before it
constexpr int kDigits = 2048;
constexpr int kShifts[] = {21, 10, 0};
// sets no larger are ranked by comparing all with all
constexpr int64_t kSmallSet = 32;
// sets no smaller are bracketed by a sample of one in kSampleEvery
constexpr int64_t kLongSet = 1 << 14;
constexpr int64_t kSampleEvery = 32;
// half the bracket, in standard deviations of a rank in the sample: it misleads once in hundreds of sets
constexpr double kDeviations = 3.0;
// what a part of a set is worth cutting at
constexpr int64_t kPartSize = 1 << 15;
constexpr int kMostParts = 64;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));

uint32_t key_of(float x) {
  // + 0.0 makes -0.0 the 0.0 that it is equal to
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // all bits of a negative number, the sign alone of another
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

float float_of(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What lies in low..high is collected, what is larger is counted; all that is NaN as well.
struct Bracket {
  float low;
  float high;
};

struct Part {
  int64_t first;
  int64_t end;
  int64_t missing;     // NaN
  int64_t above;       // larger than the bracket
  int64_t candidates;  // keys in the bracket, collected at `first` of the scratch
};

void collect(const float* saliency, const Bracket& bracket, uint32_t* scratch, Part& part) {
  uint32_t* keys = scratch + part.first;
  int64_t candidates = 0, missing = 0;
  // comparisons give -1
  int64_t i = part.first, above = 0;
  const Floats low = Floats{} + bracket.low, high = Floats{} + bracket.high;
  while (i + 4 <= part.end) {
    // counters of 32 bits are emptied in time
    const int64_t stop = part.end - 3 < i + (int64_t{1} << 30) ? part.end - 3 : i + (int64_t{1} << 30);
    Ints larger = {}, unordered = {};
    for (; i < stop; i += 4) {
      Floats x;
      std::memcpy(&x, saliency + i, sizeof x);
      larger += x > high;
      unordered += x != x;
      const Ints inside = (x >= low) & (x <= high);
      const Longs any = reinterpret_cast<Longs>(inside);
      if (any[0] | any[1]) {
        int32_t here[4];
        std::memcpy(here, &inside, sizeof here);
        for (int lane = 0; lane < 4; ++lane) {
          keys[candidates] = key_of(saliency[i + lane]);
          candidates -= here[lane];
        }
      }
    }
    for (int lane = 0; lane < 4; ++lane) above -= larger[lane], missing -= unordered[lane];
  }
  for (; i < part.end; ++i) {
    const float x = saliency[i];
    above += x > bracket.high;
    missing += x != x;
    if (x >= bracket.low && x <= bracket.high) keys[candidates++] = key_of(x);
  }
  part.missing = missing;
  part.above = above;
  part.candidates = candidates;
}

// The kept-th largest of the keys, which are moved about; `kept` becomes how many of those equal to it are kept, `tied`
// how many there are.
uint32_t select_key(uint32_t* keys, int64_t size, int64_t& kept, int64_t& tied) {
  for (const int shift : kShifts) {
    uint32_t counts[kDigits] = {};
    for (int64_t i = 0; i < size; ++i) ++counts[keys[i] >> shift & (kDigits - 1)];
    uint32_t digit = kDigits - 1;
    while (counts[digit] < kept) kept -= counts[digit--];
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

constexpr Bracket kEverything = {-__builtin_inff(), __builtin_inff()};

// Where the threshold lies, from a sample that `scratch` holds twice.
Bracket bracket_of(const float* saliency, int64_t size, int64_t kept, uint32_t* scratch) {
  const int64_t count = size / kSampleEvery;
  for (int64_t i = 0; i < count; ++i) {
    // not the same place of every 32: columns of a block differ in their saliency
    const int64_t place = static_cast<int64_t>(static_cast<uint32_t>(i) * 2654435761u >> 27);
    const float x = saliency[i * kSampleEvery + place];
    if (x != x) return kEverything;
    scratch[i] = key_of(x);
  }
  const double share = static_cast<double>(kept) / static_cast<double>(size);
  const double spread = kDeviations * __builtin_sqrt(static_cast<double>(count) * share * (1 - share)) + 2;
  const auto rank = static_cast<int64_t>(static_cast<double>(count) * share);
  const auto margin = static_cast<int64_t>(spread);
  Bracket bracket = kEverything;
  int64_t tied;
  if (rank - margin >= 1) {
    std::memcpy(scratch + count, scratch, static_cast<size_t>(count) * 4);
    int64_t upper = rank - margin;
    bracket.high = float_of(select_key(scratch + count, count, upper, tied));
  }
  if (rank + margin <= count) {
    int64_t lower = rank + margin;
    bracket.low = float_of(select_key(scratch, count, lower, tied));
  }
  return bracket;
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
  for (int part = 0; part < count; ++part) {
    parts[part].first = size * part / count;
    parts[part].end = size * (part + 1) / count;
  }
  Bracket bracket = size < kLongSet ? kEverything : bracket_of(saliency, size, kept, scratch);
  int64_t above, candidates;
  for (;;) {
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
    for (int part = 0; part < count; ++part) collect(saliency, bracket, scratch, parts[part]);
    above = parts[0].above;
    candidates = parts[0].candidates;
    int64_t missing = parts[0].missing;
    for (int part = 1; part < count; ++part) {
      std::memmove(scratch + candidates, scratch + parts[part].first, static_cast<size_t>(parts[part].candidates) * 4);
      above += parts[part].above;
      candidates += parts[part].candidates;
      missing += parts[part].missing;
    }
    if (missing != 0) return missing;
    if (above < kept && kept <= above + candidates) break;
    bracket = kEverything;
  }
  kept -= above;
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
  const auto work = [&](int worker) {
    // the parts first: their integers are the wider ones
    Part* mine = reinterpret_cast<Part*>(scratch + scratch_bytes / 64 * 64 * worker);
    uint32_t* keys = reinterpret_cast<uint32_t*>(mine + parts);
    int64_t missing = 0;
    for (int64_t set = sets * worker / workers; set < sets * (worker + 1) / workers; ++set) {
      const float* here = saliency + set * size;
      missing += small ? keep_in_small_set(here, kept[set * kept_stride], mask + set * size, size)
                       : keep_in_set(here, kept[set * kept_stride], mask + set * size, size, keys, mine, parts);
    }
    return missing;
  };
  int64_t missing = 0;
  if (workers == 1) {
    // not in a region of one thread: regions inside it would start new threads each time
    missing = work(0);
  } else {
#pragma omp parallel for num_threads(workers) schedule(static, 1) reduction(+ : missing)
    for (int worker = 0; worker < workers; ++worker) missing += work(worker);
  }
  std::free(scratch);
  return missing;
}

}  // namespace sparsekern
