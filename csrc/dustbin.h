// The dustbin of a job as two vectors and a corner beside the tiles. Its sums run over all tokens in one go, so they
// are taken in double precision.
#pragma once

#include "head.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// log(sum(exp(x))) of a stream of numbers; NaN stays, and infinity becomes it: a potential of -infinity would pass for
// a line without support.
template <typename T>
class LogSumExp {
 public:
  void add(T x) {
    if (x > top_) {
      sum_ = sum_ * std::exp(top_ - x) + 1;
      top_ = x;
    } else if (x != -kInf<T>) {
      sum_ += std::exp(x - top_);
    }
  }
  T value() const {
    if (sum_ == 0) return -kInf<T>;
    return top_ == kInf<T> ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(top_ + std::log(sum_));
  }

 private:
  T top_ = -kInf<T>;
  double sum_ = 0;
};

template <typename T>
class Dustbin {
 public:
  Dustbin(const Head<T>& head, Arena& arena) : h(head) {
    if (!present()) return;
    to_score = arena.take<T>(h.rows);
    from_score = arena.take<T>(h.cols);
    to = arena.take<T>(h.rows);
    from = arena.take<T>(h.cols);
  }

  bool present() const { return h.p.bins > 0; }

  void pack() {
    if (!present()) return;
    const T scale = static_cast<T>(1 / h.p.epsilon);
    const T* row = h.p.row_score + h.head_index() * h.p.length + h.job.row0;
    const T* col = h.p.col_score + h.head_index() * h.p.size + h.job.col0;
    for (int64_t i = 0; i < h.rows; ++i) to_score[i] = i < h.n ? row[i] * scale : T(0), to[i] = 0;
    for (int64_t j = 0; j < h.cols; ++j) from_score[j] = j < h.m ? col[j] * scale : T(0), from[j] = 0;
    corner_score = h.p.corner_score[h.head_index()] * scale;
  }

  // The plan exp(score + u + v) on column, row and corner; u [rows + 1], v [cols + 1], the dustbin's last.
  void plan(const T* u, const T* v) {
    if (!present()) return;
    for (int64_t i = 0; i < h.n; ++i) to[i] = std::exp((to_score[i] + v[h.cols]) + u[i]);
    plan_row(u[h.rows], v);
  }

  // The dustbin's row and corner alone.
  void plan_row(T u_bin, const T* v) {
    for (int64_t j = 0; j < h.m; ++j) from[j] = std::exp((from_score[j] + v[j]) + u_bin);
    corner = std::exp((corner_score + v[h.cols]) + u_bin);
  }

  T row_lse(const T* v) const {
    LogSumExp<T> lse;
    for (int64_t j = 0; j < h.m; ++j) lse.add(from_score[j] + v[j]);
    lse.add(corner_score + v[h.cols]);
    return lse.value();
  }

  T column_lse(const T* u) const {
    LogSumExp<T> lse;
    for (int64_t i = 0; i < h.n; ++i) lse.add(to_score[i] + u[i]);
    lse.add(corner_score + u[h.rows]);
    return lse.value();
  }

  // Sum of the dustbin's row times y, and of its column times x.
  T row_sum(const T* y) const { return static_cast<T>(dot(from, y, h.m) + corner * y[h.cols]); }
  T column_sum(const T* x) const { return static_cast<T>(dot(to, x, h.n) + corner * x[h.rows]); }

  static double dot(const T* x, const T* y, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(x[i]) * y[i];
    return total;
  }

  const Head<T>& h;
  T *to_score = nullptr, *from_score = nullptr;  // scores over epsilon: [rows], [cols]
  T *to = nullptr, *from = nullptr;              // the plan
  T corner_score = 0, corner = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
