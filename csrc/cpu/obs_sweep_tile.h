// obs_sweep of a tile of rows. The tile is held transposed, a row to a lane, so that an entry of U is one number for all
// of them and no sum crosses lanes; 128 columns of 32 rows with their errors are 32 KB, which L1 holds. A panel of
// columns first takes all errors to its left at once, in registers, and then its own one by one.
//
// Included by one file an instruction set, after its target pragma, which defines kLanes, AllLanes and kPanel. No STL
// here: a weak symbol compiled for AVX-512 could replace the baseline's.
#pragma once

#include "obs_sweep.h"

namespace sparsekern {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kTileRows = kVectors * kLanes;
static_assert(kTileRows <= kMostTileRows, "the scratch is made for kMostTileRows");

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// One column of the tile.
struct Column {
  Floats rows[kVectors];
};

// The errors of a column, and until the column is swept -1 in the lanes whose weight may be kept, else 0.
union Errors {
  Column e;
  Ints kept[kVectors];
};

inline Floats select(Ints condition, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((condition & reinterpret_cast<Ints>(yes)) | (~condition & reinterpret_cast<Ints>(no)));
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPARSEKERN_SHUFFLES 1
#endif
#endif

#ifdef SPARSEKERN_SHUFFLES
// Swaps the lanes of `a` that have bit kHalf with those of `b` that do not.
template <int kHalf, int... kLane>
inline void swap_halves(Floats& a, Floats& b, Lanes<kLane...>) {
  const Floats first = __builtin_shufflevector(a, b, ((kLane & kHalf) ? kLanes + kLane - kHalf : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kHalf) ? kLanes + kLane : kLane + kHalf)...);
  a = first;
}

template <int kHalf>
inline void swap_all_halves(Floats (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kHalf)) swap_halves<kHalf>(square[i], square[i + kHalf], AllLanes{});
  }
}

inline void transpose(Floats (&square)[kLanes]) {
  swap_all_halves<1>(square);
  swap_all_halves<2>(square);
  if (kLanes > 4) swap_all_halves<kLanes / 2 < 4 ? 2 : 4>(square);
  if (kLanes > 8) swap_all_halves<kLanes / 2 < 8 ? 2 : 8>(square);
}
#else
inline void transpose(Floats (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = square[i][j];
      square[i][j] = square[j][i];
      square[j][i] = swapped;
    }
  }
}
#endif

// What a tile works on: rows first_row to first_row + rows - 1 of the sweep.
struct Tile {
  const ObsSweep& sweep;
  int64_t first_row;
  int64_t rows;
  Column* w;         // [block]
  Errors* errors;    // [block]
  Floats* saliency;  // [block], of one register's rows
};

// The lanes of rows that do not exist are zeros that may not be kept.
void load(const Tile& tile) {
  const ObsSweep& sweep = tile.sweep;
  for (int64_t first = 0; first < sweep.block; first += kLanes) {
    const int64_t columns = sweep.block - first < kLanes ? sweep.block - first : kLanes;
    for (int vector = 0; vector < kVectors; ++vector) {
      Floats weight[kLanes], kept[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        weight[lane] = kept[lane] = Floats{};
        if (vector * kLanes + lane >= tile.rows) continue;
        const int64_t row = tile.first_row + vector * kLanes + lane;
        const float* source = sweep.weight + row * sweep.weight_stride + first;
        const uint8_t* mask = sweep.mask + row * sweep.mask_stride + first;
        if (columns == kLanes) {
          Bytes allowed;
          __builtin_memcpy(&weight[lane], source, sizeof(Floats));
          __builtin_memcpy(&allowed, mask, sizeof(Bytes));
          kept[lane] = reinterpret_cast<Floats>(-__builtin_convertvector(allowed, Ints));
        } else {
          Ints allowed = {};
          for (int64_t column = 0; column < columns; ++column) {
            weight[lane][column] = source[column];
            allowed[column] = -static_cast<int32_t>(mask[column]);
          }
          kept[lane] = reinterpret_cast<Floats>(allowed);
        }
      }
      transpose(weight);
      transpose(kept);
      for (int64_t column = 0; column < columns; ++column) {
        tile.w[first + column].rows[vector] = weight[column];
        tile.errors[first + column].kept[vector] = reinterpret_cast<Ints>(kept[column]);
      }
    }
  }
}

