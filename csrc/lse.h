// Half-steps in the log domain, from scores.
#pragma once

#include "dustbin.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// log(sum_j exp(S_j + v_j) + exp(other)) of a line of a tile; -inf where there is nothing, NaN beside infinity.
template <typename T>
inline T row_lse(const T* line, const T* v, int64_t cols, T other) {
  constexpr int64_t W = kWidth<T>;
  Vec<T> tops(-kInf<T>);
  for (int64_t j = 0; j < cols; j += W) tops = maximum(tops, Vec<T>::loadu(line + j) + Vec<T>::loadu(v + j));
  const T top = larger(max_of(tops), other);
  if (top == -kInf<T>) return top;
  Vec<T> total(T(0));  // NaN if the top is infinity, which less itself is no number
  for (int64_t j = 0; j < cols; j += W)
    total = total + exp_of(Vec<T>::loadu(line + j) + Vec<T>::loadu(v + j) - Vec<T>(top));
  return top + std::log(sum_of(total) + std::exp(other - top));
}

// LSE_i(S_ij + u_i) to `to` [cols]. Tiles hold scores afterwards; `accumulators` is twice the columns of the parts.
template <typename T>
void column_lse(const Head<T>& h, const T* u, T* accumulators, T* to) {
  constexpr int64_t W = kWidth<T>;
  T *tops = accumulators, *totals = accumulators + h.part_columns();
  std::fill(tops, totals, -kInf<T>);
  std::fill(totals, totals + h.part_columns(), T(0));
  h.each_block([&](const Block<T>& block, int64_t part, int64_t slot) {
    T* tile = h.own_tile(block, slot);
    h.scores(block, tile);
    const int64_t at = h.parts[part].offset + block.col - h.parts[part].col;
    for (int64_t j = 0; j < block.cols; j += W) {
      const Vec<T> before = Vec<T>::loadu(tops + at + j);
      Vec<T> top = before;
      for (int64_t i = 0; i < block.rows; ++i)
        top = maximum(top, Vec<T>::loadu(tile + i * block.stride + j) + Vec<T>(u[block.row + i]));
      top.store(tops + at + j);
      const Vec<T> shift = finite_or_zero(top);
      Vec<T> total = Vec<T>::loadu(totals + at + j) * exp_of(before - shift);
      for (int64_t i = 0; i < block.rows; ++i)
        total = total + exp_of(Vec<T>::loadu(tile + i * block.stride + j) + Vec<T>(u[block.row + i]) - shift);
      total.store(totals + at + j);
    }
  });
  std::fill(to, to + h.cols, -kInf<T>);
  for (const auto& part : h.parts)  // log-sum-exp of the parts, in order
    for (int64_t j = 0; j < part.cols; ++j) {
      LogSumExp<T> lse;
      lse.add(to[part.col + j]);
      if (totals[part.offset + j] != 0) lse.add(tops[part.offset + j] + std::log(totals[part.offset + j]));
      to[part.col + j] = lse.value();
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
