// The rows of one rank, where a sequence is sharded: one half-step or pass at a time over its real pairs, since between
// two of them others complete the vectors of columns. Packed tokens and tiles lie in a `state` from one to the next.
#pragma once

#include "adjoint.h"
#include "lse.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

template <typename T>
class RankPlan {
 public:
  RankPlan(RankVerb verb, const Problem<T>& problem, const Job& job, const Team& team, Arena& state, Arena& scratch)
      : h(problem, job, team, state, /*keep_tiles=*/true, scratch), p(problem), verb(verb) {
    for (T** side : {&u, &x}) *side = scratch.take<T>(h.rows);
    for (T** side : {&v, &y, &image}) *side = scratch.take<T>(h.cols);
    accumulators = scratch.take<T>(2 * h.part_columns());
    if (verb != RankVerb::values) return;
    value = scratch.take<T>(h.cols * h.value_width);
    lines = scratch.take<T>(team.threads * 64 * h.value_width);
    if (p.dropout) dropped = scratch.take<T>(team.threads * h.largest_tile);
  }

  void run(const RankGiven<T>& given, const RankResult<T>& result) {
    read(given.u, p.length, h.job.row0, h.n, h.rows, -kInf<T>, u);
    read(given.v, p.size, h.job.col0, h.m, h.cols, -kInf<T>, v);
    read(given.x, p.length, h.job.row0, h.n, h.rows, T(0), x);
    read(given.y, p.size, h.job.col0, h.m, h.cols, T(0), y);
    T *rows = place(result.rows, p.length, h.job.row0), *cols = place(result.cols, p.size, h.job.col0);
    switch (verb) {
      case RankVerb::pack:
        return h.pack();
      case RankVerb::row_lse:
        return row_lse_to(rows);
      case RankVerb::col_lse:
        column_lse(h, u, accumulators, image);
        return static_cast<void>(std::copy(image, image + h.m, cols));
      case RankVerb::absorb:
        return absorb(given.scored);
      case RankVerb::row_sums:
        return row_sums(rows);
      case RankVerb::col_sums:
        return col_sums(cols);
      case RankVerb::sweep:
        return sweep(rows, cols);
      default:
        return values(rows, result.output);
    }
  }

 private:
  void read(const T* from, int64_t length, int64_t first, int64_t active, int64_t padded, T nothing, T* to) const {
    if (!from) return;
    from += h.head_index() * length + first;
    std::copy(from, from + active, to);
    std::fill(to + active, to + padded, nothing);
  }

  T* place(T* to, int64_t length, int64_t first) const { return to ? to + h.head_index() * length + first : nullptr; }

  int64_t real_rows(const Block<T>& block) const { return std::min(block.rows, h.n - block.row); }

  void row_lse_to(T* to) {
    h.each_block([&](const Block<T>& block, int64_t, int64_t slot) {
      T* tile = h.own_tile(block, slot);
      h.scores(block, tile);
      for (int64_t i = 0; i < real_rows(block); ++i)
        to[block.row + i] = row_lse(tile + i * block.stride, v + block.col, block.cols, -kInf<T>);
    });
  }

  // The tiles that are kept become exp(S + u + v).
  void absorb(bool scored) {
    h.each_block([&](const Block<T>& block, int64_t, int64_t) {
      if (!block.tile) return;
      if (!scored) h.scores(block, block.tile);
      h.exponentiate(block, block.tile, u, v);
    });
  }

  // exp(S + u + v) y
  void row_sums(T* to) {
    h.each_block([&](const Block<T>& block, int64_t, int64_t slot) { sum_rows(block, h.plan(block, slot, u, v), to); });
  }

  void sum_rows(const Block<T>& block, const T* tile, T* to) {
    row_column_pass<true, false>(block, tile, y + block.col, accumulators, [&](int64_t i, T sum) {
      if (i < h.n) to[i] = sum;
      return T(0);
    });
  }

  // exp(S + u + v)^T x
  void col_sums(T* to) {
    gather_columns(to, [&](const Block<T>& block, const T* tile, T* columns) {
      row_column_pass<false, true>(block, tile, y, columns, [&](int64_t i, T) { return x[i]; });
    });
  }

