// Vectors of the capability that this translation unit is compiled for, written with the vector extensions of GCC and
// Clang: every instruction set from the same lines, and nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int64_t kVectorBytes = 64;
#elif defined(__aarch64__)
inline constexpr int64_t kVectorBytes = 16;
#else
inline constexpr int64_t kVectorBytes = 32;  // without AVX, the compiler takes two registers
#endif

// The machine's vectors of T, of its bits, and of T that stand anywhere in memory; and what exp needs to know of T.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float raw __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  static constexpr int kMantissa = 23;
  static constexpr float kLargest = 0x1.62e42ep+6f;    // the last x with a finite exp(x)
  static constexpr float kSmallest = -0x1.5d58ap+6f;   // the last x with exp(x) below the smallest normal number
  static constexpr float kLog2 = 0x1.63p-1f, kLog2Rest = -0x1.bd0106p-13f;  // n * kLog2 is exact
  static constexpr float kTail[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f};
};

template <>
struct Lanes<double> {
  typedef double raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  static constexpr int kMantissa = 52;
  static constexpr double kLargest = 0x1.62e42fefa39efp+9;
  static constexpr double kSmallest = -0x1.6232bdd7abcd3p+9;
  static constexpr double kLog2 = 0x1.62e4p-1, kLog2Rest = 0x1.7f7d1cf79abcap-20;
  static constexpr double kTail[] = {0x1.000000000000ap-1,  0x1.55555555554fap-3,  0x1.555555555087cp-5,
                                     0x1.1111111127be7p-7,  0x1.6c16c1842a12ap-10, 0x1.a01a012a57075p-13,
                                     0x1.a0199a0c64c3ep-16, 0x1.71df2553d8691p-19, 0x1.28ad72cedc06bp-22,
                                     0x1.ad7f6c51b1da1p-26};
};

template <typename T>
struct Vec {
  using Raw = typename Lanes<T>::raw;

  Raw raw;

  Vec() = default;
  explicit Vec(T x) : raw(x - Raw{}) {}
  explicit Vec(Raw x) : raw(x) {}
  static Vec loadu(const T* from) { return Vec(*reinterpret_cast<const typename Lanes<T>::loose*>(from)); }
  void store(T* to) const { *reinterpret_cast<typename Lanes<T>::loose*>(to) = raw; }

  friend Vec operator+(Vec x, Vec y) { return Vec(x.raw + y.raw); }
  friend Vec operator-(Vec x, Vec y) { return Vec(x.raw - y.raw); }
  friend Vec operator*(Vec x, Vec y) { return Vec(x.raw * y.raw); }
};

template <typename T>
inline constexpr int64_t kWidth = kVectorBytes / sizeof(T);

// x y + z, in one rounding where the instruction set can: compilers contract it.
template <typename T>
inline Vec<T> fmadd(Vec<T> x, Vec<T> y, Vec<T> z) {
  return Vec<T>(x.raw * y.raw + z.raw);
}

// The larger, or the one that is NaN.
template <typename T>
inline Vec<T> maximum(Vec<T> x, Vec<T> y) {
  return Vec<T>((x.raw > y.raw) | (x.raw != x.raw) ? x.raw : y.raw);
}

// Whether a comparison holds in some lane.
template <typename T>
inline bool any_of(typename Lanes<T>::bits lanes) {
  int64_t words[kVectorBytes / 8], some = 0;
  __builtin_memcpy(words, &lanes, sizeof words);
  for (const int64_t word : words) some |= word;
  return some != 0;
}

// x where it is above -inf, and 0 there.
template <typename T>
inline Vec<T> finite_or_zero(Vec<T> x) {
  return Vec<T>(x.raw == Vec<T>(-std::numeric_limits<T>::infinity()).raw ? Vec<T>(T(0)).raw : x.raw);
}

// exp within 1.1 ulp, results below the smallest normal number flushed to 0 (subnormal products are slow and carry
// nothing); NaN stays. x = n log 2 + r with |r| <= log(2) / 2, and exp(r) = 1 + r + r^2 p(r) with p of least relative
// error; n is added to the exponent's bits.
template <typename T>
inline Vec<T> exp_of(Vec<T> of) {
  using L = Lanes<T>;
  constexpr T round = T(int64_t(3) << (L::kMantissa - 1));  // what is added to it ends up rounded, in its last bits
  constexpr int terms = sizeof(L::kTail) / sizeof(T);
  const auto x = of.raw;
  const auto shifted = x * T(1.4426950408889634) + round;
  const auto n = shifted - round;
  const auto r = (x - n * L::kLog2) - n * L::kLog2Rest;
  auto p = r * L::kTail[terms - 1] + L::kTail[terms - 2];
  for (int k = terms - 3; k >= 0; --k) p = p * r + L::kTail[k];
  p = (p * (r * r) + r) + T(1);
  using Raw = typename L::raw;
  using Bits = typename L::bits;
  const auto scaled = reinterpret_cast<Raw>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << L::kMantissa));
  const auto finite = x <= L::kLargest ? scaled : x * std::numeric_limits<T>::infinity();  // or NaN
  return Vec<T>(x <= L::kSmallest ? Raw{} : finite);
}

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
