// The adjoint of the tail by 2R passes in R + 1 visits, and of the implicit gradient by conjugate gradients.
#pragma once

#include "adjoint.h"
#include "components.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// The recursion of torch_sinkhorn_attn/method/staircase.py (tail_field), a row and a column pass sharing a visit:
//
//     A^r = exp(S + v^r + u^r/rho_r - log a)        B^r = exp(S + u^(r-1) + v^r/rho_c - log b)
//     z^R = rowsum(P*D),  w^R = colsum(P*D) - rho_r A^R^T z^R,  z^(r-1) = -rho_c B^r w^r,  w^r = -rho_r A^r^T z^r
template <typename T>
class TailAdjoint : public Adjoint<T> {
 public:
  using Adjoint<T>::h, Adjoint<T>::p, Adjoint<T>::u, Adjoint<T>::v, Adjoint<T>::bin, Adjoint<T>::factors;

  TailAdjoint(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena)
      : Adjoint<T>(problem, job, team, arena, std::max<int64_t>(1, 2 * problem.kept)) {
    spare_row = arena.take<T>(h.rows + 1);
    spare_col = arena.take<T>(h.cols + 1);
    image = arena.take<T>(h.cols + 1);
    dropped = arena.take<T>(h.rows + 1);
  }

  void run(const BackwardGiven<T>& given, const BackwardResult<T>& result) {
    const int64_t R = p.kept;
    this->start(given, result, R);
    make_factors(given);
    const T rho_r = static_cast<T>(p.rho_row), rho_c = static_cast<T>(p.rho_col);
    // factors[2 (R - r)] = A^r with weights (rho_r z^r, 1), factors[2 (R - r) + 1] = B^r with (1, rho_c w^r)
    auto* a = &factors[0];
    a->x[h.rows] = rho_r * this->row_sums[h.rows];
    fill_ones(a->y, h.cols, v);
    std::fill(this->accumulators, this->accumulators + h.part_columns(), T(0));
    this->first_visit([&](const Block<T>& b, const T* tile, int64_t part, int64_t slot) {
      this->tile_pass(b, tile, part, slot, nullptr, nullptr, a, image, scaled, [&](int64_t i, T) {
        a->x[i] = rho_r * this->row_sums[i];
        return scaled ? a->x[i] * a->row_exp[i] : a->x[i];
      });
    });
    h.reduce(this->accumulators, 1, image);
    complete_columns(*a);
    for (int64_t j = 0; j <= h.cols; ++j) image[j] = v[j] != -kInf<T> ? this->col_sums[j] - image[j] : T(0);
    for (int64_t r = R; r > 1; --r) {
      auto *b = &factors[2 * (R - r) + 1], *next = b + 1;
      set_column_weights(*b, rho_c);
      bin_row_pass(*b);
      fill_ones(next->y, h.cols, v);
      this->pass(b, inner_columns(*b), next, image, scaled, [&](int64_t i, T sum) {
        next->x[i] = -rho_r * row_image(*b, i, sum);
        return scaled ? next->x[i] * next->row_exp[i] : next->x[i];
      });
      next->x[h.rows] = -rho_r * bin_image;
      complete_columns(*next);
      for (int64_t j = 0; j <= h.cols; ++j) image[j] = v[j] != -kInf<T> ? -image[j] : T(0);
    }
    if (R == 0) {
      this->score_visit(scaled, [](const Block<T>&, const T*, int64_t, int64_t) {});
      return store_dropped(image, h.m, h.cols, p.size, this->job().col0);
    }
    auto* b = &factors.back();
    set_column_weights(*b, rho_c);
    bin_row_pass(*b);
    const T* y = inner_columns(*b);
    this->score_visit(scaled, [&](const Block<T>& block, const T* tile, int64_t part, int64_t slot) {
      this->tile_pass(block, tile, part, slot, b, y, nullptr, nullptr, scaled,
                      [&](int64_t i, T sum) { return dropped[i] = -row_image(*b, i, sum); });
    });
    dropped[h.rows] = -bin_image;
    store_dropped(dropped, h.n, h.rows, p.length, this->job().row0);
  }

