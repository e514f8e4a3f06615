// One problem laid out for the kernels: packed queries and keys, the blocks of its support, and the tiles of its scores
// and of its plan. Columns are counted from the job's first column and padded to whole vectors; rows likewise.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "vector.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

inline constexpr int64_t kMaxParts = 8;  // how far one problem is split; fixed, so that sums do not depend on threads

// Consecutive rows and the columns any of them reaches.
template <typename T>
struct Block {
  int64_t row, rows;  // rows is padded to kRowAlign
  int64_t col, cols;  // padded to kColAlign; cols may be 0
  int64_t stride;     // elements from one row of a tile to the next
  bool ragged;        // some row does not reach all of the columns
  T* tile;            // where its plan is kept between passes; null: it is computed again in each
};

// A run of blocks that is worked on by one thread, and the columns it reaches.
struct Part {
  int64_t first, last;
  int64_t col, cols;
  int64_t offset;  // columns of the parts before
};

inline float float_of_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
inline float float_of_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  uint32_t wide;
  if (magnitude >= 0x7c00u) {  // inf, nan
    wide = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    wide = sign | ((magnitude << 13) + (112u << 23));
  } else {                                                                       // zero and subnormal
    const float small = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&wide, &small, sizeof wide);
    wide |= sign;
  }
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// `count` entries of a line of x from (row, col) on, times `factor`.
template <typename T>
inline void read_line(const Operand& x, int64_t batch, int64_t head, int64_t row, int64_t col, int64_t count, T factor,
                      T* to) {
  const int64_t at = batch * x.batch + head * x.head + row * x.row + col * x.col, step = x.col;
  switch (x.kind) {
    case Kind::float64: {
      const double* from = static_cast<const double*>(x.data) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * step]) * factor;
      break;
    }
    case Kind::float32: {
      const float* from = static_cast<const float*>(x.data) + at;
      if (step == 1)
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]) * factor;
      else
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * step]) * factor;
      break;
    }
    case Kind::bfloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(float_of_bfloat16(from[i * step])) * factor;
      break;
    }
    case Kind::float16: {
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(float_of_float16(from[i * step])) * factor;
      break;
    }
    case Kind::boolean:
      break;  // masks only, read in Head::add_mask
  }
}

// Rows [first, first + rows) of x as [padded_rows, stride], zeros around.
template <typename T>
inline void pack_rows(const Operand& x, int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t columns,
                      int64_t padded_rows, int64_t stride, T factor, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    read_line(x, batch, head, first + i, 0, columns, factor, to + i * stride);
    std::fill(to + i * stride + columns, to + (i + 1) * stride, T(0));
  }
  std::fill(to + rows * stride, to + padded_rows * stride, T(0));
}

// Packed rows [padded, stride] transposed into panels [padded / W][columns][W], the right operand of a product with
// their transpose.
template <typename T>
inline void pack_panels(const T* rows, int64_t padded, int64_t stride, int64_t columns, T* to) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t p = 0; p < padded / W; ++p)
    for (int64_t k = 0; k < columns; ++k)
      for (int64_t w = 0; w < W; ++w) to[(p * columns + k) * W + w] = rows[(p * W + w) * stride + k];
}

template <typename T>
class Head {
 public:
  // What outlives a pass lies in `arena`; the threads' own tiles, of which nothing does, in `scratch`.
  Head(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena, bool keep_tiles, Arena& scratch)
      : p(problem),
        job(job),
        team(team),
        n(job.row1 - job.row0),
        m(job.col1 - job.col0),
        rows(round_up(n, kRowAlign)),
        cols(round_up(m, kColAlign<T>)),
        d(problem.features),
        width(round_up(problem.features, kWidth<T>)),
        value_width(round_up(problem.value_features, kWidth<T>)),
        key_head(job.head / (problem.heads / problem.key_heads)) {
    lo = arena.take<int32_t>(rows);
    hi = arena.take<int32_t>(rows);
    query = arena.take<T>(rows * width);
    key = arena.take<T>(cols * width);
    key_panels = arena.take<T>(cols * d);
    find_blocks(arena.counting());
    int64_t kept = 0;
    for (auto& b : blocks) {
      const int64_t size = b.rows * b.stride;
      largest_tile = std::max(largest_tile, size);
      if (!keep_tiles || (kept += size * static_cast<int64_t>(sizeof(T))) > problem.budget) continue;
      b.tile = arena.take<T>(size);
    }
    tiles = scratch.take<T>(largest_tile * team.threads);
  }

