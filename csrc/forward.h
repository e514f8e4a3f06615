// The solve in stabilised scaling form (B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized
// transport problems", SIAM J. Sci. Comput. 41(3), 2019) and the output.
//
// Potentials are kept as u = alpha + log x, v = beta + log y with K = exp(S + alpha + beta) in the tiles, so that a
// half-step is a matrix-vector product with K, and a row half-step and the column sums of the next iteration take one
// reading of it. When a scaling leaves the safe range the half-step is done again in the log domain and its potential
// absorbed into K.
#pragma once

#include "components.h"
#include "dropout.h"
#include "dustbin.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// Scalings stay within e^-kSafe .. e^kSafe: K's entries below the smallest normal number then add nothing to a sum.
template <typename T>
inline constexpr T kSafe = sizeof(T) == 4 ? T(20) : T(200);

template <typename T>
class Solver {
 public:
  Solver(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena)
      : h(problem, job, team, arena, /*keep_tiles=*/problem.stopped + problem.kept > 0), bin(h, arena), parts(h, arena), p(problem) {
    for (T** side : {&alpha, &x, &x_new, &log_a, &a, &sums}) *side = arena.take<T>(h.rows + 1);
    for (T** side : {&beta, &y, &y_new, &log_b, &b, &c}) *side = arena.take<T>(h.cols + 1);
    accumulators = arena.take<T>(2 * h.part_columns());
    failed = arena.take<uint8_t>(kMaxParts);
    if (!wants_output()) return;
    value = arena.take<T>(h.cols * h.value_width);
    scaled_value = arena.take<T>(h.cols * h.value_width);
    lines = arena.take<T>(team.threads * 64 * h.value_width);
    if (p.dropout) dropped = arena.take<T>(team.threads * h.largest_tile);
  }

  void run(int64_t index, const ForwardResult<T>& result) {
    out = &result;
    h.pack();
    bin.pack();
    start();
    if (wants_output() && result.output)
      h.pack_side(p.value, h.key_head, job().col0, h.m, h.cols, p.value_features, h.value_width, T(1), value);
    iterate();
    if (result.row_residual) residuals(result.row_residual[index], result.col_residual[index]);
    if (bin.present() && result.to_bin) {
      T *to = result.to_bin + h.head_index() * p.length + job().row0,
        *from = result.from_bin + h.head_index() * p.size + job().col0;
      for (int64_t i = 0; i < h.n; ++i) to[i] = bin.to[i] * x[i] * y[h.cols];
      for (int64_t j = 0; j < h.m; ++j) from[j] = bin.from[j] * x[h.rows] * y[j];
    }
  }

 private:
  // What a visit does beside multiplying: K is built; rows take their half-step from K, or in the log domain, which
  // absorbs their potential into K; or only the column sums are taken.
  enum class Pass { build, sweep, absorb, columns };

  const Job& job() const { return h.job; }
  bool wants_output() const { return static_cast<bool>(p.value); }

  // Masses, and the initial potentials as alpha and beta.
  void start() {
    load(p.log_row_mass + h.head_index() * p.length + job().row0, h.n, h.rows, p.log_row_capacity,
         p.initial_row ? p.initial_row + h.head_index() * (p.length + p.bins) : nullptr, job().row0, p.length, log_a, a,
         alpha, x);
    load(p.log_col_mass + h.head_index() * p.size + job().col0, h.m, h.cols, p.log_col_capacity,
         p.initial_col ? p.initial_col + h.head_index() * (p.size + p.bins) : nullptr, job().col0, p.size, log_b, b,
         beta, y);
  }

  void load(const T* log_mass, int64_t count, int64_t padded, const T* capacity, const T* initial, int64_t first,
            int64_t length, T* log_to, T* mass, T* potential, T* scaling) {
    for (int64_t i = 0; i <= padded; ++i) {
      T given = i < count ? log_mass[i] : -kInf<T>, begin = 0;
      if (i == padded && bin.present()) given = capacity[h.head_index() * p.bins + job().bin];
      if (initial && (i < count || (i == padded && bin.present())))
        begin = initial[i == padded ? length + job().bin : first + i];
      log_to[i] = given;
      mass[i] = std::exp(given);
      potential[i] = given > -kInf<T> ? begin : -kInf<T>;
      scaling[i] = given > -kInf<T> ? T(1) : T(0);
    }
  }