  // Both in one reading: the sums r of rows, and those of columns with the scalings x / r that balance the rows.
  void sweep(T* row, T* col) {
    gather_columns(col, [&](const Block<T>& block, const T* tile, T* columns) {
      row_column_pass<true, true>(block, tile, y + block.col, columns, [&](int64_t i, T sum) {
        if (i >= h.n) return T(0);
        row[i] = sum;
        return x[i] == 0 ? T(0) : x[i] / sum;
      });
    });
  }

  template <typename Body>
  void gather_columns(T* to, const Body& body) {
    std::fill(accumulators, accumulators + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& block, int64_t part, int64_t slot) {
      body(block, h.plan(block, slot, u, v), accumulators + h.parts[part].offset + block.col - h.parts[part].col);
    });
    h.reduce(accumulators, 1, image);
    std::copy(image, image + h.m, to);
  }

  // diag(x) exp(S + u + v) diag(y) V with dropout, and its row sums without V.
  void values(T* sums, T* output) {
    const int64_t width = h.value_width;
    h.pack_side(p.value, h.key_head, h.job.col0, h.m, h.cols, p.value_features, width, T(1), value);
    h.each_range(h.cols, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < width; ++k) value[j * width + k] *= y[j];
    });
    h.each_block([&](const Block<T>& block, int64_t, int64_t slot) {
      const T* tile = h.plan(block, slot, u, v);
      sum_rows(block, tile, sums);
      if (p.dropout) {
        T* copy = dropped + slot * h.largest_tile;
        drop_out(h, block, tile, copy);
        tile = copy;
      }
      T* line = lines + slot * 64 * width;
      matmul(line, width, tile, block.stride, 1, value + block.col * width, kWidth<T>, width, block.rows, width,
             block.cols, false);
      for (int64_t i = 0; i < real_rows(block); ++i, line += width) {
        const int64_t row = block.row + i;
        sums[row] *= x[row];
        T* to = output + (h.head_index() * p.length + h.job.row0 + row) * p.value_features;
        for (int64_t k = 0; k < p.value_features; ++k) to[k] = line[k] * x[row];
      }
    });
  }

  Head<T> h;
  const Problem<T>& p;
  const RankVerb verb;
  T *u, *x;          // [rows]
  T *v, *y, *image;  // [cols]
  T* accumulators;   // of the parts, twice
  T *value = nullptr, *lines = nullptr, *dropped = nullptr;
};

// The adjoint's two visits that meet features, at the last duals; its passes are RankPlan's sums.
template <typename T>
class RankAdjoint : public Adjoint<T> {
 public:
  RankAdjoint(const Problem<T>& problem, const Job& job, const Team& team, Arena& state, Arena& scratch, int64_t terms)
      : Adjoint<T>(problem, job, team, scratch, terms, &state) {}

  void run(RankVerb verb, const RankGiven<T>& given, const RankResult<T>& result) {
    this->read_given(given.backward, result.backward, 0);
    const auto nothing = [](const Block<T>&, const T*, int64_t, int64_t) {};
    if (verb == RankVerb::value_gradient) return this->first_visit(nothing);
    read_field(given);
    this->score_visit(/*scaled=*/true, nothing);
  }

 private:
  using Adjoint<T>::h, Adjoint<T>::p;

  void read_field(const RankGiven<T>& given) {
    const int64_t count = given.terms;
    const T *rows = given.row_terms + (h.head_index() * p.length + h.job.row0) * count,
            *cols = given.col_terms + (h.head_index() * p.size + h.job.col0) * count;
    for (int64_t k = 0; k < count; ++k) {
      auto& f = this->factors[static_cast<size_t>(k)];
      for (int64_t i = 0; i < h.rows; ++i) f.x[i] = i < h.n ? rows[i * count + k] : T(0), f.row_exp[i] = 1;
      for (int64_t j = 0; j < h.cols; ++j) f.y[j] = j < h.m ? cols[j * count + k] : T(0), f.col_exp[j] = 1;
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