  // Reads the queries, times scale / epsilon, and the keys.
  void pack() {
    pack_side(p.query, job.head, job.row0, n, rows, d, width, static_cast<T>(p.score_factor), query);
    pack_side(p.key, key_head, job.col0, m, cols, d, width, T(1), key, key_panels);
  }

  // Rows of x from `first` on as [padded, stride]; and transposed into panels if wanted.
  void pack_side(const Operand& x, int64_t head, int64_t first, int64_t real, int64_t padded, int64_t columns,
                 int64_t stride, T factor, T* to, T* panels = nullptr) const {
    each_range(padded, [&](int64_t begin, int64_t end) {
      pack_rows(x, job.batch, head, first + begin, std::clamp<int64_t>(real - begin, 0, end - begin), columns,
                end - begin, stride, factor, to + begin * stride);
      if (panels) pack_panels(to + begin * stride, end - begin, stride, columns, panels + begin * columns);
    });
  }

  // body(begin, end) on ranges of [0, total) that begin at whole vectors, in parallel where that pays.
  template <typename Body>
  void each_range(int64_t total, const Body& body) const {
    if (team.threads == 1 || total < 512) return body(int64_t(0), total);
    const int64_t step = round_up((total + team.threads - 1) / team.threads, 64);
    team.each((total + step - 1) / step, [&](int64_t k, int64_t) { body(k * step, std::min(total, (k + 1) * step)); });
  }

  // S on a tile, -inf off the support and on padding, where 0 * infinity may stand.
  void scores(const Block<T>& b, T* tile) const {
    constexpr int64_t W = kWidth<T>;
    matmul(tile, b.stride, query + b.row * width, width, 1, key_panels + b.col * d, d * W, W, b.rows, b.cols, d, false);
    if (p.mask) {  // first: what it holds off the support is nobody's
      add_mask(b, tile);
      forget_dead_columns(b, tile);
    }
    if (b.ragged) {
      for (int64_t i = 0; i < b.rows; ++i) {
        T* line = tile + i * b.stride;
        const int64_t first = std::clamp<int64_t>(lo[b.row + i] - b.col, 0, b.cols);
        const int64_t last = std::clamp<int64_t>(hi[b.row + i] - b.col, first, b.cols);
        std::fill(line, line + first, -kInf<T>);
        std::fill(line + last, line + b.cols, -kInf<T>);
      }
    } else if (b.col + b.cols > m) {
      for (int64_t i = 0; i < b.rows; ++i)
        std::fill(tile + i * b.stride + (m - b.col), tile + i * b.stride + b.cols, -kInf<T>);
    }
    if (b.row + b.rows > n) std::fill(tile + (n - b.row) * b.stride, tile + b.rows * b.stride, -kInf<T>);
  }

  // exp(S + u + v), from the scores in place; u [rows] and v [cols] are -inf on dead lines and on padding. What is
  // added first cancels the score where both are large; it is the side that the half-step of the other summed over.
  template <bool RowsFirst = false>
  void exponentiate(const Block<T>& b, T* tile, const T* u, const T* v) const {
    for (int64_t i = 0; i < b.rows; ++i) {
      T* line = tile + i * b.stride;
      const Vec<T> row(u[b.row + i]);
      for (int64_t j = 0; j < b.cols; j += kWidth<T>) {
        const Vec<T> s = Vec<T>::loadu(line + j), col = Vec<T>::loadu(v + b.col + j);
        exp_of(RowsFirst ? (s + row) + col : (s + col) + row).store(line + j);
      }
    }
  }

  // The tile of exp(S + u + v): the one kept, or made again in the thread's own.
  T* plan(const Block<T>& b, int64_t slot, const T* u, const T* v) const {
    if (b.tile) return b.tile;
    T* tile = own_tile(b, slot);
    scores(b, tile);
    exponentiate(b, tile, u, v);
    return tile;
  }

  // Where a tile is made: its place, or the thread's own.
  T* own_tile(const Block<T>& b, int64_t slot) const { return b.tile ? b.tile : tiles + slot * largest_tile; }

