// What a backward is given: the duals, and the cotangent D = dL/dP of the plan P = exp(S + u + v) by tiles, from that
// of attention's output or from the plan's own, with the dustbin's part as vectors.
#pragma once

#include "dropout.h"
#include "dustbin.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

template <typename T>
class Cotangents {
 public:
  // `tokens`: where packed tokens and the plan's tiles lie, if apart from all else.
  Cotangents(const Problem<T>& problem, const Job& job, const Team& team, Arena& arena, Arena* tokens = nullptr)
      : h(problem, job, team, tokens ? *tokens : arena, /*keep_tiles=*/true, arena),
        bin(h, arena),
        p(problem),
        wide(std::max(h.width, h.value_width)) {
    for (T** side : {&u, &log_a, &row_sums, &read}) *side = arena.take<T>(h.rows + 1);
    for (T** side : {&v, &log_b, &col_sums, &from_grad}) *side = arena.take<T>(h.cols + 1);
    grad = arena.take<T>(h.rows * h.value_width);
    value_panels = arena.take<T>(h.cols * p.value_features);
    gathered = arena.take<T>(h.cols * wide);
    cotangents = arena.take<T>(team.threads * h.largest_tile);
  }

  const Job& job() const { return h.job; }

  // Reads everything; P's row sums of P*D are <dO, O>, without a pass.
  void start(const BackwardGiven<T>& given, const BackwardResult<T>& result, int64_t last) {
    h.pack();
    read_given(given, result, last);
  }

  // All but the tokens.
  void read_given(const BackwardGiven<T>& given, const BackwardResult<T>& result, int64_t last) {
    out = &result;
    bin.pack();
    load(given.row_potentials, last, p.length, job().row0, h.n, h.rows, p.log_row_mass, p.log_row_capacity, log_a, u);
    load(given.col_potentials, last, p.size, job().col0, h.m, h.cols, p.log_col_mass, p.log_col_capacity, log_b, v);
    bin.plan(u, v);
    if (given.grad_plan) return read_plan_cotangents(given);
    // V, packed where dV will be gathered, only to be transposed
    h.pack_side(p.value, h.key_head, job().col0, h.m, h.cols, p.value_features, h.value_width, T(1), gathered,
                value_panels);
    read_cotangents(given);
  }

  // u or v number k, -inf on dead lines and on padding, and the log masses.
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

  // D on a tile, in the thread's own: <dO_i, V_j> / a_i with dropout applied, or the plan's cotangent.
  T* cotangent_tile(const Block<T>& b, int64_t slot) const {
    constexpr int64_t W = kWidth<T>;
    T* d = cotangents + slot * h.largest_tile;
    if (grad_plan) {
      const int64_t reached = std::min(b.cols, h.m - b.col);
      for (int64_t i = 0; i < b.rows; ++i) {
        T* line = d + i * b.stride;
        const bool real = b.row + i < h.n;
        if (real)
          read_line(grad_plan, job().batch, job().head, job().row0 + b.row + i, job().col0 + b.col, reached, T(1),
                    line);
        std::fill(line + (real ? reached : 0), line + b.cols, T(0));
      }
      return d;
    }
    const int64_t inner = p.value_features;
    matmul(d, b.stride, grad + b.row * h.value_width, h.value_width, 1, value_panels + b.col * inner, inner * W, W,
           b.rows, b.cols, inner, false);
    if (p.dropout) drop_out(h, b, d, d);
    return d;
  }

  Head<T> h;
  Dustbin<T> bin;
  const Problem<T>& p;
  const int64_t wide;                   // of a line of queries or values
  T *u, *log_a, *row_sums, *read;       // [rows + 1]; sums of P*D; read: cotangent of the mass sent to the dustbin
  T *v, *log_b, *col_sums, *from_grad;  // [cols + 1]; from_grad: cotangent of the mass received from it
  T corner_grad = 0;                    // of the dustbin's corner
  T *grad, *value_panels;               // dO / a [rows, value_width]; V^T in panels
  T *gathered, *cotangents;             // room for [cols, wide]; and for a tile of each thread
  Operand grad_plan;                    // where D is given
  const BackwardResult<T>* out = nullptr;

 private:
  void read_plan_cotangents(const BackwardGiven<T>& given) {
    grad_plan = given.grad_plan;
    for (int64_t i = 0; i <= h.rows; ++i) row_sums[i] = read[i] = 0;
    for (int64_t j = 0; j <= h.cols; ++j) from_grad[j] = 0;
    if (!bin.present()) return;
    const auto entry = [&](int64_t row, int64_t col) {
      T found;
      read_line(grad_plan, job().batch, job().head, row, col, 1, T(1), &found);
      return found;
    };
    for (int64_t i = 0; i < h.n; ++i) read[i] = u[i] != -kInf<T> ? entry(job().row0 + i, p.size) : T(0);
    for (int64_t j = 0; j < h.m; ++j) from_grad[j] = v[j] != -kInf<T> ? entry(p.length, job().col0 + j) : T(0);
    corner_grad = entry(p.length, p.size);
    row_sums[h.rows] = static_cast<T>(bin.dot(bin.from, from_grad, h.m) + bin.corner * corner_grad);
  }

  void read_cotangents(const BackwardGiven<T>& given) {
    const int64_t at = h.head_index(), width = h.value_width, features = p.value_features;
    const T *to = given.grad_to_bin ? given.grad_to_bin + at * p.length + job().row0 : nullptr,
            *from = given.grad_from_bin ? given.grad_from_bin + at * p.size + job().col0 : nullptr,
            *stored = p.dustbin_value ? p.dustbin_value + at * features : nullptr;
    h.pack_side(given.grad_output, job().head, job().row0, h.n, h.rows, features, width, T(1), grad);
    for (int64_t i = 0; i <= h.rows; ++i) row_sums[i] = read[i] = 0;
    for (int64_t j = 0; j <= h.cols; ++j) from_grad[j] = from && j < h.m && v[j] != -kInf<T> ? from[j] : T(0);
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
    row_sums[h.rows] = static_cast<T>(bin.dot(bin.from, from_grad, h.m));
    if (!out->dustbin_value) return;
    T* bin_value = out->dustbin_value + (at * p.bins + job().bin) * features;
    for (int64_t k = 0; k < features; ++k) {
      double total = 0;
      for (int64_t i = 0; i < h.n; ++i) total += static_cast<double>(bin.to[i]) * grad[i * width + k];
      bin_value[k] = static_cast<T>(total);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