  void iterate() {
    const bool row_only = p.stopped == 0 && p.kept == 0;
    if (!row_only) visit(Pass::build, false, true);
    for (int64_t t = 0; t < p.stopped; ++t) {
      const bool safe = column_half_step(p.over_relaxation);
      if (t > 0 && p.tolerance > 0 && safe && largest_change <= p.tolerance) break;
      row_half_step(safe, p.over_relaxation, false, true);
    }
    settled = 0;
    if (p.balanced && p.stopped > 0) find_gauge();
    settle_columns();
    if (p.kept == 0) return row_half_step(!row_only, 1, true, wants_residuals(), /*column_first=*/false);
    for (int64_t i = 0; i <= h.rows; ++i) x[i] = settle_row(i, x[i]);
    if (p.stopped > 0 && sizeof(T) == 4 && largest_settled > kCoarse) visit(Pass::columns, false, true);
    for (int64_t r = 1; r <= p.kept; ++r) {
      const bool last = r == p.kept, safe = column_half_step(1);
      settled = r;
      row_half_step(safe, 1, last, !last || wants_residuals());
    }
  }

  bool wants_residuals() const { return out->row_residual != nullptr; }

  // y_new = the next column scaling, from the column sums of K x; false where it leaves the safe range.
  bool column_half_step(double omega) {
    const T rho = static_cast<T>(p.rho_col), low = std::exp(-kSafe<T>), high = std::exp(kSafe<T>);
    bool safe = true;
    T least = 1, most = 1;  // of y_new / y before over-relaxation
    for (int64_t j = 0; j <= h.cols; ++j) {
      T next = b[j] / c[j];
      if (b[j] == 0) next = 0;
      if (rho != 1 && b[j] > 0) next = std::exp(rho * (log_b[j] - std::log(c[j])) + (rho - 1) * beta[j]);
      safe &= (next > low && next < high) || b[j] == 0;
      if (p.tolerance > 0 && b[j] > 0) {
        least = std::min(least, next / y[j]);
        most = std::max(most, next / y[j]);
      }
      y_new[j] = next;
    }
    largest_change = std::max(std::log(most), -std::log(least));
    if (omega != 1)
      for (int64_t j = 0; j <= h.cols; ++j)
        if (b[j] > 0) {
          y_new[j] = relaxed(y[j], y_new[j], omega);
          safe &= y_new[j] > low && y_new[j] < high;
        }
    return safe;
  }

  static T relaxed(T before, T plain, double omega) {
    return std::exp(static_cast<T>(1 - omega) * std::log(before) + static_cast<T>(omega) * std::log(plain));
  }

  // Takes over the column half-step (in the log domain unless `safe`) and does the row half-step.
  void row_half_step(bool safe, double omega, bool last, bool want_columns, bool column_first = true) {
    row_omega = omega;
    if (column_first) {
      if (safe)
        std::swap(y, y_new);
      else
        column_half_step_in_log_domain(omega);
      if (settled >= 0) settle_columns();
    }
    if (safe && visit(Pass::sweep, last, want_columns)) return;
    for (int64_t j = 0; j <= h.cols; ++j) {  // v = beta + log y, absorbed
      if (b[j] > 0) beta[j] += std::log(y[j]);
      y[j] = b[j] > 0 ? T(1) : T(0);
    }
    if (settled >= 0) settle_columns();
    visit(Pass::absorb, last, want_columns);
  }