  // body(block, part, slot) for every block, the parts in parallel.
  template <typename Body>
  void each_block(const Body& body) const {
    team.each(static_cast<int64_t>(parts.size()), [&](int64_t part, int64_t slot) {
      for (int64_t k = parts[part].first; k < parts[part].last; ++k) {
        team.check(team);
        body(blocks[k], part, slot);
      }
    });
  }

  // The parts' accumulators, [their columns, features] each, summed in order: out [cols, features].
  void reduce(const T* accumulators, int64_t features, T* out) const {
    each_range(cols, [&](int64_t begin, int64_t end) {
      std::fill(out + begin * features, out + end * features, T(0));
      for (const auto& part : parts) {
        const int64_t first = std::max(begin, part.col), last = std::min(end, part.col + part.cols);
        const T* from = accumulators + (part.offset + first - part.col) * features;
        T* to = out + first * features;
        for (int64_t k = 0; k < (last - first) * features; k += kWidth<T>)
          (Vec<T>::loadu(to + k) + Vec<T>::loadu(from + k)).store(to + k);
      }
    });
  }

  int64_t part_columns() const { return parts.empty() ? 0 : parts.back().offset + parts.back().cols; }
  int64_t head_index() const { return job.batch * p.heads + job.head; }

  const Problem<T>& p;
  const Job& job;
  const Team& team;
  const int64_t n, m;                   // active range
  const int64_t rows, cols;             // padded
  const int64_t d, width, value_width;  // E, and E and Ev in whole vectors
  const int64_t key_head;
  int32_t *lo, *hi;  // [rows] columns of each row
  T *query, *key;    // [rows, width], [cols, width]
  T* key_panels;
  std::vector<Block<T>> blocks;
  std::vector<Part> parts;
  int64_t largest_tile = 0;
  T* tiles;  // [threads, largest_tile]

 private:
  void find_blocks(bool counting) {
    const int64_t* first = p.row_lo + job.batch * p.length + job.row0;
    const int64_t* last = p.row_hi + job.batch * p.length + job.row0;
    int64_t reach = 0;
    for (int64_t i = 0; i < n; ++i) reach = std::max(reach, last[i] - first[i]);
    const int64_t tall = reach * static_cast<int64_t>(sizeof(T));
    const int64_t height = tall >= 2048 && tall <= 12288 ? 64 : 32;  // tiles of half an L2 cache at most
    for (int64_t row = 0; row < n; row += height) {
      const int64_t here = std::min(height, n - row);
      int64_t low = m, high = 0;
      bool ragged = false;
      for (int64_t i = row; i < row + here; ++i) {
        const int64_t start = std::clamp<int64_t>(first[i] - job.col0, 0, m);
        const int64_t end = std::clamp<int64_t>(last[i] - job.col0, start, m);
        if (!counting) lo[i] = static_cast<int32_t>(start), hi[i] = static_cast<int32_t>(end);
        if (start == end) continue;
        low = std::min(low, start);
        high = std::max(high, end);
      }
      for (int64_t i = row; i < row + here; ++i) {
        const int64_t start = first[i] - job.col0, end = last[i] - job.col0;
        ragged |= first[i] == last[i] || start > low || end < high;
      }
      const int64_t col = low < high ? low / kColAlign<T> * kColAlign<T> : 0;
      const int64_t wide = low < high ? round_up(high - col, kColAlign<T>) : 0;
      // Beside the columns a row reaches there may be others of the same vector.
      ragged |= low < high && (col < low || std::min(col + wide, m) > high);
      const int64_t stride = wide + ((wide * sizeof(T)) % 2048 == 0 && wide ? kColAlign<T> : 0);
      blocks.push_back({row, round_up(here, kRowAlign), col, wide, stride, ragged, nullptr});
    }
    if (!counting)
      for (int64_t i = n; i < rows; ++i) lo[i] = hi[i] = 0;
    const int64_t count = static_cast<int64_t>(blocks.size()), split = std::min(count, kMaxParts);
    int64_t offset = 0;
    for (int64_t k = 0; k < split; ++k) {
      Part part{k * count / split, (k + 1) * count / split, cols, 0, offset};
      int64_t end = 0;
      for (int64_t b = part.first; b < part.last; ++b) {
        if (!blocks[b].cols) continue;
        part.col = std::min(part.col, blocks[b].col);
        end = std::max(end, blocks[b].col + blocks[b].cols);
      }
      if (end == 0) part.col = 0;
      part.cols = end - part.col;
      offset += part.cols;
      parts.push_back(part);
    }
  }