 private:
  void make_factors(const BackwardGiven<T>& given) {
    const int64_t R = p.kept;
    const T rho_r = static_cast<T>(p.rho_row), rho_c = static_cast<T>(p.rho_col);
    scaled = true;
    for (int64_t k = 0; k < this->count; ++k) {
      auto& f = factors[static_cast<size_t>(k)];
      const int64_t r = R - k / 2;
      const bool is_row = k % 2 == 0;
      f.of_columns = !is_row;
      load_rows(given, is_row ? r : r - 1, f.row);
      load_columns(given, r, f.col);
      if (is_row)
        for (int64_t i = 0; i <= h.rows; ++i) f.row[i] = u[i] != -kInf<T> ? f.row[i] / rho_r - this->log_a[i] : -kInf<T>;
      else
        for (int64_t j = 0; j <= h.cols; ++j) f.col[j] = v[j] != -kInf<T> ? f.col[j] / rho_c - this->log_b[j] : -kInf<T>;
      scaled &= exponents(f.row, u, h.rows, f.row_exp) && exponents(f.col, v, h.cols, f.col_exp);
    }
  }

  void load_rows(const BackwardGiven<T>& given, int64_t k, T* to) {
    this->load(given.row_potentials, k, p.length, this->job().row0, h.n, h.rows, p.log_row_mass, p.log_row_capacity,
               spare_row, to);
  }

  void load_columns(const BackwardGiven<T>& given, int64_t k, T* to) {
    this->load(given.col_potentials, k, p.size, this->job().col0, h.m, h.cols, p.log_col_mass, p.log_col_capacity,
               spare_col, to);
  }

  // exp(potential - last), 0 on dead lines; whether all of them are moderate.
  static bool exponents(const T* potential, const T* last, int64_t padded, T* to) {
    T most = 0;
    for (int64_t i = 0; i <= padded; ++i) {
      if (last[i] == -kInf<T>) {
        to[i] = 0;
        continue;
      }
      most = larger(most, potential[i] - last[i]);
      to[i] = std::exp(potential[i] - last[i]);
    }
    return most <= kLargestExponent<T>;
  }

  static void fill_ones(T* to, int64_t padded, const T* last) {
    for (int64_t j = 0; j <= padded; ++j) to[j] = last[j] != -kInf<T> ? T(1) : T(0);
  }

  // Weights (1, rho_c w) of a column factor from w = image.
  void set_column_weights(Factor<T>& f, T rho_c) {
    fill_ones(f.x, h.rows, u);
    for (int64_t j = 0; j <= h.cols; ++j) f.y[j] = rho_c * image[j];
  }

  // What P is multiplied with so that P y is the factor times its weights, up to its row exponentials.
  const T* inner_columns(const Factor<T>& f) {
    if (!scaled) return f.y;
    for (int64_t j = 0; j <= h.cols; ++j) spare_col[j] = f.y[j] * f.col_exp[j];
    return spare_col;
  }

  // (F y)_i from the tiles' sum: row exponentials outside, the dustbin's column added.
  T row_image(const Factor<T>& f, int64_t i, T sum) const {
    if (u[i] == -kInf<T>) return 0;
    if (scaled) sum *= f.row_exp[i];
    if (bin.present()) sum += f.at(bin.to_score[i], i, h.cols) * f.y[h.cols];
    return sum;
  }

  void bin_row_pass(const Factor<T>& f) {
    bin_image = 0;
    if (!bin.present()) return;
    double total = static_cast<double>(f.at(bin.corner_score, h.rows, h.cols)) * f.y[h.cols];
    for (int64_t j = 0; j < h.m; ++j) total += static_cast<double>(f.at(bin.from_score[j], h.rows, j)) * f.y[j];
    bin_image = static_cast<T>(total);
  }

  // image = F^T x from the tiles' sums: column exponentials, the dustbin's row and its own column sum.
  void complete_columns(const Factor<T>& f) {
    if (scaled)
      for (int64_t j = 0; j < h.cols; ++j) image[j] *= f.col_exp[j];
    image[h.cols] = 0;
    if (!bin.present()) return;
    for (int64_t j = 0; j < h.m; ++j) image[j] += f.at(bin.from_score[j], h.rows, j) * f.x[h.rows];
    double total = static_cast<double>(f.at(bin.corner_score, h.rows, h.cols)) * f.x[h.rows];
    for (int64_t i = 0; i < h.n; ++i) total += static_cast<double>(f.at(bin.to_score[i], i, h.cols)) * f.x[i];
    image[h.cols] = static_cast<T>(total);
  }

  void store_dropped(const T* from, int64_t active, int64_t padded, int64_t length, int64_t first) {
    T* to = this->out->dropped;
    if (!to) return;
    to += h.head_index() * (length + p.bins);
    for (int64_t i = 0; i < active; ++i) to[first + i] = from[i];
    if (bin.present()) to[length + this->job().bin] = from[padded];
  }

