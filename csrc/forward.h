// The solve and the output. With K = exp(S + alpha + beta) in the tiles a half-step is a matrix-vector product, and a
// row half-step and the column sums of the next iteration take one reading of it. When a scaling leaves the safe range
// the half-step is done again in the log domain and its potential absorbed into K.
#pragma once

#include "dropout.h"
#include "lse.h"
#include "partners.h"
#include "scaling.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

template <typename T>
class Solver : Scalings<T> {
 public:
  Solver(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena)
      : Scalings<T>(problem, job, team, arena, /*keep_tiles=*/problem.stopped + problem.kept > 0), partners(h, arena) {
    accumulators = arena.take<T>(2 * h.part_columns());
    if (p.accelerated) v_before = arena.take<T>(h.cols + 1), v_now = arena.take<T>(h.cols + 1);
    failed = arena.take<uint8_t>(kMaxParts);
    if (!wants_output()) return;
    value = arena.take<T>(h.cols * h.value_width);
    scaled_value = arena.take<T>(h.cols * h.value_width);
    lines = arena.take<T>(team.threads * 64 * h.value_width);
    if (p.dropout) dropped = arena.take<T>(team.threads * h.largest_tile);
  }

  void run(int64_t index, const ForwardResult<T>& result) {
    this->start(result);
    if (wants_output() && result.output)
      h.pack_side(p.value, h.key_head, job().col0, h.m, h.cols, p.value_features, h.value_width, T(1), value);
    iterate();
    if (result.row_index) partners.finish(result);
    if (result.row_residual) this->residuals(result.row_residual[index], result.col_residual[index]);
    if (bin.present() && result.plan) emit_dustbin();
    if (bin.present() && result.to_bin) {
      T *to = result.to_bin + h.head_index() * p.length + job().row0,
        *from = result.from_bin + h.head_index() * p.size + job().col0;
      for (int64_t i = 0; i < h.n; ++i) to[i] = bin.to[i] * x[i] * y[h.cols];
      for (int64_t j = 0; j < h.m; ++j) from[j] = bin.from[j] * x[h.rows] * y[j];
    }
  }

 private:
  using Base = Scalings<T>;
  using Base::alpha, Base::x, Base::x_new, Base::log_a, Base::a, Base::sums;
  using Base::beta, Base::y, Base::y_new, Base::log_b, Base::b, Base::c;
  using Base::h, Base::bin, Base::p, Base::out, Base::job;
  using Base::next_potential, Base::row_scaling, Base::momentum, Base::v_before, Base::v_now;
  using Base::row_omega, Base::settled, Base::settle_row, Base::settle_columns, Base::column_half_step;

  // What a visit does beside multiplying: K is built; rows take their half-step from K, or in the log domain, which
  // absorbs their potential into K; or only the column sums are taken.
  enum class Pass { build, sweep, absorb, columns };

  bool wants_output() const { return static_cast<bool>(p.value); }

  void iterate() {
    const bool row_only = p.stopped == 0 && p.kept == 0;
    if (!row_only) visit(Pass::build, false, true);
    momentum.start(p);
    if (p.accelerated) std::fill(v_before, v_before + h.cols + 1, T(0));
    for (int64_t t = 0; t < p.stopped; ++t) {
      momentum.begin(t);
      const bool safe = column_half_step(p.over_relaxation);
      if (!safe) column_lse_in_log_domain();
      if (t > 0 && p.tolerance > 0 && (safe ? this->largest_change : change_in_log_domain()) <= p.tolerance) break;
      if (momentum.looks(t)) momentum.look(t, norm_of_change(safe));
      row_half_step(safe, p.over_relaxation, false, true);
    }
    momentum.end();
    if (overwritten) visit(Pass::build, false, true);
    settled = 0;
    if (p.balanced && p.stopped > 0) this->find_gauge();
    settle_columns();
    if (p.kept == 0) {
      const bool far = this->far_from_centre();
      if (far) {
        for (int64_t i = 0; i <= h.rows; ++i) settle_row(i, x[i]);
        this->absorb_settled();
      }
      return row_half_step(!row_only && !far, 1, true, wants_residuals(), /*column_first=*/false);
    }
    for (int64_t i = 0; i <= h.rows; ++i) x[i] = settle_row(i, x[i]);
    if (this->far_from_centre()) {
      this->absorb_settled();
      visit(Pass::build, false, true);
    } else if (p.stopped > 0 && this->coarse()) {
      visit(Pass::columns, false, true);
    }
    for (int64_t r = 1; r <= p.kept; ++r) {
      const bool last = r == p.kept, safe = column_half_step(1);
      if (!safe) column_lse_in_log_domain();
      settled = r;
      row_half_step(safe, 1, last, !last || wants_residuals());
    }
  }