  void add_mask(const Block<T>& b, T* tile) const {
    switch (p.mask.kind) {
      case Kind::boolean:
        return each_mask_entry<uint8_t>(b, tile, [](uint8_t keep, T s) { return keep ? s : -kInf<T>; });
      case Kind::float64:
        return add_values<double>(b, tile, [](double x) { return x; });
      case Kind::float32:
        return add_values<float>(b, tile, [](float x) { return x; });
      case Kind::bfloat16:
        return add_values<uint16_t>(b, tile, float_of_bfloat16);
      case Kind::float16:
        return add_values<uint16_t>(b, tile, float_of_float16);
    }
  }

  // Dead rows have no interval or no entry that the mask keeps; dead columns are amid the intervals of live rows.
  void forget_dead_columns(const Block<T>& b, T* tile) const {
    const T* mass = p.log_col_mass + head_index() * p.size + job.col0 + b.col;
    const int64_t real_cols = std::min(b.cols, m - b.col);
    for (int64_t j = 0; j < real_cols; ++j)
      if (mass[j] == -kInf<T>)
        for (int64_t i = 0; i < b.rows; ++i) tile[i * b.stride + j] = -kInf<T>;
  }

  template <typename S, typename Value>
  void add_values(const Block<T>& b, T* tile, const Value& value) const {
    const auto floor = static_cast<decltype(value(S()))>(p.mask_floor);
    each_mask_entry<S>(b, tile, [&](S bits, T s) {
      const auto x = value(bits);
      return x <= floor ? -kInf<T> : s + static_cast<T>(x);  // NaN stays
    });
  }

  template <typename S, typename Change>
  void each_mask_entry(const Block<T>& b, T* tile, const Change& change) const {
    const int64_t real_rows = std::min(b.rows, n - b.row), real_cols = std::min(b.cols, m - b.col);
    const S* mask = static_cast<const S*>(p.mask.data) + job.batch * p.mask.batch + job.head * p.mask.head +
                    (job.row0 + b.row) * p.mask.row + (job.col0 + b.col) * p.mask.col;
    const int64_t step = p.mask.col;
    for (int64_t i = 0; i < real_rows; ++i, mask += p.mask.row) {
      T* line = tile + i * b.stride;
      if (step == 1)
        for (int64_t j = 0; j < real_cols; ++j) line[j] = change(mask[j], line[j]);
      else
        for (int64_t j = 0; j < real_cols; ++j) line[j] = change(mask[j * step], line[j]);
    }
  }
};

// The heart: for four rows at a time, their sums r = tile y, x = map(row, r), and c += tile^T x, so that a row and a
// column half-step take one reading of the tile. y and c begin at the block's first column.
template <bool WantRows, bool WantColumns, typename T, typename Map>
inline void row_column_pass(const Block<T>& b, const T* tile, const T* y, T* c, const Map& map) {
  constexpr int64_t W = kWidth<T>, R = 4;
  for (int64_t i = 0; i < b.rows; i += R) {
    const T* line[R];
    for (int64_t r = 0; r < R; ++r) line[r] = tile + (i + r) * b.stride;
    T sums[R] = {}, x[R];
    if constexpr (WantRows) {
      Vec<T> total[R];
      for (int64_t r = 0; r < R; ++r) total[r] = Vec<T>(T(0));
      for (int64_t j = 0; j < b.cols; j += W) {
        const Vec<T> column = Vec<T>::loadu(y + j);
        for (int64_t r = 0; r < R; ++r) total[r] = fmadd(Vec<T>::loadu(line[r] + j), column, total[r]);
      }
      for (int64_t r = 0; r < R; ++r) sums[r] = sum_of(total[r]);
    }
    for (int64_t r = 0; r < R; ++r) x[r] = map(b.row + i + r, sums[r]);
    if constexpr (WantColumns) {
      for (int64_t j = 0; j < b.cols; j += W) {
        Vec<T> column = Vec<T>::loadu(c + j);
        for (int64_t r = 0; r < R; ++r) column = fmadd(Vec<T>::loadu(line[r] + j), Vec<T>(x[r]), column);
        column.store(c + j);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
