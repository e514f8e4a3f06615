// Connected components of the support, one gauge freedom each, as torch_sinkhorn_attn/problem/support.py finds them: from the
// intervals with active ends; a dustbin joins all tokens of its segment, a mask is not looked at.
#pragma once

#include "head.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

template <typename T>
class Components {
 public:
  Components(const Head<T>& head, Arena& arena) : h(head) {
    row = arena.take<int32_t>(h.rows + 1);
    col = arena.take<int32_t>(h.cols + 1);
    before = arena.take<int32_t>(h.cols + 1);
    total = arena.take<double>(h.rows + 2);
    size = arena.take<double>(h.rows + 2);
  }

  void find() {
    std::fill(row, row + h.rows + 1, 0);
    std::fill(col, col + h.cols + 1, 0);
    count = 1;
    if (!h.p.banded || h.p.bins > 0) return;
    const T* log_a = h.p.log_row_mass + h.head_index() * h.p.length + h.job.row0;
    const T* log_b = h.p.log_col_mass + h.head_index() * h.p.size + h.job.col0;
    before[0] = 0;  // active columns before each
    for (int64_t j = 0; j < h.m; ++j) before[j + 1] = before[j] + (log_b[j] > -kInf<T>);
    int32_t label = -1, reach = 0;
    for (int64_t i = 0; i < h.n; ++i) {
      if (log_a[i] > -kInf<T> && h.lo[i] < h.hi[i]) {
        if (before[h.lo[i]] >= before[reach]) ++col[h.lo[i]], ++label;
        reach = std::max(reach, h.hi[i]);
      }
      row[i] = std::max(label, 0);
    }
    int32_t begun = 0;
    for (int64_t j = 0; j < h.m; ++j) col[j] = std::max((begun += col[j]) - 1, 0);
    count = std::max(label + 1, 1);
  }

  const Head<T>& h;
  int32_t *row, *col;  // labels [rows + 1], [cols + 1]
  int32_t count = 1;
  double *total, *size;  // room for a sum over each

 private:
  int32_t* before;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