  bool wants_residuals() const { return out->row_residual != nullptr; }

  // Takes over the column half-step (in the log domain unless `safe`) and does the row half-step.
  void row_half_step(bool safe, double omega, bool last, bool want_columns, bool column_first = true) {
    row_omega = omega;
    if (column_first) {
      if (safe)
        std::swap(y, y_new);
      else
        take_columns_in_log_domain(omega);
      if (momentum.on) std::swap(v_before, v_now);
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
    const bool emits = last && (out->output || out->plan || out->row_index);
    if (last && out->row_index) partners.start();
    if (last && out->output) scale_value();
    if (pass == Pass::build) bin.plan(alpha, beta);
    if (pass == Pass::absorb && bin.present()) {
      alpha[h.rows] = next_potential(bin.row_lse(beta), h.rows);
      bin.plan_row(alpha[h.rows], beta);
    }
    if (pass == Pass::build || pass == Pass::absorb) overwritten = false;
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
        const T scaling = pass == Pass::absorb ? absorbed_scaling(i, sum) : row_scaling(i, sum);
        bad |= !in_range(scaling);
        return x_new[i] = settled >= 0 ? settle_row(i, scaling) : scaling;
      };
      if (pass == Pass::build || pass == Pass::columns)
        row_column_pass<false, true>(block, tile, y + block.col, columns,
                                     [&](int64_t i, T) { return x_new[i] = x[i]; });
      else if (want_columns)
        row_column_pass<true, true>(block, tile, y + block.col, columns, next);
      else
        row_column_pass<true, false>(block, tile, y + block.col, columns, next);
      if (pass == Pass::sweep) failed[part] |= bad;
      if (!emits || failed[part]) return;
      if (out->row_index)
        partners.take(block, part, slot, tile, x_new, y, a, b, *out);
      else
        out->plan ? emit_plan(block, tile) : emit(block, tile, slot);
    });
    if (bin.present() && pass != Pass::build && pass != Pass::columns) {
      sums[h.rows] = bin.row_sum(y);
      const T sum = sums[h.rows];
      T made = 0;
      if (a[h.rows] > 0) made = pass == Pass::absorb ? absorbed_scaling(h.rows, sum) : row_scaling(h.rows, sum);
      failed[0] |= pass == Pass::sweep && a[h.rows] > 0 && !in_range(made);
      x_new[h.rows] = settled >= 0 ? settle_row(h.rows, made) : made;
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

  // Once alpha is the row half-step, x is 1; a balanced row takes the rounding of its own sum off, if K did not
  // underflow (its mass is near the smallest number then; a relaxed one may well have no mass left).
  T absorbed_scaling(int64_t i, T sum) const { return row_omega == 1 && p.rho_row == 1 && sum > 0 ? a[i] / sum : T(1); }

  // alpha = the row half-step in the log domain, from the scores of a tile and v = beta.
  void absorb_rows(const Block<T>& block, const T* tile) {
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.row + i;
      if (a[row] == 0) continue;
      const T to_bin = bin.present() ? bin.to_score[row] + beta[h.cols] : -kInf<T>;
      const T lse = row_lse(tile + i * block.stride, beta + block.col, block.cols, to_bin);
      if (lse == -kInf<T>) {  // no support: its plan is 0 whatever its potential
        a[row] = 0;
        alpha[row] = -kInf<T>;
        continue;
      }
      alpha[row] = next_potential(lse, row);
      if (bin.present()) bin.to[row] = std::exp(to_bin + alpha[row]);
    }
  }

  // y_new = the log-sum-exp of the columns, from u = alpha + log x. It needs the scores, and leaves them where K was.
  void column_lse_in_log_domain() {
    overwritten = true;
    for (int64_t i = 0; i <= h.rows; ++i) x_new[i] = a[i] > 0 ? alpha[i] + std::log(x[i]) : -kInf<T>;  // u
    column_lse(h, x_new, accumulators, y_new);
    y_new[h.cols] = -kInf<T>;
    if (bin.present()) {
      for (int64_t j = 0; j < h.m; ++j) {
        LogSumExp<T> lse;
        lse.add(y_new[j]);
        lse.add(bin.from_score[j] + x_new[h.rows]);
        y_new[j] = lse.value();
      }
      y_new[h.cols] = bin.column_lse(x_new);
    }
  }

  // Plain column half-step - v, from y_new.
  double log_domain_change(int64_t j) const {
    if (b[j] == 0 || y_new[j] == -kInf<T>) return 0;
    return p.rho_col * (log_b[j] - y_new[j]) - beta[j] - std::log(y[j]);
  }

  // The largest, in absolute value.
  double change_in_log_domain() const {
    double most = 0;
    for (int64_t j = 0; j <= h.cols; ++j) most = larger(most, std::abs(log_domain_change(j)));
    return most;
  }

  // Their norm, by the columns' masses, of a plain iteration.
  double norm_of_change(bool safe) const {
    double total = 0;
    for (int64_t j = 0; j <= h.cols; ++j) {
      if (b[j] == 0) continue;
      const double change = safe ? std::log(static_cast<double>(y_new[j]) / y[j]) : log_domain_change(j);
      total += b[j] * change * change;
    }
    return std::sqrt(total);
  }

  // y = 1 and beta = the column half-step, from y_new.
  void take_columns_in_log_domain(double omega) {
    for (int64_t j = 0; j <= h.cols; ++j) {
      if (b[j] == 0) continue;
      if (y_new[j] == -kInf<T>) {  // no support
        b[j] = y[j] = 0;
        beta[j] = -kInf<T>;
        continue;
      }
      const T plain = static_cast<T>(p.rho_col) * (log_b[j] - y_new[j]);
      const T before = beta[j] + std::log(y[j]);
      if (momentum.on) {
        v_now[j] = before;
        beta[j] = momentum.next(before, plain, v_before[j]);
      } else {
        beta[j] = omega == 1 ? plain : static_cast<T>(1 - omega) * before + static_cast<T>(omega) * plain;
      }
      y[j] = 1;
    }
  }

  void scale_value() {
    h.each_range(h.cols, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < h.value_width; ++k)
          scaled_value[j * h.value_width + k] = y[j] * value[j * h.value_width + k];
    });
  }

  T* plan_line(int64_t row) const {
    const int64_t extra = bin.present();
    return out->plan + (h.head_index() * (p.length + extra) + row) * (p.size + extra) + job().col0;
  }

  void emit_plan(const Block<T>& block, const T* tile) const {
    const int64_t reached = std::min(block.cols, h.m - block.col);
    for (int64_t i = 0; i < std::min(block.rows, h.n - block.row); ++i) {
      T* to = plan_line(job().row0 + block.row + i) + block.col;
      const T* line = tile + i * block.stride;
      for (int64_t j = 0; j < reached; ++j) to[j] = x_new[block.row + i] * line[j] * y[block.col + j];
    }
  }

  // The plan's last column and row, summed over segments, whose tokens differ; and the corner, which is summed later.
  void emit_dustbin() const {
    for (int64_t i = 0; i < h.n; ++i) plan_line(job().row0 + i)[p.size - job().col0] = bin.to[i] * x[i] * y[h.cols];
    for (int64_t j = 0; j < h.m; ++j) plan_line(p.length)[j] = bin.from[j] * x[h.rows] * y[j];
    out->corner[h.head_index() * p.bins + job().bin] = bin.corner * x[h.rows] * y[h.cols];
  }

  // O_i = x_i (K y V)_i / a_i. Balanced rows of the plan sum to a_i exactly, so those are divided by their own sum:
  // that cancels the rounding of scores that are large.
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
      const T factor = p.rho_row == 1 && sums[row] != 0 ? 1 / sums[row] : x_new[row] / a[row];
      T* to = out->output + (h.head_index() * p.length + job().row0 + row) * p.value_features;
      for (int64_t k = 0; k < p.value_features; ++k) to[k] = line[k] * factor;
      if (read)
        for (int64_t k = 0; k < p.value_features; ++k) to[k] += bin.to[row] * y[h.cols] * read[k] * factor;
    }
  }

  Partners<T> partners;
  T* accumulators;               // column sums of the parts; twice, for the log domain
  uint8_t* failed;               // [parts]
  T *value, *scaled_value;       // V and y V, [cols, value_width]
  T *lines, *dropped = nullptr;  // of each thread
  bool overwritten = false;      // the tiles hold no K
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
