// What tail and implicit gradients share: the plan P = exp(S + u + v) at the last duals, passes over it, the first
// visit (dV) and the last (dQ, dK, dmask), given the modifier field
//
//     dS_ij = P_ij D_ij - sum_k X_ki Y_kj exp(S_ij + row_ki + col_kj)
//
// whose factors are P times row and column exponentials where these are moderate ("scaled"), as in
// torch_sinkhorn_attn/method/staircase.py, where the derivation is.
#pragma once

#include <numeric>

#include "cotangents.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// A plan factor exp(S + row + col), its weights X, Y in the field, and its dual differences from the plan.
template <typename T>
struct Factor {
  T *row, *col;             // [rows + 1], [cols + 1]
  T *x, *y;                 // weights
  T *row_exp, *col_exp;     // exp(row - u), exp(col - v); used where scaled
  bool of_columns = false;  // of a column half-step

  // The factor at a score, for row i and column j; the order as in Head::exponentiate.
  T at(T score, int64_t i, int64_t j) const {
    return std::exp(of_columns ? (score + row[i]) + col[j] : (score + col[j]) + row[i]);
  }
};

template <typename T>
inline constexpr T kLargestExponent = sizeof(T) == 4 ? T(30) : T(300);  // of LARGEST_EXPONENT in staircase.py

template <typename T>
class Adjoint : public Cotangents<T> {
 public:
  using Base = Cotangents<T>;
  using Base::grad_plan, Base::corner_grad, Base::value_panels;
  using Base::h, Base::bin, Base::p, Base::out, Base::job, Base::grad, Base::cotangent_tile, Base::gathered, Base::wide;
  using Base::u, Base::log_a, Base::row_sums, Base::read, Base::v, Base::log_b, Base::col_sums, Base::from_grad;

  Adjoint(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena, int64_t factor_count,
          Arena* tokens = nullptr)
      : Base(problem, job, team, arena, tokens), count(factor_count) {
    field_rows = arena.take<T>(h.rows * count);
    field_panels = arena.take<T>(h.cols * count);
    accumulators = arena.take<T>(h.part_columns());
    sum_accumulators = arena.take<T>(h.part_columns());
    wide_accumulators = arena.take<T>(h.part_columns() * wide);
    copies = arena.take<T>(team.threads * h.largest_tile);
    lines = arena.take<T>(team.threads * 64 * wide);
    factors.resize(static_cast<size_t>(count));
    for (auto& f : factors) {
      for (T** side : {&f.row, &f.x, &f.row_exp}) *side = arena.take<T>(h.rows + 1);
      for (T** side : {&f.col, &f.y, &f.col_exp}) *side = arena.take<T>(h.cols + 1);
    }
  }

  // The first visit: P is made and kept; then there are row_sums and col_sums of P*D. `also` runs on every tile.
  template <typename Also>
  void first_visit(const Also& also) {
    if (grad_plan)
      sum_visit(also);
    else
      value_visit(also);
  }