  // One reading of the support: K is built or read, rows are finished and their part of the next column sums gathered.
  // False, without effect, if a row scaling leaves the safe range.
  bool visit(Pass pass, bool last, bool want_columns) {
    const bool emits = last && out->output;
    if (emits) scale_value();
    if (pass == Pass::build) bin.plan(alpha, beta);
    if (pass == Pass::absorb && bin.present()) {
      alpha[h.rows] = next_potential(bin.row_lse(beta), h.rows);
      bin.plan_row(alpha[h.rows], beta);
    }
    std::fill(accumulators, accumulators + h.part_columns(), T(0));
    std::fill(failed, failed + kMaxParts, uint8_t(0));
    h.each_block([&](const Block<T>& block, int64_t part, int64_t slot) {
      T* tile;
      if (pass == Pass::sweep || pass == Pass::columns) {
        tile = h.plan(block, slot, alpha, beta);
      } else {
        tile = h.own_tile(block, slot);
        h.scores(block, tile);
        if (pass == Pass::absorb) absorb_rows(block, tile);
        h.exponentiate(block, tile, alpha, beta);
      }
      T* columns = accumulators + h.parts[part].offset + block.col - h.parts[part].col;
      bool bad = false;
      const auto next = [&](int64_t i, T sum) {
        if (a[i] == 0) return x_new[i] = settled >= 0 ? settle_row(i, T(0)) : T(0);
        if (bin.present()) sum += bin.to[i] * y[h.cols];
        sums[i] = sum;
        const T scaling = pass == Pass::absorb && row_omega != 1 ? T(1) : row_scaling(i, sum);
        bad |= !(scaling > std::exp(-kSafe<T>) && scaling < std::exp(kSafe<T>));
        return x_new[i] = settled >= 0 ? settle_row(i, scaling) : scaling;
      };
      if (pass == Pass::build || pass == Pass::columns)
        row_column_pass<false, true>(block, tile, y + block.col, columns, [&](int64_t i, T) { return x_new[i] = x[i]; });
      else if (want_columns)
        row_column_pass<true, true>(block, tile, y + block.col, columns, next);
      else
        row_column_pass<true, false>(block, tile, y + block.col, columns, next);
      if (pass == Pass::sweep) failed[part] |= bad;
      if (emits && !failed[part]) emit(block, tile, slot);
    });
    if (bin.present() && pass != Pass::build && pass != Pass::columns) {
      sums[h.rows] = bin.row_sum(y);
      x_new[h.rows] = a[h.rows] == 0                            ? T(0)
                      : pass == Pass::absorb && row_omega != 1 ? T(1)
                                                               : row_scaling(h.rows, sums[h.rows]);
      const T made = x_new[h.rows];
      failed[0] |= pass == Pass::sweep && a[h.rows] > 0 && !(made > std::exp(-kSafe<T>) && made < std::exp(kSafe<T>));
      if (settled >= 0) x_new[h.rows] = settle_row(h.rows, made);
    } else {
      x_new[h.rows] = x[h.rows];
    }
    for (int64_t part = 0; part < kMaxParts; ++part)
      if (failed[part]) return false;
    std::swap(x, x_new);
    if (want_columns) {
      h.reduce(accumulators, 1, c);
      c[h.cols] = 0;
      if (bin.present()) {
        for (int64_t j = 0; j < h.m; ++j) c[j] += bin.from[j] * x[h.rows];
        c[h.cols] = bin.column_sum(x);
      }
    }
    return true;
  }

  // u = rho (log a - LSE), over-relaxed; x is that of the last row half-step.
  T next_potential(T lse, int64_t i) const {
    if (lse == -kInf<T>) return lse;
    const T plain = static_cast<T>(p.rho_row) * (log_a[i] - lse);
    if (row_omega == 1) return plain;
    return static_cast<T>(1 - row_omega) * (alpha[i] + std::log(x[i])) + static_cast<T>(row_omega) * plain;
  }

  T row_scaling(int64_t i, T sum) const {
    const T rho = static_cast<T>(p.rho_row);
    const T plain = rho == 1 ? a[i] / sum : std::exp(rho * (log_a[i] - std::log(sum)) + (rho - 1) * alpha[i]);
    return row_omega == 1 ? plain : relaxed(x[i], plain, row_omega);
  }

