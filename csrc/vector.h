// The arena of a job's workspace, and the one matrix product everything is made of. All of it lives in a namespace of the
// capability this translation unit is compiled for, so that no linker merges two of them.
#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "problem.h"
#include "simd.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
inline constexpr int64_t kRows = 8;  // rows of a register tile: 32 vector registers
#else
inline constexpr int64_t kRows = 4;
#endif
inline constexpr int64_t kRowAlign = 8;  // tiles have a multiple of so many rows

// Columns of a tile are padded to a multiple of this: whole vectors, and whole register tiles when transposed.
template <typename T>
inline constexpr int64_t kColAlign = kWidth<T> > kRows ? kWidth<T> : kRows;

template <typename T>
inline constexpr T kInf = std::numeric_limits<T>::infinity();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out pieces of one block of memory; with a null base it only counts. Under the address sanitizer what lies
// between the pieces may not be touched.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    used_ += round_up(size, 64);
#ifdef __SANITIZE_ADDRESS__
    used_ += 64;
    if (base_) __asan_poison_memory_region(at + size, base_ + used_ - (at + size));
#endif
    return reinterpret_cast<T*>(at);
  }
#ifdef __SANITIZE_ADDRESS__
  ~Arena() {
    if (base_) __asan_unpoison_memory_region(base_, used_);
  }
#endif
  bool counting() const { return base_ == nullptr; }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename T>
inline T sum_of(const Vec<T>& x) {
  T lanes[kWidth<T>];
  x.store(lanes);
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The larger of two numbers, or the one that is NaN, wherever it stands: std::max drops its second.
template <typename T>
inline T larger(T x, T y) {
  return x >= y || std::isnan(x) ? x : y;
}

template <typename T>
inline T max_of(const Vec<T>& x) {
  T lanes[kWidth<T>];
  x.store(lanes);
  T top = lanes[0];
  for (int64_t i = 1; i < kWidth<T>; ++i) top = larger(top, lanes[i]);
  return top;
}

template <typename T, int64_t Rows, int64_t Vectors>
inline void register_tile(T* c, int64_t c_row, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_vector,
                          int64_t b_k, int64_t inner, bool add) {
  constexpr int64_t W = kWidth<T>;
  Vec<T> sums[Rows][Vectors];
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t v = 0; v < Vectors; ++v) sums[r][v] = Vec<T>(T(0));
  for (int64_t k = 0; k < inner; ++k) {
    Vec<T> line[Vectors];
    for (int64_t v = 0; v < Vectors; ++v) line[v] = Vec<T>::loadu(b + v * b_vector + k * b_k);
    for (int64_t r = 0; r < Rows; ++r) {
      const Vec<T> x(a[r * a_row + k * a_k]);
      for (int64_t v = 0; v < Vectors; ++v) sums[r][v] = fmadd(x, line[v], sums[r][v]);
    }
  }
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t v = 0; v < Vectors; ++v) {
      T* to = c + r * c_row + v * W;
      (add ? Vec<T>::loadu(to) + sums[r][v] : sums[r][v]).store(to);
    }
}

// Register tiles are 4 x 4 vectors where there are 32 registers, which reads A once for 64 float32 features (5 % of a
// whole training step faster than 8 x 2), and kRows x 2 or x 1 vectors for what is left.
//
// C (+)= A B. C is [rows, columns] with rows a multiple of kRows and columns of the vector width. Entry (r, k) of A is
// a[r * a_row + k * a_k]; vector v of row k of B is at b + v * b_vector + k * b_k. The order of every sum is fixed:
// runs of at most kRun terms, then the runs, so that rounding grows little with the number of terms.
inline constexpr int64_t kRun = 256;

template <typename T>
void matmul(T* c, int64_t c_row, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_vector, int64_t b_k,
            int64_t rows, int64_t columns, int64_t inner, bool add) {
  constexpr int64_t W = kWidth<T>;
  const int64_t vectors = columns / W;
  int64_t first = 0;
  do {
    const int64_t run = std::min(kRun, inner - first);
    const bool more = add || first > 0;
    const T *left = a + first * a_k, *right = b + first * b_k;
    int64_t v = 0;
    for (; kRows == 8 && v + 4 <= vectors; v += 4)
      for (int64_t r = 0; r < rows; r += 4)
        register_tile<T, 4, 4>(c + r * c_row + v * W, c_row, left + r * a_row, a_row, a_k, right + v * b_vector,
                               b_vector, b_k, run, more);
    for (; v + 2 <= vectors; v += 2)
      for (int64_t r = 0; r < rows; r += kRows)
        register_tile<T, kRows, 2>(c + r * c_row + v * W, c_row, left + r * a_row, a_row, a_k, right + v * b_vector,
                                   b_vector, b_k, run, more);
    for (; v < vectors; ++v)
      for (int64_t r = 0; r < rows; r += kRows)
        register_tile<T, kRows, 1>(c + r * c_row + v * W, c_row, left + r * a_row, a_row, a_k, right + v * b_vector,
                                   b_vector, b_k, run, more);
    first += run;
  } while (first < inner);
}

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
