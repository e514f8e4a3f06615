// What tail and implicit gradients share: the plan P = exp(S + u + v) at the last duals, passes over it, the first visit
// (dV) and the last (dQ, dK, dmask), given the modifier field
//
//     dS_ij = P_ij D_ij - sum_k X_ki Y_kj exp(S_ij + row_ki + col_kj)
//
// whose factors are P times row and column exponentials where these are moderate ("scaled"), as in
// torch_sinkhorn_attn/staircase.py, where the derivation is.
#pragma once

#include "dropout.h"
#include "dustbin.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// A plan factor exp(S + row + col), its weights X, Y in the field, and its dual differences from the plan.
template <typename T>
struct Factor {
  T *row, *col;          // [rows + 1], [cols + 1]
  T *x, *y;              // weights
  T *row_exp, *col_exp;  // exp(row - u), exp(col - v); used where scaled
  bool of_columns = false;  // of a column half-step

  // The factor at a score, for row i and column j; the order as in Head::exponentiate.
  T at(T score, int64_t i, int64_t j) const {
    return std::exp(of_columns ? (score + row[i]) + col[j] : (score + col[j]) + row[i]);
  }
};

template <typename T>
inline constexpr T kLargestExponent = sizeof(T) == 4 ? T(30) : T(300);  // of LARGEST_EXPONENT in staircase.py

template <typename T>
class Adjoint {
 public:
  Adjoint(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena, int64_t factor_count)
      : h(problem, job, team, arena, /*keep_tiles=*/true), bin(h, arena), p(problem), count(factor_count) {
    for (T** side : {&u, &log_a, &row_sums, &read}) *side = arena.take<T>(h.rows + 1);
    for (T** side : {&v, &log_b, &col_sums, &from_grad}) *side = arena.take<T>(h.cols + 1);
    grad = arena.take<T>(h.rows * h.value_width);
    value_panels = arena.take<T>(h.cols * p.value_features);
    field_rows = arena.take<T>(h.rows * count);
    field_panels = arena.take<T>(h.cols * count);
    accumulators = arena.take<T>(h.part_columns());
    wide = std::max(h.width, h.value_width);
    wide_accumulators = arena.take<T>(h.part_columns() * wide);
    gathered = arena.take<T>(h.cols * wide);
    cotangents = arena.take<T>(team.threads * h.largest_tile);
    copies = arena.take<T>(team.threads * h.largest_tile);
    lines = arena.take<T>(team.threads * 64 * wide);
    mask_columns = arena.take<T>(h.part_columns());
    factors.resize(static_cast<size_t>(count));
    for (auto& f : factors) {
      for (T** side : {&f.row, &f.x, &f.row_exp}) *side = arena.take<T>(h.rows + 1);
      for (T** side : {&f.col, &f.y, &f.col_exp}) *side = arena.take<T>(h.cols + 1);
    }
  }

  // Reads everything; P's row sums of P*D are <dO, O>, without a pass.
  void start(const BackwardGiven<T>& given, const BackwardResult<T>& result, int64_t last) {
    out = &result;
    h.pack();
    bin.pack();
    load(given.row_potentials, last, p.length, job().row0, h.n, h.rows, p.log_row_mass, p.log_row_capacity, log_a, u);
    load(given.col_potentials, last, p.size, job().col0, h.m, h.cols, p.log_col_mass, p.log_col_capacity, log_b, v);
    bin.plan(u, v);
    // V, packed where dV will be gathered, only to be transposed
    h.pack_side(p.value, h.key_head, job().col0, h.m, h.cols, p.value_features, h.value_width, T(1), gathered,
                value_panels);
    read_cotangents(given);
  }

  // u or v number k, -inf on dead lines and on padding; or (dead 0) as it was stored.
  void load(const T* potentials, int64_t k, int64_t length, int64_t first, int64_t active, int64_t padded,
            const T* log_mass, const T* capacity, T* log_to, T* to) const {
    const int64_t heads = p.num * p.heads;
    const T* from = potentials + (k * heads + h.head_index()) * (length + p.bins);
    for (int64_t i = 0; i <= padded; ++i) {
      T mass = i < active ? log_mass[h.head_index() * length + first + i] : -kInf<T>;
      if (i == padded && bin.present()) mass = capacity[h.head_index() * p.bins + job().bin];
      log_to[i] = mass;
      to[i] = mass == -kInf<T> ? -kInf<T> : from[i == padded ? length + job().bin : first + i];
    }
  }

