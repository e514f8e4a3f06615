// The partners of every row and column: the largest entries of the plan, found as its blocks are read for the last time.
// A block holds whole rows, so a row's are final at once; columns keep those of each part, whose lists are joined in
// the end. Nearly all entries are passed over by vectors, for they stand behind a list's last.
#pragma once

#include <type_traits>

#include "head.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// The order of partners: NaN before any number, so that it shows.
template <typename T>
inline bool beats(T x, T y) {
  return x > y || (std::isnan(x) && !std::isnan(y));
}

// k masses that fall, `step` apart, and where they stand; at first 0 and -1: an entry of 0 is nobody's partner.
template <typename T>
struct List {
  T* mass;
  int32_t* place;
  int64_t k, step;

  // Takes x in if it beats the last. Among equals those that came first stay first.
  void offer(T x, int32_t at) const {
    if (!beats(x, mass[(k - 1) * step])) return;
    int64_t r = k - 1;
    for (; r > 0 && beats(x, mass[(r - 1) * step]); --r)
      mass[r * step] = mass[(r - 1) * step], place[r * step] = place[(r - 1) * step];
    mass[r * step] = x, place[r * step] = at;
  }
};

template <typename T>
class Partners {
 public:
  Partners(const Head<T>& head, Arena& arena) : h(head), k(head.p.partners), total(head.part_columns()) {
    if (!k) return;
    mass = arena.take<T>(k * total);
    place = arena.take<int32_t>(k * total);
    pictures = arena.take<T>(h.team.threads * h.largest_tile);
  }

  void start() {
    std::fill(mass, mass + k * total, T(0));
    std::fill(place, place + k * total, -1);
  }

  // The rows of a block, whose plan is x K y; a and b are 0 on dead lines.
  void take(const Block<T>& block, int64_t part, int64_t slot, const T* tile, const T* x, const T* y, const T* a,
            const T* b, const ForwardResult<T>& out) const {
    constexpr int64_t W = kWidth<T>;
    const int64_t at = h.parts[part].offset + block.col - h.parts[part].col;
    const T* lasts = mass + (k - 1) * total + at;
    const T* picture = nullptr;  // the block's scores, once a NaN asks where its support is
    const T* columns = y + block.col;
    for (int64_t i = 0; i < std::min(block.rows, h.n - block.row); ++i) {
      const int64_t row = block.row + i;
      if (a[row] == 0) continue;
      T best[kMostPartners] = {};
      int32_t where[kMostPartners];
      std::fill(where, where + k, -1);
      const List<T> mine{best, where, k, 1};
      const T* line = tile + i * block.stride;
      const Vec<T> scale(x[row]);
      const auto group = [&](int64_t first, auto vectors) {
        typename Lanes<T>::bits ahead{};
        const auto last = Vec<T>(best[k - 1]).raw;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t j = first + v * W;
          const auto entry = (scale * Vec<T>::loadu(line + j) * Vec<T>::loadu(columns + j)).raw;
          ahead |= (entry > last) | (entry > Vec<T>::loadu(lasts + j).raw) | (entry != entry);
        }
        if (!any_of<T>(ahead)) return;
        for (int64_t j = first; j < first + vectors * W; ++j) {
          const T entry = x[row] * line[j] * columns[j];
          if (std::isnan(entry)) {
            if (!picture) h.scores(block, pictures + slot * h.largest_tile), picture = pictures + slot * h.largest_tile;
            if (b[block.col + j] == 0 || picture[i * block.stride + j] == -kInf<T>) continue;
          }
          mine.offer(entry, static_cast<int32_t>(block.col + j));
          List<T>{mass + at + j, place + at + j, k, total}.offer(entry, static_cast<int32_t>(row));
        }
      };
      int64_t j = 0;
      for (; j + 4 * W <= block.cols; j += 4 * W) group(j, std::integral_constant<int64_t, 4>());
      for (; j < block.cols; j += W) group(j, std::integral_constant<int64_t, 1>());
      const int64_t to = (h.head_index() * h.p.length + h.job.row0 + row) * k;
      write(mine, h.job.col0, out.row_index + to, out.row_mass + to);
    }
  }

  void finish(const ForwardResult<T>& out) const {
    h.each_range(h.m, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        T best[kMostPartners] = {};
        int32_t where[kMostPartners];
        std::fill(where, where + k, -1);
        const List<T> mine{best, where, k, 1};
        for (const auto& part : h.parts) {
          if (j < part.col || j >= part.col + part.cols) continue;
          const int64_t at = part.offset + j - part.col;
          for (int64_t r = 0; r < k; ++r) mine.offer(mass[r * total + at], place[r * total + at]);
        }
        const int64_t to = (h.head_index() * h.p.size + h.job.col0 + j) * k;
        write(mine, h.job.row0, out.col_index + to, out.col_mass + to);
      }
    });
  }

 private:
  void write(const List<T>& from, int64_t first, int64_t* index, T* masses) const {
    for (int64_t r = 0; r < k && from.place[r] >= 0; ++r) index[r] = first + from.place[r], masses[r] = from.mass[r];
  }

  const Head<T>& h;
  const int64_t k, total;  // total: columns of all parts
  T* mass = nullptr;       // [k, total]
  int32_t* place = nullptr;
  T* pictures = nullptr;  // of each thread
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