  bool scaled = true;
  T bin_image = 0;
  T *spare_row, *spare_col, *image, *dropped;
};

// dS = P (D - x - y) at the duals, [x; y] solving the system of torch_sinkhorn_attn/method/implicit.py by conjugate gradients,
// each iteration one visit.
template <typename T>
class ImplicitAdjoint : public Adjoint<T> {
 public:
  using Adjoint<T>::h, Adjoint<T>::p, Adjoint<T>::u, Adjoint<T>::v, Adjoint<T>::bin, Adjoint<T>::factors;

  ImplicitAdjoint(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena)
      : Adjoint<T>(problem, job, team, arena, 2), parts(h, arena) {
    row_inverse = arena.take<T>(h.rows + 1);
    for (T** side : {&root, &root_inverse, &solution, &residual, &direction, &product, &inner})
      *side = arena.take<T>(h.cols + 1);
  }

  void run(const BackwardGiven<T>& given, const BackwardResult<T>& result) {
    this->start(given, result, p.kept);
    const T rho_r = static_cast<T>(p.rho_row), rho_c = static_cast<T>(p.rho_col);
    parts.find();
    // P 1 and P^T 1 ride in the first visit
    for (int64_t j = 0; j <= h.cols; ++j) inner[j] = v[j] != -kInf<T> ? T(1) : T(0);
    std::fill(this->accumulators, this->accumulators + h.part_columns(), T(0));
    this->first_visit([&](const Block<T>& b, const T* tile, int64_t part, int64_t slot) {
      this->tile_pass(b, tile, part, slot, nullptr, inner, nullptr, product, true, [&](int64_t i, T sum) {
        if (bin.present()) sum += bin.to[i] * inner[h.cols];
        row_inverse[i] = inverse(sum);
        return u[i] != -kInf<T> ? T(1) : T(0);
      });
    });
    h.reduce(this->accumulators, 1, root);
    normalise();
    // rhs = root^-1 (colsum - rho_r P^T (rowsum / r))
    column_pass(product, [&](int64_t i) { return row_inverse[i] * this->row_sums[i]; });
    double noise = 0;  // what the right-hand side's two terms leave when they cancel
    for (int64_t j = 0; j <= h.cols; ++j) {
      const double one = root_inverse[j] * this->col_sums[j], other = root_inverse[j] * rho_r * product[j];
      residual[j] = static_cast<T>(one - other);
      noise += (std::abs(one) + std::abs(other)) * (std::abs(one) + std::abs(other));
    }
    project(residual);
    conjugate_gradients(rho_r, rho_c, kRounding * kRounding * noise);
    auto &x = factors[0], &y = factors[1];
    for (auto* f : {&x, &y}) {
      std::copy(u, u + h.rows + 1, f->row);
      std::copy(v, v + h.cols + 1, f->col);
      for (int64_t i = 0; i <= h.rows; ++i) f->row_exp[i] = f->x[i] = u[i] != -kInf<T> ? T(1) : T(0);
      for (int64_t j = 0; j <= h.cols; ++j) f->col_exp[j] = f->y[j] = v[j] != -kInf<T> ? T(1) : T(0);
    }
    for (int64_t j = 0; j <= h.cols; ++j) y.y[j] = root_inverse[j] * solution[j];
    this->pass(nullptr, y.y, nullptr, nullptr, true, [&](int64_t i, T sum) {
      if (bin.present()) sum += bin.to[i] * y.y[h.cols];
      return x.x[i] = rho_r * row_inverse[i] * (this->row_sums[i] - sum);
    });
    if (bin.present()) x.x[h.rows] = rho_r * row_inverse[h.rows] * (this->row_sums[h.rows] - bin.row_sum(y.y));
    this->score_visit(true, [](const Block<T>&, const T*, int64_t, int64_t) {});
  }

 private:
  static constexpr int64_t kMaxIters = 500;  // MAX_ITERS, TOLERANCE and ROUNDING of implicit.py
  static constexpr double kTolerance = sizeof(T) == 4 ? 1e-7 : 1e-14;
  static constexpr double kRounding = 8 * std::numeric_limits<T>::epsilon();

  // 0 for a line without mass; NaN stays.
  static T inverse(T sum) { return sum <= 0 ? T(0) : 1 / sum; }