// The rows of the next tile lie a whole weight's row apart, where no hardware prefetcher follows.
void prefetch(const ObsSweep& sweep, int64_t first_row) {
  constexpr int64_t kLine = 64;
  const int64_t end = first_row + kTileRows < sweep.rows ? first_row + kTileRows : sweep.rows;
  for (int64_t row = first_row; row < end; ++row) {
    const char* weight = reinterpret_cast<const char*>(sweep.weight + row * sweep.weight_stride);
    const char* mask = reinterpret_cast<const char*>(sweep.mask + row * sweep.mask_stride);
    for (int64_t byte = 0; byte < sweep.block * 4; byte += kLine) __builtin_prefetch(weight + byte);
    for (int64_t byte = 0; byte < sweep.block; byte += kLine) __builtin_prefetch(mask + byte);
  }
}

// `column_of(i)` is column i of the tile, `target` [rows, block] the whole of the result, a row every `stride` elements.
template <class ColumnOf>
void store(const Tile& tile, float* target, int64_t stride, ColumnOf column_of) {
  const int64_t block = tile.sweep.block;
  for (int64_t first = 0; first < block; first += kLanes) {
    const int64_t columns = block - first < kLanes ? block - first : kLanes;
    for (int vector = 0; vector < kVectors; ++vector) {
      Floats square[kLanes] = {};
      for (int64_t column = 0; column < columns; ++column) square[column] = column_of(first + column).rows[vector];
      transpose(square);
      for (int64_t lane = 0; lane < kLanes && vector * kLanes + lane < tile.rows; ++lane) {
        float* row = target + (tile.first_row + vector * kLanes + lane) * stride + first;
        if (columns == kLanes) {
          __builtin_memcpy(row, &square[lane], sizeof(Floats));
        } else {
          for (int64_t column = 0; column < columns; ++column) row[column] = square[lane][column];
        }
      }
    }
  }
}

// w[:, first : first + kColumns] -= e[:, :swept] @ u[:swept, first : first + kColumns]
template <int kColumns>
void take_errors(const Tile& tile, int64_t first, int64_t swept) {
  Column sums[kColumns];
  for (int column = 0; column < kColumns; ++column) sums[column] = tile.w[first + column];
  const float* u = tile.sweep.u + first;
  for (int64_t k = 0; k < swept; ++k, u += tile.sweep.block) {
    const Column e = tile.errors[k].e;
    for (int column = 0; column < kColumns; ++column) {
      for (int vector = 0; vector < kVectors; ++vector) sums[column].rows[vector] -= e.rows[vector] * u[column];
    }
  }
  for (int column = 0; column < kColumns; ++column) tile.w[first + column] = sums[column];
}

// Of columns first to first + m - 1, leave the n of largest saliency (w / u_jj)^2 among those that may be kept.
void choose(const Tile& tile, int64_t first) {
  const ObsSweep& sweep = tile.sweep;
  const float* diagonal = sweep.u + first * (sweep.block + 1);
  for (int vector = 0; vector < kVectors; ++vector) {
    Floats* saliency = tile.saliency;
    for (int64_t i = 0; i < sweep.m; ++i) {
      const Floats scaled = tile.w[first + i].rows[vector] / diagonal[i * (sweep.block + 1)];
      saliency[i] = select(tile.errors[first + i].kept[vector], scaled * scaled, Floats{} - 1.0f);
    }
    for (int64_t i = 0; i < sweep.m; ++i) {
      // comparisons give -1, so this counts downwards how many go before i; of equals the lower index does
      Ints before = {};
      for (int64_t k = 0; k < i; ++k) before += saliency[k] >= saliency[i];
      for (int64_t k = i + 1; k < sweep.m; ++k) before += saliency[k] > saliency[i];
      tile.errors[first + i].kept[vector] &= before > -static_cast<int32_t>(sweep.n);
    }
  }
}