  // alpha = the row half-step in the log domain, from the scores of a tile and v = beta.
  void absorb_rows(const Block<T>& block, const T* tile) {
    constexpr int64_t W = kWidth<T>;
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.row + i;
      if (a[row] == 0) continue;
      const T *line = tile + i * block.stride, *v = beta + block.col;
      const T to_bin = bin.present() ? bin.to_score[row] + beta[h.cols] : -kInf<T>;
      Vec<T> tops(-kInf<T>);
      for (int64_t j = 0; j < block.cols; j += W)
        tops = at::vec::maximum(tops, Vec<T>::loadu(line + j) + Vec<T>::loadu(v + j));
      const T top = std::max(max_of(tops), to_bin);
      if (top == -kInf<T>) {  // no support: its plan is 0 whatever its potential
        a[row] = 0;
        alpha[row] = -kInf<T>;
        continue;
      }
      Vec<T> total(T(0));
      for (int64_t j = 0; j < block.cols; j += W)
        total = total + exp_of(Vec<T>::loadu(line + j) + Vec<T>::loadu(v + j) - Vec<T>(top));
      alpha[row] = next_potential(top + std::log(sum_of(total) + std::exp(to_bin - top)), row);
      if (bin.present()) bin.to[row] = std::exp(to_bin + alpha[row]);
    }
  }

  // y = 1 and beta = the column half-step in the log domain, from u = alpha + log x.
  void column_half_step_in_log_domain(double omega) {
    constexpr int64_t W = kWidth<T>;
    for (int64_t i = 0; i <= h.rows; ++i) x_new[i] = a[i] > 0 ? alpha[i] + std::log(x[i]) : -kInf<T>;  // u
    T *tops = accumulators, *totals = accumulators + h.part_columns();
    std::fill(tops, totals, -kInf<T>);
    std::fill(totals, totals + h.part_columns(), T(0));
    h.each_block([&](const Block<T>& block, int64_t part, int64_t slot) {
      T* tile = h.own_tile(block, slot);  // K is built anew by the row half-step
      h.scores(block, tile);
      const int64_t at = h.parts[part].offset + block.col - h.parts[part].col;
      for (int64_t j = 0; j < block.cols; j += W) {
        const Vec<T> before = Vec<T>::loadu(tops + at + j);
        Vec<T> top = before;
        for (int64_t i = 0; i < block.rows; ++i)
          top = at::vec::maximum(top, Vec<T>::loadu(tile + i * block.stride + j) + Vec<T>(x_new[block.row + i]));
        top.store(tops + at + j);
        const Vec<T> shift = Vec<T>::blendv(top, Vec<T>(T(0)), top == Vec<T>(-kInf<T>));
        Vec<T> total = Vec<T>::loadu(totals + at + j) * exp_of(before - shift);
        for (int64_t i = 0; i < block.rows; ++i)
          total = total + exp_of(Vec<T>::loadu(tile + i * block.stride + j) + Vec<T>(x_new[block.row + i]) - shift);
        total.store(totals + at + j);
      }
    });
    for (int64_t j = 0; j <= h.cols; ++j) y_new[j] = -kInf<T>;
    for (const auto& part : h.parts)  // log-sum-exp of the parts, in order
      for (int64_t j = 0; j < part.cols; ++j) {
        LogSumExp<T> lse;
        lse.add(y_new[part.col + j]);
        if (totals[part.offset + j] > 0) lse.add(tops[part.offset + j] + std::log(totals[part.offset + j]));
        y_new[part.col + j] = lse.value();
      }
    if (bin.present()) {
      for (int64_t j = 0; j < h.m; ++j) {
        LogSumExp<T> lse;
        lse.add(y_new[j]);
        lse.add(bin.from_score[j] + x_new[h.rows]);
        y_new[j] = lse.value();
      }
      y_new[h.cols] = bin.column_lse(x_new);
    }
    for (int64_t j = 0; j <= h.cols; ++j) {
      if (b[j] == 0) continue;
      if (y_new[j] == -kInf<T>) {  // no support
        b[j] = y[j] = 0;
        beta[j] = -kInf<T>;
        continue;
      }
      const T plain = static_cast<T>(p.rho_col) * (log_b[j] - y_new[j]);
      const T before = beta[j] + std::log(y[j]);
      beta[j] = omega == 1 ? plain : static_cast<T>(1 - omega) * before + static_cast<T>(omega) * plain;
      y[j] = 1;
    }
  }

  // Potentials that are kept are rounded, so the scalings go on from the rounded ones: otherwise the duals of the tail
  // would each carry an error of their own, and their differences, which the backward is made of, with them.
  T settle(T mass, T potential, T scaling, double gauge, T* kept) {
    *kept = 0;
    if (mass == 0) return 0;
    const double exact = static_cast<double>(potential) + std::log(scaling) - gauge;
    *kept = static_cast<T>(exact);
    return std::exp(static_cast<T>(static_cast<double>(*kept) + gauge - potential));
  }

  T settle_row(int64_t i, T scaling) {
    if (i == h.rows ? !bin.present() : i >= h.n) return 0;
    T* kept = out->row_potentials + (settled * p.num * p.heads + h.head_index()) * (p.length + p.bins) + row_place(i);
    const T found = settle(a[i], alpha[i], scaling, centred ? parts.total[parts.row[i]] : 0, kept);
    if (settled == 0) largest_settled = std::max(largest_settled, std::abs(*kept));
    return found;
  }

  void settle_columns() {
    T* kept = out->col_potentials + (settled * p.num * p.heads + h.head_index()) * (p.size + p.bins);
    for (int64_t j = 0; j <= h.cols; ++j) {
      if (j == h.cols ? !bin.present() : j >= h.m) continue;
      y[j] = settle(b[j], beta[j], y[j], centred ? -parts.total[parts.col[j]] : 0, kept + col_place(j));
      if (settled == 0) largest_settled = std::max(largest_settled, std::abs(kept[col_place(j)]));
    }
  }

  int64_t row_place(int64_t i) const { return i == h.rows ? p.length + job().bin : job().row0 + i; }
  int64_t col_place(int64_t j) const { return j == h.cols ? p.size + job().bin : job().col0 + j; }

  // The gauge: the mean of u^0 over the rows of each component, subtracted from every kept u and added to every v.
  void find_gauge() {
    centred = true;
    parts.find();
    std::fill(parts.total, parts.total + parts.count, 0.0);
    std::fill(parts.size, parts.size + parts.count, 0.0);
    for (int64_t i = 0; i <= h.rows; ++i)
      if (log_a[i] > -kInf<T>) {
        if (a[i] > 0) parts.total[parts.row[i]] += static_cast<double>(alpha[i]) + std::log(x[i]);
        parts.size[parts.row[i]] += 1;
      }
    for (int32_t k = 0; k < parts.count; ++k) parts.total[k] /= std::max(parts.size[k], 1.0);
  }

  void scale_value() {
    h.each_range(h.cols, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < h.value_width; ++k)
          scaled_value[j * h.value_width + k] = y[j] * value[j * h.value_width + k];
    });
  }

  // O_i = x_i (K y V)_i / a_i. Balanced rows of the plan sum to a_i exactly, so those are divided by their own sum: that
  // cancels the rounding of scores that are large.
  void emit(const Block<T>& block, const T* tile, int64_t slot) {
    if (p.dropout) {
      T* copy = dropped + slot * h.largest_tile;
      drop_out(h, block, tile, copy);
      tile = copy;
    }
    const int64_t width = h.value_width;
    T* line = lines + slot * 64 * width;
    matmul(line, width, tile, block.stride, 1, scaled_value + block.col * width, kWidth<T>, width, block.rows, width,
           block.cols, false);
    const T* read = p.dustbin_value ? p.dustbin_value + h.head_index() * p.value_features : nullptr;
    for (int64_t i = 0; i < std::min(block.rows, h.n - block.row); ++i, line += width) {
      const int64_t row = block.row + i;
      if (a[row] == 0) continue;
      const T factor = p.rho_row == 1 ? 1 / sums[row] : x_new[row] / a[row];
      T* to = out->output + (h.head_index() * p.length + job().row0 + row) * p.value_features;
      for (int64_t k = 0; k < p.value_features; ++k) to[k] = line[k] * factor;
      if (read)
        for (int64_t k = 0; k < p.value_features; ++k) to[k] += bin.to[row] * y[h.cols] * read[k] * factor;
    }
  }

  // Largest |P 1 - a| and |P^T 1 - b| at the last duals.
  void residuals(T& row, T& col) const {
    row = col = 0;
    for (int64_t i = 0; i <= h.rows; ++i)
      if (log_a[i] > -kInf<T>)
        row = std::max(row, std::abs((a[i] > 0 ? x[i] * sums[i] : T(0)) - std::exp(log_a[i])));
    for (int64_t j = 0; j <= h.cols; ++j)
      if (log_b[j] > -kInf<T>)
        col = std::max(col, std::abs((b[j] > 0 ? y[j] * c[j] : T(0)) - std::exp(log_b[j])));
  }

  Head<T> h;
  Dustbin<T> bin;
  Components<T> parts;
  const Problem<T>& p;
  const ForwardResult<T>* out = nullptr;
  T *alpha, *x, *x_new, *log_a, *a, *sums;  // [rows + 1], the dustbin last; a is 0 on dead lines
  T *beta, *y, *y_new, *log_b, *b, *c;      // [cols + 1]; c = K^T x
  T* accumulators;                          // column sums of the parts; twice, for the log domain
  uint8_t* failed;                          // [parts]
  T *value, *scaled_value;                  // V and y V, [cols, value_width]
  T *lines, *dropped = nullptr;             // of each thread
  double row_omega = 1, largest_change = 0;
  int64_t settled = -1;  // number of the potentials that are being kept, once they are
  T largest_settled = 0;
  bool centred = false;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