  // root = sqrt(P^T 1), from the tiles' sums in root, and the dustbin's row.
  void normalise() {
    root[h.cols] = row_inverse[h.rows] = 0;
    if (bin.present()) {
      for (int64_t j = 0; j < h.m; ++j) root[j] += bin.from[j];
      root[h.cols] = static_cast<T>(std::accumulate(bin.to, bin.to + h.n, static_cast<double>(bin.corner)));
      const T sum = bin.row_sum(inner);
      row_inverse[h.rows] = inverse(sum);
    }
    double* mass = parts.size;
    std::fill(mass, mass + parts.count, 0.0);
    for (int64_t j = 0; j <= h.cols; ++j) {
      const T sum = j < h.m || j == h.cols ? larger(root[j], T(0)) : T(0);
      mass[parts.col[j]] += sum;
      root[j] = std::sqrt(sum);
      root_inverse[j] = inverse(root[j]);
    }
  }

  template <typename Row>
  void column_pass(T* to, const Row& row) {
    this->pass(nullptr, nullptr, nullptr, to, true, [&](int64_t i, T) { return u[i] != -kInf<T> ? row(i) : T(0); });
    finish_columns(to, bin.present() ? row(h.rows) : T(0), [&](int64_t i) { return row(i); });
  }

  template <typename Row>
  void finish_columns(T* to, T at_bin, const Row& row) {
    to[h.cols] = 0;
    if (!bin.present()) return;
    for (int64_t j = 0; j < h.m; ++j) to[j] += bin.from[j] * at_bin;
    double total = static_cast<double>(bin.corner) * at_bin;
    for (int64_t i = 0; i < h.n; ++i)
      if (u[i] != -kInf<T>) total += static_cast<double>(bin.to[i]) * row(i);
    to[h.cols] = static_cast<T>(total);
  }

  // to = N^T N s, N = diag(r)^(-1/2) P diag(c)^(-1/2), in one visit.
  void gram(const T* s, T* to) {
    for (int64_t j = 0; j <= h.cols; ++j) inner[j] = root_inverse[j] * s[j];
    T* image = factors[0].x;
    this->pass(nullptr, inner, nullptr, to, true, [&](int64_t i, T sum) {
      if (bin.present()) sum += bin.to[i] * inner[h.cols];
      return image[i] = row_inverse[i] * sum;
    });
    image[h.rows] = bin.present() ? row_inverse[h.rows] * bin.row_sum(inner) : T(0);
    finish_columns(to, image[h.rows], [&](int64_t i) { return image[i]; });
    for (int64_t j = 0; j <= h.cols; ++j) to[j] *= root_inverse[j];
  }

  // s off the null vectors: sqrt(c) of each connected component, where the problem is balanced.
  void project(T* s) {
    if (!p.balanced) return;
    double *share = parts.total, *mass = parts.size;
    std::fill(share, share + parts.count, 0.0);
    for (int64_t j = 0; j <= h.cols; ++j) share[parts.col[j]] += static_cast<double>(root[j]) * s[j];
    for (int64_t j = 0; j <= h.cols; ++j)
      if (mass[parts.col[j]] != 0) s[j] -= root[j] * static_cast<T>(share[parts.col[j]] / mass[parts.col[j]]);
  }

  double dot(const T* x, const T* y) const {
    double total = 0;
    for (int64_t j = 0; j <= h.cols; ++j) total += static_cast<double>(x[j]) * y[j];
    return total;
  }

  void conjugate_gradients(T rho_r, T rho_c, double noise) {
    const int64_t size = h.cols + 1;
    std::fill(solution, solution + size, T(0));
    std::copy(residual, residual + size, direction);
    double energy = dot(residual, residual);
    const double enough = std::max(kTolerance * kTolerance * energy, noise);
    if (std::isnan(energy)) std::copy(residual, residual + size, solution);
    for (int64_t k = 0; k < kMaxIters && energy > enough; ++k) {
      gram(direction, product);
      for (int64_t j = 0; j < size; ++j) product[j] = direction[j] / rho_c - rho_r * product[j];
      project(product);
      const double curvature = dot(direction, product);
      if (!(curvature > kRounding * dot(direction, direction))) break;  // a null vector, to rounding
      const T step = static_cast<T>(energy / curvature);
      for (int64_t j = 0; j < size; ++j) {
        solution[j] += step * direction[j];
        residual[j] -= step * product[j];
      }
      const double next = dot(residual, residual);
      const T keep = static_cast<T>(next / energy);
      for (int64_t j = 0; j < size; ++j) direction[j] = residual[j] + keep * direction[j];
      project(direction);
      energy = next;
    }
  }

  T* row_inverse;                                                              // [rows + 1]
  T *root, *root_inverse, *solution, *residual, *direction, *product, *inner;  // [cols + 1]
  Components<T> parts;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