  // The first visit: P is made and kept, dV gathered; then col_sums, P's column sums of P*D. `also` runs on every tile.
  template <typename Also>
  void value_visit(const Also& also) {
    const int64_t width = h.value_width;
    std::fill(wide_accumulators, wide_accumulators + h.part_columns() * width, T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      T* tile = h.own_tile(b, slot);
      h.scores(b, tile);
      h.exponentiate(b, tile, u, v);
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
    for (int64_t i = 0; i < h.n; ++i) col_sums[h.cols] += bin.to[i] * read[i];
  }

  // The last visit, given the field: dQ, dK, dmask, and the dustbin's scores; `also` runs on every tile first.
  template <typename Also>
  void score_visit(bool scaled, const Also& also) {
    pack_field(scaled);
    const int64_t width = h.width, inner = p.value_features;
    constexpr int64_t W = kWidth<T>;
    std::fill(wide_accumulators, wide_accumulators + h.part_columns() * width, T(0));
    std::fill(mask_columns, mask_columns + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      T* tile = h.plan(b, slot, u, v);
      also(b, tile, part, slot);
      T* d = cotangents + slot * h.largest_tile;
      matmul(d, b.stride, grad + b.row * h.value_width, h.value_width, 1, value_panels + b.col * inner, inner * W, W,
             b.rows, b.cols, inner, false);
      if (p.dropout) drop_out(h, b, d, d);
      if (scaled)  // the field is of low rank: -X Y^T
        matmul(d, b.stride, field_rows + b.row * count, count, 1, field_panels + b.col * count, count * W, W, b.rows,
               b.cols, count, true);
      for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; j += W)
          (Vec<T>::loadu(d + i * b.stride + j) * Vec<T>::loadu(tile + i * b.stride + j)).store(d + i * b.stride + j);
      if (!scaled) subtract_factors(b, d, slot);
      T* to = wide_accumulators + (h.parts[part].offset + b.col - h.parts[part].col) * width;
      const int64_t real = std::min(b.rows, h.n - b.row);
      if (out->key)
        matmul(to, width, d, 1, b.stride, h.query + b.row * width, W, width, b.cols, width, real, true);
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
    if (out->mask && out->mask_row == 0) add_mask_columns();
    if (bin.present()) dustbin_scores();
  }

  // out [cols + 1] = F^T x and r = F y for one factor each, by one visit: for every row r = (F_r y)_i, then
  // x_i = map(i, r), then out += F_c^T x. Null factors mean the plan itself; a null y or out skips that half.
  template <typename Map>
  void pass(const Factor<T>* row_factor, const T* y, const Factor<T>* col_factor, T* result, bool scaled, const Map& map) {
    if (result) std::fill(accumulators, accumulators + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& b, int64_t part, int64_t slot) {
      tile_pass(b, scaled ? h.plan(b, slot, u, v) : nullptr, part, slot, row_factor, y, col_factor, result, scaled, map);
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
      row_column_pass<true, false>(b, own, y + b.col, columns, [&](int64_t i, T sum) { return images[i - b.row] = map(i, sum); });
    } else {
      for (int64_t i = 0; i < b.rows; ++i) images[i] = map(b.row + i, T(0));
    }
    if (!result) return;
    factor_tile(b, own, *col_factor);
    row_column_pass<false, true>(b, own, y, columns, [&](int64_t i, T) { return images[i - b.row]; });
  }

  const Job& job() const { return h.job; }

  Head<T> h;
  Dustbin<T> bin;
  const Problem<T>& p;
  const int64_t count;                // factors
  T *u, *log_a, *row_sums, *read;     // [rows + 1]; read: cotangent of the mass sent to the dustbin
  T *v, *log_b, *col_sums, *from_grad;  // [cols + 1]; from_grad: cotangent of the mass received from it
  std::vector<Factor<T>> factors;
  T* accumulators;
  const BackwardResult<T>* out = nullptr;

 private:
  void read_cotangents(const BackwardGiven<T>& given) {
    const int64_t at = h.head_index(), width = h.value_width, features = p.value_features;
    const T *to = given.grad_to_bin ? given.grad_to_bin + at * p.length + job().row0 : nullptr,
            *from = given.grad_from_bin ? given.grad_from_bin + at * p.size + job().col0 : nullptr,
            *stored = p.dustbin_value ? p.dustbin_value + at * features : nullptr;
    h.pack_side(given.grad_output, job().head, job().row0, h.n, h.rows, features, width, T(1), grad);
    for (int64_t i = 0; i <= h.rows; ++i) row_sums[i] = read[i] = 0;
    for (int64_t j = 0; j <= h.cols; ++j) from_grad[j] = from && j < h.m && v[j] > -kInf<T> ? from[j] : T(0);
    h.each_range(h.n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* line = grad + i * width;
        if (log_a[i] == -kInf<T>) {
          std::fill(line, line + width, T(0));
          continue;
        }
        const T* output = given.output + (at * p.length + job().row0 + i) * features;
        const T share = std::exp(-log_a[i]);
        for (int64_t k = 0; k < features; ++k) row_sums[i] += line[k] * output[k];
        for (int64_t k = 0; k < features; ++k) line[k] *= share;
        if (!bin.present()) continue;
        const T direct = to ? to[i] : T(0);
        row_sums[i] += bin.to[i] * direct;
        read[i] = direct;
        if (stored)
          for (int64_t k = 0; k < features; ++k) read[i] += line[k] * stored[k];
      }
    });
    if (!bin.present()) return;
    for (int64_t j = 0; j < h.m; ++j) row_sums[h.rows] += bin.from[j] * from_grad[j];
    if (!out->dustbin_value) return;
    T* bin_value = out->dustbin_value + (at * p.bins + job().bin) * features;
    for (int64_t i = 0; i < h.n; ++i)
      for (int64_t k = 0; k < features; ++k) bin_value[k] += bin.to[i] * grad[i * width + k];
  }

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
      for (int64_t j = 0; j < h.cols; ++j)
        field_panels[(j / W * count + k) * W + j % W] = f.y[j] * f.col_exp[j];
    }
  }

  // d -= sum_k X_k Y_k^T * factor k, formed entry by entry: beside large dual differences P would underflow.
  void subtract_factors(const Block<T>& b, T* d, int64_t slot) const {
    T* own = copies + slot * h.largest_tile;
    for (const auto& f : factors) {
      factor_tile(b, own, f);
      for (int64_t i = 0; i < b.rows; ++i) {
        const T weight = f.x[b.row + i];
        for (int64_t j = 0; j < b.cols; ++j)
          d[i * b.stride + j] -= own[i * b.stride + j] * weight * f.y[b.col + j];
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
      T* columns = mask_columns + h.parts[part].offset + b.col - h.parts[part].col;
      for (int64_t i = 0; i < real; ++i)
        for (int64_t j = 0; j < reached; ++j) columns[j] += d[i * b.stride + j];
      return;
    }
    for (int64_t i = 0; i < real; ++i) {
      T* line = mask_line(b.row + i) + (job().col0 + b.col) * out->mask_col;
      if (out->mask_col)
        for (int64_t j = 0; j < reached; ++j) line[j] += d[i * b.stride + j];
      else
        for (int64_t j = 0; j < reached; ++j) line[0] += d[i * b.stride + j];
    }
  }

  void add_mask_columns() {
    h.reduce(mask_columns, 1, gathered);
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
    T corner = 0;
    for (int64_t i = 0; i < h.n; ++i) to[i] = bin.to[i] * read[i];
    for (int64_t j = 0; j < h.m; ++j) from[j] = bin.from[j] * from_grad[j];
    for (const auto& f : factors) {
      for (int64_t i = 0; i < h.n; ++i)
        to[i] -= f.at(bin.to_score[i], i, h.cols) * f.x[i] * f.y[h.cols];
      for (int64_t j = 0; j < h.m; ++j)
        from[j] -= f.at(bin.from_score[j], h.rows, j) * f.x[h.rows] * f.y[j];
      corner -= f.at(bin.corner_score, h.rows, h.cols) * f.x[h.rows] * f.y[h.cols];
    }
    for (int64_t i = 0; i < h.n; ++i) to[i] *= share;
    for (int64_t j = 0; j < h.m; ++j) from[j] *= share;
    out->corner_score[at * p.bins + job().bin] = corner * share;
  }

  int64_t wide;                       // of a line of queries or values
  T *grad;                            // dO / a [rows, value_width]
  T *value_panels;                    // V^T in panels
  T *field_rows, *field_panels;       // -X [rows, count], Y^T in panels
  T *wide_accumulators, *gathered;    // of the parts, and their sum [cols, wide]
  T *cotangents, *copies, *lines;     // of each thread
  T *mask_columns;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