  // Of attention: dV is gathered, and gives the column sums.
  template <typename Also>
  void value_visit(const Also& also) {
    const int64_t width = h.value_width;
    std::fill(wide_accumulators, wide_accumulators + h.part_columns() * width, T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      T* tile = h.own_tile(b, slot);
      h.scores(b, tile);
      h.exponentiate(b, tile, u, v);
      if (p.implicit) {  // its system is singular, so both its sides must come from the same P
        const T* d = cotangent_tile(b, slot);
        for (int64_t i = 0; i < b.rows; ++i) sum_row(b, tile, d, i, [](int64_t, const Vec<T>&) {});
      }
      also(b, tile, part, slot);
      const T* weights = tile;
      if (p.dropout) {
        T* copy = copies + slot * h.largest_tile;
        drop_out(h, b, tile, copy);
        weights = copy;
      }
      T* to = wide_accumulators + (h.parts[part].offset + b.col - h.parts[part].col) * width;
      matmul(to, width, weights, 1, b.stride, grad + b.row * width, kWidth<T>, width, b.cols, width,
             std::min(b.rows, h.n - b.row), true);
    });
    h.reduce(wide_accumulators, width, gathered);
    const int64_t panel = p.value_features * kWidth<T>;
    h.each_range(h.cols, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const T* column = value_panels + j / kWidth<T> * panel + j % kWidth<T>;
        col_sums[j] = 0;
        for (int64_t k = 0; k < p.value_features; ++k) col_sums[j] += gathered[j * width + k] * column[k * kWidth<T>];
      }
    });
    col_sums[h.cols] = 0;
    if (out->value) store_columns(out->value, p.value_features, width);
    if (!bin.present()) return;
    for (int64_t j = 0; j < h.m; ++j) col_sums[j] += bin.from[j] * from_grad[j];
    col_sums[h.cols] = static_cast<T>(bin.dot(bin.to, read, h.n));
  }

  // Of the plan itself: P*D is summed.
  template <typename Also>
  void sum_visit(const Also& also) {
    std::fill(sum_accumulators, sum_accumulators + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      T* tile = h.own_tile(b, slot);
      h.scores(b, tile);
      h.exponentiate(b, tile, u, v);
      const T* d = cotangent_tile(b, slot);
      T* columns = sum_accumulators + h.parts[part].offset + b.col - h.parts[part].col;
      for (int64_t i = 0; i < b.rows; ++i)
        sum_row(b, tile, d, i,
                [&](int64_t j, const Vec<T>& entry) { (Vec<T>::loadu(columns + j) + entry).store(columns + j); });
      also(b, tile, part, slot);
    });
    h.reduce(sum_accumulators, 1, col_sums);
    col_sums[h.cols] = 0;
    if (!bin.present()) return;
    for (int64_t j = 0; j < h.m; ++j) col_sums[j] += bin.from[j] * from_grad[j];
    col_sums[h.cols] = static_cast<T>(bin.dot(bin.to, read, h.n) + bin.corner * corner_grad);
  }

  // row_sums of P*D for row i of a block; `also` sees every vector of P*D.
  template <typename Also>
  void sum_row(const Block<T>& b, const T* tile, const T* d, int64_t i, const Also& also) {
    Vec<T> total(T(0));
    for (int64_t j = 0; j < b.cols; j += kWidth<T>) {
      const Vec<T> entry = Vec<T>::loadu(tile + i * b.stride + j) * Vec<T>::loadu(d + i * b.stride + j);
      total = total + entry;
      also(j, entry);
    }
    row_sums[b.row + i] = sum_of(total) + (bin.present() ? bin.to[b.row + i] * read[b.row + i] : T(0));
  }

  // The last visit, given the field: dQ, dK, dmask, and the dustbin's scores; `also` runs on every tile first.
  template <typename Also>
  void score_visit(bool scaled, const Also& also) {
    pack_field(scaled);
    const int64_t width = h.width;
    constexpr int64_t W = kWidth<T>;
    std::fill(wide_accumulators, wide_accumulators + h.part_columns() * width, T(0));
    std::fill(sum_accumulators, sum_accumulators + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      T* tile = h.plan(b, slot, u, v);
      also(b, tile, part, slot);
      T* d = cotangent_tile(b, slot);
      if (scaled)  // the field is of low rank: -X Y^T
        matmul(d, b.stride, field_rows + b.row * count, count, 1, field_panels + b.col * count, count * W, W, b.rows,
               b.cols, count, true);
      for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; j += W)
          (Vec<T>::loadu(d + i * b.stride + j) * Vec<T>::loadu(tile + i * b.stride + j)).store(d + i * b.stride + j);
      if (!scaled) subtract_factors(b, d, slot);
      T* to = wide_accumulators + (h.parts[part].offset + b.col - h.parts[part].col) * width;
      const int64_t real = std::min(b.rows, h.n - b.row);
      if (out->key) matmul(to, width, d, 1, b.stride, h.query + b.row * width, W, width, b.cols, width, real, true);
      if (out->query) {
        T* line = lines + slot * 64 * wide;
        matmul(line, width, d, b.stride, 1, h.key + b.col * width, W, width, b.rows, width, b.cols, false);
        T* query = out->query + (h.head_index() * p.length + job().row0 + b.row) * h.d;
        const T factor = static_cast<T>(p.score_factor);
        for (int64_t i = 0; i < real; ++i)
          for (int64_t k = 0; k < h.d; ++k) query[i * h.d + k] = line[i * width + k] * factor;
      }
      if (out->mask) add_to_mask(b, d, part, real);
    });
    if (out->key) {  // the packed queries hold scale / epsilon already
      h.reduce(wide_accumulators, width, gathered);
      store_columns(out->key, h.d, width);
    }
    if (out->mask && out->mask_row == 0) add_sum_accumulators();
    if (bin.present()) dustbin_scores();
  }

  // out [cols + 1] = F^T x and r = F y for one factor each, by one visit: for every row r = (F_r y)_i, then
  // x_i = map(i, r), then out += F_c^T x. Null factors mean the plan itself; a null y or out skips that half.
  template <typename Map>
  void pass(const Factor<T>* row_factor, const T* y, const Factor<T>* col_factor, T* result, bool scaled,
            const Map& map) {
    if (result) std::fill(accumulators, accumulators + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      tile_pass(b, scaled ? h.plan(b, slot, u, v) : nullptr, part, slot, row_factor, y, col_factor, result, scaled,
                map);
    });
    if (result) h.reduce(accumulators, 1, result);
  }

  // The part of `pass` on one tile; accumulators must be zero before the first.
  template <typename Map>
  void tile_pass(const Block<T>& b, const T* tile, int64_t part, int64_t slot, const Factor<T>* row_factor, const T* y,
                 const Factor<T>* col_factor, const T* result, bool scaled, const Map& map) {
    T* columns = accumulators + h.parts[part].offset + b.col - h.parts[part].col;
    if (scaled) {
      if (y && result) return row_column_pass<true, true>(b, tile, y + b.col, columns, map);
      if (y) return row_column_pass<true, false>(b, tile, y + b.col, columns, map);
      return row_column_pass<false, true>(b, tile, y, columns, map);
    }
    T* own = copies + slot * h.largest_tile;
    T images[64];
    if (y) {
      factor_tile(b, own, *row_factor);
      row_column_pass<true, false>(b, own, y + b.col, columns,
                                   [&](int64_t i, T sum) { return images[i - b.row] = map(i, sum); });
    } else {
      for (int64_t i = 0; i < b.rows; ++i) images[i] = map(b.row + i, T(0));
    }
    if (!result) return;
    factor_tile(b, own, *col_factor);
    row_column_pass<false, true>(b, own, y, columns, [&](int64_t i, T) { return images[i - b.row]; });
  }

  const int64_t count;  // factors
  std::vector<Factor<T>> factors;
  T *accumulators, *sum_accumulators;  // of the parts; the second for sums of P*D, and of dS under a mask of one row

 private:
  void factor_tile(const Block<T>& b, T* tile, const Factor<T>& f) const {
    h.scores(b, tile);
    if (f.of_columns)
      h.template exponentiate<true>(b, tile, f.row, f.col);
    else
      h.exponentiate(b, tile, f.row, f.col);
  }

  void pack_field(bool scaled) {
    constexpr int64_t W = kWidth<T>;
    if (!scaled) return;
    for (int64_t k = 0; k < count; ++k) {
      const auto& f = factors[static_cast<size_t>(k)];
      for (int64_t i = 0; i < h.rows; ++i) field_rows[i * count + k] = -f.x[i] * f.row_exp[i];
      for (int64_t j = 0; j < h.cols; ++j) field_panels[(j / W * count + k) * W + j % W] = f.y[j] * f.col_exp[j];
    }
  }

  // d -= sum_k X_k Y_k^T * factor k, formed entry by entry: beside large dual differences P would underflow.
  void subtract_factors(const Block<T>& b, T* d, int64_t slot) const {
    T* own = copies + slot * h.largest_tile;
    for (const auto& f : factors) {
      factor_tile(b, own, f);
      for (int64_t i = 0; i < b.rows; ++i) {
        const T weight = f.x[b.row + i];
        for (int64_t j = 0; j < b.cols; ++j) d[i * b.stride + j] -= own[i * b.stride + j] * weight * f.y[b.col + j];
      }
    }
  }

  // `gathered` [cols, stride] to a tensor [N, H, S, features].
  void store_columns(T* to, int64_t features, int64_t stride) const {
    T* lines_to = to + (h.head_index() * p.size + job().col0) * features;
    h.each_range(h.m, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        std::copy(gathered + j * stride, gathered + j * stride + features, lines_to + j * features);
    });
  }

  void add_to_mask(const Block<T>& b, const T* d, int64_t part, int64_t real) const {
    const int64_t reached = std::min(b.cols, h.m - b.col);
    if (out->mask_row == 0) {  // shared by all rows: gathered by parts
      T* columns = sum_accumulators + h.parts[part].offset + b.col - h.parts[part].col;
      for (int64_t i = 0; i < real; ++i)
        for (int64_t j = 0; j < reached; ++j) columns[j] += d[i * b.stride + j];
      return;
    }
    for (int64_t i = 0; i < real; ++i) {
      T* line = mask_line(b.row + i) + (job().col0 + b.col) * out->mask_col;
      if (out->mask_col)
        for (int64_t j = 0; j < reached; ++j) line[j] += d[i * b.stride + j];
      else
        line[0] += static_cast<T>(std::accumulate(d + i * b.stride, d + i * b.stride + reached, 0.0));
    }
  }

  void add_sum_accumulators() {
    h.reduce(sum_accumulators, 1, gathered);
    T* line = mask_line(0) + job().col0 * out->mask_col;
    for (int64_t j = 0; j < h.m; ++j) line[j * out->mask_col] += gathered[j];
  }

  T* mask_line(int64_t row) const {
    return out->mask + job().batch * out->mask_batch + job().head * out->mask_head + (job().row0 + row) * out->mask_row;
  }

  void dustbin_scores() {
    const int64_t at = h.head_index();
    const T share = static_cast<T>(1 / p.epsilon);
    T *to = out->row_score + at * p.length + job().row0, *from = out->col_score + at * p.size + job().col0;
    T corner = bin.corner * corner_grad;
    for (int64_t i = 0; i < h.n; ++i) to[i] = bin.to[i] * read[i];
    for (int64_t j = 0; j < h.m; ++j) from[j] = bin.from[j] * from_grad[j];
    for (const auto& f : factors) {
      for (int64_t i = 0; i < h.n; ++i) to[i] -= f.at(bin.to_score[i], i, h.cols) * f.x[i] * f.y[h.cols];
      for (int64_t j = 0; j < h.m; ++j) from[j] -= f.at(bin.from_score[j], h.rows, j) * f.x[h.rows] * f.y[j];
      corner -= f.at(bin.corner_score, h.rows, h.cols) * f.x[h.rows] * f.y[h.cols];
    }
    for (int64_t i = 0; i < h.n; ++i) to[i] *= share;
    for (int64_t j = 0; j < h.m; ++j) from[j] *= share;
    out->corner_score[at * p.bins + job().bin] = corner * share;
  }

  T *field_rows, *field_panels;  // -X [rows, count], Y^T in panels
  T* wide_accumulators;          // of the parts
  T *copies, *lines;             // of each thread
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
