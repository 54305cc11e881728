// Every compiled op, with the layout of what it reads and writes. Raw pointers and sizes: no torch, no pybind11.
#pragma once

#include <cstdint>

namespace sparsekern {

// Raised by one whenever a signature or a layout here changes; ops/compiled.py refuses a module that has another.
constexpr int kAbi = 7;

enum class DType : int { kBFloat16 = 0, kFloat32 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int64_t value_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2; }

// One implementation per instruction set, and whether this machine has it; and, where a later one can be faster, whether
// this one is the better choice.
struct InstructionSet {
  const char* name;
  bool (*supported)();
  bool (*preferred)() = nullptr;
};

// All names that there are, best first: a processor that has one has those after it.
constexpr const char* kInstructionSets[] = {"amx_bf16", "avx512_bf16", "avx512", "avx512_vnni",
                                            "avx512bw", "avx2",        "portable"};

// linear_bitmap: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], W in panels of kPanelRows outputs, cut into blocks of
// kBlockInputs inputs; rows and inputs that do not exist have zero bits.
//   panels   ceil(out_features / kPanelRows)
//   blocks   ceil(in_features / kBlockInputs)
//   masks    [panels, blocks, kBlockMasks], mask q of a block: bit 2 n + j = row n, input 2 q + j is kept. A mask is a
//            row of an AMX tile in VNNI order, and a block of them is one cache line.
//   values   [kept] and kTailBytes of zeros, the kept weights in the order of the bits
//   panel_offsets  [panels + 1], values[panel_offsets[p]] is the first of panel p
constexpr int64_t kPanelRows = 16;
constexpr int64_t kBlockInputs = 32;
constexpr int64_t kBlockMasks = 16;
// Masks that keep more than the panel has would make a kernel read on: after as many masks as this it goes back to the
// panel's end at the latest, so that it stays within their weights and the vector load at the last of them.
constexpr int64_t kGuardMasks = 4;
constexpr int64_t kTailBytes = kGuardMasks * 32 * 4 + 64;

struct BitmapWeight {
  DType dtype;  // of values, bias, x, y and dense
  const uint32_t* masks;
  const void* values;
  const int64_t* panel_offsets;
  int64_t out_features;
  int64_t in_features;
};

// Best first, ended by a null name.
extern const InstructionSet kLinearBitmapSets[];

//   x     [tokens, in_features]
//   bias  [out_features] or null
//   y     [tokens, out_features], every element written
//   set   index into kLinearBitmapSets
// Accumulates in float32. Needs tokens > 0; works on `threads` threads, and with 1 starts no parallel region. Returns
// false when there is no memory for the scratch, tokens * in_features * 4 bytes, and for many tokens 600 KB a thread.
// Many tokens are multiplied without the zeros where that is faster; of an x with NaN or infinity the zeros are
// multiplied too.
bool linear_bitmap(const BitmapWeight& weight, const void* x, const void* bias, void* y, int64_t tokens, int set,
                   int threads);

// dense [rows of the panels, in_features], every element written, of panels first_panel to end_panel - 1
void expand_bitmap(const BitmapWeight& weight, void* dense, int64_t first_panel, int64_t end_panel, int set, int threads);

// linear_dense: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], W as linear_bitmap's panels are with every weight kept: its
// masks left out, its values with the zeros.
//   panels  [panels, blocks * kBlockMasks, kPanelRows, 2], rows and inputs that do not exist are zeros
struct DenseWeight {
  DType dtype;  // of panels, bias, x and y
  const void* panels;
  int64_t out_features;
  int64_t in_features;
};

// Best first, ended by a null name.
extern const InstructionSet kLinearDenseSets[];

// x, bias, y, tokens, set (an index into kLinearDenseSets), threads and what is returned as in linear_bitmap.
bool linear_dense(const DenseWeight& weight, const void* x, const void* bias, void* y, int64_t tokens, int set,
                  int threads);

// linear_24: y[t, o] = sum_i x[t, i] W[o, i] + bias[o], W bfloat16 with two values of every four inputs, in the panels and
// blocks of linear_bitmap.
//   values     [panels, blocks, kGroups24, kPanelRows, 2], those of group g of a row in the order of their inputs
//   positions  [panels, blocks, kGroups24], of row n bits 4 n and 4 n + 1 the first value's input in its group, the two
//              bits after them the second's
// Values of rows and inputs that do not exist are zeros, at any position.
constexpr int64_t kGroups24 = kBlockInputs / 4;

struct Weight24 {
  const void* values;
  const uint64_t* positions;
  int64_t out_features;
  int64_t in_features;
};

// Best first, ended by a null name.
extern const InstructionSet kLinear24Sets[];

// x, bias, y, tokens, set (an index into kLinear24Sets), threads and what is returned as in linear_bitmap, all bfloat16.
// What is not kept is not multiplied: NaN and infinity in x reach the outputs that keep a weight there.
bool linear_24(const Weight24& weight, const void* x, const void* bias, void* y, int64_t tokens, int set, int threads);

// bitmap_rows: a weight as it is saved (formats/bitmap.py), from the dense one and back. Nothing that it says of itself
// is believed: a row is counted before it is converted, and what is wrong is told by its number.
struct BitmapRows {
  DType dtype;
  const void* values;          // [kept], in the order of the bits
  const uint8_t* bitmap;       // [out_features, bitmap_row_bytes(in_features)], low bit first
  const int64_t* row_offsets;  // [out_features + 1]
  int64_t kept;
  int64_t out_features;
  int64_t in_features;
};

struct DenseRows {
  DType dtype;
  const void* weight;  // [out_features, in_features], a row every row_stride elements
  int64_t row_stride;
  int64_t out_features;
  int64_t in_features;
};

constexpr int64_t bitmap_row_bytes(int64_t in_features) { return (in_features + 7) / 8; }

// no row is wrong
constexpr int64_t kNoRow = INT64_MAX;

// Best first, ended by a null name.
extern const InstructionSet kBitmapRowsSets[];

// The first row whose offsets leave the values or fall, or do not count its ones, or that has ones after the last input.
int64_t check_bitmap(const BitmapRows& packed, int set, int threads);

// dense [out_features, in_features], every element written unless a row is wrong. Returns the first that is, or kNoRow.
int64_t bitmap_to_dense(const BitmapRows& packed, void* dense, int set, int threads);

// Writes all of bitmap and row_offsets; -0.0 is a zero. Returns how many weights are not finite.
int64_t dense_to_bits(const DenseRows& dense, uint8_t* bitmap, int64_t* row_offsets, int set, int threads);

// values [packed.kept], what `dense` holds where the bits of `packed` are; packed.values is not read. Returns the first
// wrong row, or kNoRow.
int64_t dense_to_values(const DenseRows& dense, const BitmapRows& packed, void* values, int set, int threads);

// bitmap_panels: a weight as it is saved to what linear_bitmap reads, and back. One row of either is checked as above.
// Best first, ended by a null name.
extern const InstructionSet kBitmapPanelsSets[];

//   masks          [panels, blocks, kBlockMasks], all written
//   values         [kept] and kTailBytes of zeros
//   panel_offsets  [panels + 1]
// Returns the first wrong row of `packed`, or kNoRow.
int64_t bitmap_to_panels(const BitmapRows& packed, uint32_t* masks, void* values, int64_t* panel_offsets, int set,
                         int threads);

// values [panel_offsets[panels]], bitmap and row_offsets as in BitmapRows, all written. Needs offsets that neither fall
// nor leave the values. Returns the first panel whose ones its offsets do not count, or that has ones where the weight
// ends, or kNoRow.
int64_t panels_to_bitmap(const BitmapWeight& weight, void* values, uint8_t* bitmap, int64_t* row_offsets, int set,
                         int threads);

// linear_bitmap_int8: y[t, o] = sum_i x[t, i] s[o, i / group_size] W[o, i] + bias[o], W integers of -127 to 127 in panels
// of kPanelRows outputs, cut into blocks of kInt8BlockInputs inputs.
//   panels   ceil(out_features / kPanelRows)
//   blocks   ceil(in_features / kInt8BlockInputs)
//   groups   ceil(in_features / group_size), one at least
//   masks    [panels, blocks, kBlockMasks], mask q of a block: bit 4 n + j = row n, input 4 q + j is kept
//   values   [kept] and kTailBytes of zeros, the kept integers in the order of the bits
//   panel_offsets  [panels + 1], values[panel_offsets[p]] is the first of panel p
//   scales   [panels, groups, kPanelRows], anything where there is no row
constexpr int64_t kInt8BlockInputs = 64;

struct BitmapInt8Weight {
  DType dtype;  // of bias, x, y and dense
  const uint64_t* masks;
  const int8_t* values;
  const int64_t* panel_offsets;
  const float* scales;
  int64_t group_size;  // a multiple of kInt8BlockInputs
  int64_t out_features;
  int64_t in_features;
};

// Best first, ended by a null name.
extern const InstructionSet kLinearBitmapInt8Sets[];

// x, bias, y, set, threads and the result as of linear_bitmap. x is rounded to integers, a token at a time
// (cpu/linear_bitmap_int8.h), whose products are summed exactly within a group of at most 65536 inputs; the groups' sums
// are added in float32. A token with a NaN or infinite input has NaN in every output. Scratch: in_features * 24 bytes for
// every 8 tokens.
bool linear_bitmap_int8(const BitmapInt8Weight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                        int set, int threads);

// dense [rows of the panels, in_features], every element written, of panels first_panel to end_panel - 1: the integers
// times their scale, rounded to the dtype
void expand_bitmap_int8(const BitmapInt8Weight& weight, void* dense, int64_t first_panel, int64_t end_panel, int set,
                        int threads);

//   packed         a weight as it is saved, of kInt8
//   masks, values, panel_offsets  as above, all written
// Returns the first wrong row of `packed`, or kNoRow.
int64_t bitmap_int8_to_panels(const BitmapRows& packed, uint64_t* masks, int8_t* values, int64_t* panel_offsets,
                              int set, int threads);

// Where panels_to_bitmap_int8 writes, as in BitmapRows.
struct Int8RowsOut {
  int8_t* values;
  uint8_t* bitmap;
  int64_t* row_offsets;
};

// All of `rows` written; weight.scales is not read. Needs offsets that neither fall nor leave the values. Returns the
// first panel whose ones its offsets do not count, or that has ones where the weight ends, or kNoRow.
int64_t panels_to_bitmap_int8(const BitmapInt8Weight& weight, const Int8RowsOut& rows, int set, int threads);

// linear_bitmap_index: linear_bitmap for a bfloat16 weight with few kept weights, W as values and where each stands in a
// window of kWindowInputs inputs. A step takes up to four kept weights of each row of a panel from one window.
//   panels   ceil(out_features / kPanelRows)
//   windows  ceil(in_features / kWindowInputs)
//   steps    [panels, windows], how many steps the window has
//   masks    [all steps], which lanes of a step hold a weight. With bfloat16 values, bit 16 (n / 4) + 8 h + 2 (n % 4) + j =
//            weight 2 h + j of row n; with int8 values, bit 4 n + k = weight k of row n
//   places   [kept] and kIndexTail, the input within its window, in the order of the bits
//   values   [kept] and kIndexTail, step by step: bfloat16, those with h = 0 in the order of rows, then those with h = 1;
//            int8, in the order of the bits
//   step_offsets, value_offsets  [panels + 1], where each panel's masks and values start
constexpr int64_t kWindowInputs = 128;
// the elements that a step may read behind its panel's end
constexpr int64_t kIndexTail = 64;

struct BitmapIndexWeight {
  DType dtype;  // of the values, kBFloat16 or kInt8
  const uint16_t* steps;
  const uint64_t* masks;
  const uint8_t* places;
  const void* values;
  const int64_t* step_offsets;
  const int64_t* value_offsets;
  int64_t out_features;
  int64_t in_features;
};

// Whether this machine has the instructions.
bool has_linear_bitmap_index();

// x, bias, y, threads and the result as of linear_bitmap, all bfloat16. A token with a NaN or infinite input has NaN in
// every output.
bool linear_bitmap_index(const BitmapIndexWeight& weight, const void* x, const void* bias, void* y, int64_t tokens,
                         int threads);

// linear_bitmap_int8_index: linear_bitmap_int8 for a weight with few kept weights, in the order above.
//   scales      [panels, groups, kPanelRows] as in BitmapInt8Weight
//   group_size  a multiple of kWindowInputs
struct Int8Scales {
  DType dtype;  // of bias, x and y
  const float* scales;
  int64_t group_size;
};

bool has_linear_bitmap_int8_index();

// x, bias, y, threads and the result as of linear_bitmap_int8, and y the same bits. Scratch: in_features * 24 bytes for
// every 8 tokens.
bool linear_bitmap_int8_index(const BitmapIndexWeight& weight, const Int8Scales& scales, const void* x,
                              const void* bias, void* y, int64_t tokens, int threads);

// From a checked weight as it is saved, of kBFloat16 or kInt8: writes steps, step_offsets and value_offsets, or, given
// those, the rest.
struct BitmapIndexOut {
  uint16_t* steps;
  uint64_t* masks;
  uint8_t* places;
  void* values;
  int64_t* step_offsets;
  int64_t* value_offsets;
};
void bitmap_to_index_steps(const BitmapRows& packed, const BitmapIndexOut& out);
void bitmap_to_index(const BitmapRows& packed, const BitmapIndexOut& out, int threads);

// The inverse: values [kept], bitmap and row_offsets as in BitmapRows, all written. Needs offsets that neither fall nor
// leave masks and values. Returns the first panel whose masks its offsets do not count, or whose places do not rise or
// leave the weight, or kNoRow.
int64_t index_to_bitmap(const BitmapIndexWeight& weight, void* values, uint8_t* bitmap, int64_t* row_offsets,
                        int threads);

// obs_sweep: prune, and where `scale` is given round, one block of columns from left to right with the OBS update; see
// ops/obs_sweep.py.
//   weight  [rows, block], a row every weight_stride elements
//   u       [block, block], upper triangular
//   mask    [rows, block], a row every mask_stride bytes, 1 = may be kept
//   n, m    keep n of every m columns, chosen on repaired weights; m divides block. m = 0 keeps all that mask allows
//   scale   [rows], the step of the grid, or null; levels, its largest integer, at most 2^20
//   pruned  [rows, block], a row every pruned_stride elements, every element written; may be weight itself
//   e       [rows, block], a row every e_stride elements, every element written
struct ObsSweep {
  const float* weight;
  int64_t weight_stride;
  const float* u;
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t n;
  int64_t m;
  const float* scale;
  float levels;
  float* pruned;
  int64_t pruned_stride;
  float* e;
  int64_t e_stride;
  int64_t rows;
  int64_t block;
};

// Best first, ended by a null name.
extern const InstructionSet kObsSweepSets[];

// set is an index into kObsSweepSets. Needs rows and block > 0; returns false when there is no memory for the scratch.
bool obs_sweep(const ObsSweep& sweep, int set, int threads);

// keep_largest: the mask of the kept largest of each set, of equals those of the lower index.
//   saliency  [sets, size]
//   kept      [sets], one every kept_stride, each 0..size
//   mask      [sets, size], 1 = kept, every element written unless there is a NaN
// Returns how many NaN there are, -1 when there is no memory for the scratch.
int64_t keep_largest(const float* saliency, const int64_t* kept, int64_t kept_stride, uint8_t* mask, int64_t sets,
                     int64_t size, int threads);

// stream_read: the sum of a buffer as 64-bit words, wrapping, zeros after its end. Reads every byte once.
//   buffer  [bytes]
uint64_t stream_read(const void* buffer, int64_t bytes, int threads);

// gram: total += x^T x in float32, on and above the diagonal; what lies below it is left unspecified.
// Best first, ended by a null name; there is none for every machine.
extern const InstructionSet kGramSets[];

//   x      [tokens, in_features] bfloat16, float16 or float32
//   total  [in_features, in_features] float32
//   set    index into kGramSets
// Needs threads > 0; the result is the same for any number. Returns false when there is no memory for the scratch, as
// much as twice 256 tokens in float32.
bool gram(const void* x, DType dtype, float* total, int64_t tokens, int64_t in_features, int set, int threads);

// addmm: total += scale * a b, all float32.
// One of the strides is 1: row-major or column-major.
struct Operand {
  const float* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Whether this machine has the instructions, and no library that uses them.
bool has_addmm();

//   total  [rows, columns], rows total_stride apart, overlaps neither a nor b
//   a      [rows, inner]
//   b      [inner, columns]
// The result is the same for any number of threads. Returns false when there is no memory for the scratch, 256 columns
// of a and 256 rows of b.
bool addmm(float* total, int64_t total_stride, const Operand& a, const Operand& b, int64_t rows, int64_t inner,
           int64_t columns, float scale, int threads);

}  // namespace sparsekern
