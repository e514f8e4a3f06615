// The state of a solve in stabilised scaling form (B. Schmitzer, "Stabilized sparse scaling algorithms for entropy
// regularized transport problems", SIAM J. Sci. Comput. 41(3), 2019): potentials are u = alpha + log x, v = beta + log
// y, with K = exp(S + alpha + beta) in the tiles.
#pragma once

#include "components.h"
#include "dustbin.h"
#include "momentum.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// Whether a scaling is within the safe range, e^-20 .. e^20 (e^-200 .. e^200 for double): K's entries that were flushed
// to 0 then add nothing to a sum of masses that are not themselves near the smallest number.
template <typename T>
inline bool in_range(T scaling) {
  constexpr T low = sizeof(T) == 4 ? T(2.0611536e-9) : T(1.3838965267367376e-87);
  return scaling > low && scaling < 1 / low;
}

inline constexpr float kCoarse = 16;  // the rounding of larger potentials shows in float32

template <typename T>
class Scalings {
 public:
  Scalings(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena, bool keep_tiles)
      : h(problem, job, team, arena, keep_tiles, arena), bin(h, arena), parts(h, arena), p(problem) {
    for (T** side : {&alpha, &x, &x_new, &log_a, &a, &sums}) *side = arena.take<T>(h.rows + 1);
    for (T** side : {&beta, &y, &y_new, &log_b, &b, &c}) *side = arena.take<T>(h.cols + 1);
  }

  const Job& job() const { return h.job; }

  // Masses, and the initial potentials as alpha and beta.
  void start(const ForwardResult<T>& result) {
    out = &result;
    h.pack();
    bin.pack();

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

  // y_new = the next column scaling, from the column sums of K x; false where it leaves the safe range. Accelerated, v
  // goes to `v_now`.
  bool column_half_step(double omega) {
    const T rho = static_cast<T>(p.rho_col);
    bool safe = true;
    T least = 1, most = 1;  // of y_new / y before over-relaxation
    for (int64_t j = 0; j <= h.cols; ++j) {
      T next = b[j] / c[j];
      if (b[j] == 0) next = 0;
      if (rho != 1 && b[j] > 0) next = std::exp(rho * (log_b[j] - std::log(c[j])) + (rho - 1) * beta[j]);
      safe &= in_range(next) || b[j] == 0;
      if (p.tolerance > 0 && b[j] > 0) {
        least = -larger(-least, -next / y[j]);
        most = larger(most, next / y[j]);
      }
      y_new[j] = next;
    }
    largest_change = larger(std::log(most), -std::log(least));
    if (omega != 1)
      for (int64_t j = 0; j <= h.cols; ++j)
        if (b[j] > 0) {
          y_new[j] = relaxed(y[j], y_new[j], omega);
          safe &= in_range(y_new[j]);
        }
    if (momentum.on)
      for (int64_t j = 0; j <= h.cols; ++j)
        if (b[j] > 0) {
          const T scale = std::log(y[j]);  // v - beta
          v_now[j] = beta[j] + scale;
          y_new[j] = std::exp(momentum.next(scale, std::log(y_new[j]), v_before[j] - beta[j]));
          safe &= in_range(y_new[j]);
        }
    return safe;
  }

  static T relaxed(T before, T plain, double omega) {
    return std::exp(static_cast<T>(1 - omega) * std::log(before) + static_cast<T>(omega) * std::log(plain));
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
    return settle(a[i], alpha[i], scaling, centred ? parts.total[parts.row[i]] : 0, kept);
  }

  void settle_columns() {
    T* kept = out->col_potentials + (settled * p.num * p.heads + h.head_index()) * (p.size + p.bins);
    for (int64_t j = 0; j <= h.cols; ++j) {
      if (j == h.cols ? !bin.present() : j >= h.m) continue;
      y[j] = settle(b[j], beta[j], y[j], centred ? -parts.total[parts.col[j]] : 0, kept + col_place(j));
    }
  }

  // Whether potentials number 0 are so large that their rounding shows.
  bool coarse() const {
    const T *u = out->row_potentials + h.head_index() * (p.length + p.bins),
            *v = out->col_potentials + h.head_index() * (p.size + p.bins);
    T most = 0;
    for (int64_t i = 0; i < h.n; ++i) most = larger(most, std::abs(u[row_place(i)]));
    for (int64_t j = 0; j < h.m; ++j) most = larger(most, std::abs(v[col_place(j)]));
    return sizeof(T) == 4 && most > kCoarse;
  }

  // Whether the gauge is so large, after a warm start, that K's exponents would be rounded more than the potentials
  // are.
  bool far_from_centre() const {
    double most = 0;
    for (int32_t k = 0; centred && k < parts.count; ++k) most = larger(most, std::abs(parts.total[k]));
    return sizeof(T) == 4 && most > kCoarse;
  }

  // alpha, beta = potentials number 0 as they were kept, centred; K is to be built.
  void absorb_settled() {
    const T *u = out->row_potentials + h.head_index() * (p.length + p.bins),
            *v = out->col_potentials + h.head_index() * (p.size + p.bins);
    for (int64_t i = 0; i <= h.rows; ++i)
      if (a[i] > 0) alpha[i] = u[row_place(i)], x[i] = 1;
    for (int64_t j = 0; j <= h.cols; ++j)
      if (b[j] > 0) beta[j] = v[col_place(j)], y[j] = 1;
    centred = false;
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

  // Largest |P 1 - a| and |P^T 1 - b| at the last duals.
  void residuals(T& row, T& col) const {
    row = col = 0;
    const auto take = [](T& most, T error) { most = larger(most, std::abs(error)); };
    for (int64_t i = 0; i <= h.rows; ++i)
      if (log_a[i] > -kInf<T>) take(row, (a[i] > 0 ? x[i] * sums[i] : T(0)) - std::exp(log_a[i]));
    for (int64_t j = 0; j <= h.cols; ++j)
      if (log_b[j] > -kInf<T>) take(col, (b[j] > 0 ? y[j] * c[j] : T(0)) - std::exp(log_b[j]));
  }

  Head<T> h;
  Dustbin<T> bin;
  Components<T> parts;
  const Problem<T>& p;
  const ForwardResult<T>* out = nullptr;
  T *alpha, *x, *x_new, *log_a, *a, *sums;  // [rows + 1], the dustbin last; a is 0 on dead lines; sums = K y
  T *beta, *y, *y_new, *log_b, *b, *c;      // [cols + 1]; c = K^T x
  double row_omega = 1;                     // over-relaxation of the row half-step in progress
  Momentum momentum;
  T *v_before = nullptr, *v_now = nullptr;  // [cols + 1], accelerated: v an iteration ago, and v
  double largest_change = 0;                // of a column potential in the last column half-step
  int64_t settled = -1;                     // number of the potentials that are being kept, once they are
  bool centred = false;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