// To the nearest grid value, half to even.
inline Floats nearest(Floats w, Floats scale, float levels) {
  // adding and taking away 1.5 * 2^23 leaves an integer; levels are far below
  constexpr float kInteger = 12582912.0f;
  const Floats most = Floats{} + levels;
  Floats steps = w / scale;
  steps = select(steps > most, most, steps);
  steps = select(steps < -most, -most, steps);
  steps = (steps + kInteger) - kInteger;
  // a scale of 0 makes 0 / 0; + 0.0 makes a small negative weight +0.0
  return select(scale != Floats{}, steps * scale, Floats{}) + 0.0f;
}

// Columns first to end - 1; what they lose reaches the columns up to panel_end - 1.
template <bool kRound>
void sweep_columns(const Tile& tile, int64_t first, int64_t end, int64_t panel_end, const Column& scale) {
  const ObsSweep& sweep = tile.sweep;
  for (int64_t j = first; j < end; ++j) {
    const float* u = sweep.u + j * sweep.block;
    for (int vector = 0; vector < kVectors; ++vector) {
      const Floats w = tile.w[j].rows[vector];
      const Floats rounded = kRound ? nearest(w, scale.rows[vector], sweep.levels) : w;
      const Floats q = select(tile.errors[j].kept[vector], rounded, Floats{});
      const Floats e = (w - q) / u[j];
      tile.w[j].rows[vector] = q;
      tile.errors[j].e.rows[vector] = e;
      for (int64_t k = j + 1; k < panel_end; ++k) tile.w[k].rows[vector] -= e * u[k];
    }
  }
}

void sweep_tile(const ObsSweep& sweep, int64_t first_row, int64_t rows, void* scratch) {
  Column* w = static_cast<Column*>(scratch);
  Errors* errors = reinterpret_cast<Errors*>(w + sweep.block);
  const Tile tile = {sweep, first_row, rows, w, errors, reinterpret_cast<Floats*>(errors + sweep.block)};
  Column scale = {};
  if (sweep.scale != nullptr) {
    for (int64_t row = 0; row < rows; ++row) scale.rows[row / kLanes][row % kLanes] = sweep.scale[first_row + row];
  }
  const auto columns = sweep.scale != nullptr ? sweep_columns<true> : sweep_columns<false>;
  load(tile);
  prefetch(sweep, first_row + rows);
  // a group is chosen when all of it is repaired, so a panel holds whole groups
  const int64_t panel = sweep.m == 0 ? kPanel : sweep.m > kPanel ? sweep.m : kPanel / sweep.m * sweep.m;
  const int64_t group = sweep.m == 0 ? panel : sweep.m;
  for (int64_t first = 0; first < sweep.block; first += panel) {
    const int64_t end = first + panel < sweep.block ? first + panel : sweep.block;
    int64_t column = first;
    for (; column + kPanel <= end; column += kPanel) take_errors<kPanel>(tile, column, first);
    for (; column < end; ++column) take_errors<1>(tile, column, first);
    for (int64_t start = first; start < end; start += group) {
      const int64_t stop = start + group < end ? start + group : end;
      if (sweep.m != 0) choose(tile, start);
      columns(tile, start, stop, end, scale);
    }
  }
  store(tile, sweep.pruned, sweep.pruned_stride, [w](int64_t column) -> const Column& { return w[column]; });
  store(tile, sweep.e, sweep.e_stride, [errors](int64_t column) -> const Column& { return errors[column].e; });
}

}  // namespace
}  // namespace sparsekern
