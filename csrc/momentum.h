// Chebyshev semi-iteration of the column potentials: torch_sinkhorn_attn/method/acceleration.py derives it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "problem.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

// Its numbers, in iteration t = 0, 1, ... of one problem.
class Momentum {
 public:
  template <typename T>
  void start(const Problem<T>& p) {
    wanted = p.accelerated;
    measured = p.contraction == 0;
    lambda = p.contraction;
    omega = 1;
    on = false;
  }

  void begin(int64_t t) {
    const int64_t first = measured ? 3 : 1;  // as plain_iterations in options.py
    on = wanted && t >= first;
    const double mu = lambda / (2 - lambda);
    if (t > first) omega = 1 / (1 - (t == first + 1 ? 2 : omega) * mu * mu / 4);
  }

  void end() { on = false; }

  bool looks(int64_t t) const { return wanted && measured && (t == 1 || t == 2); }

  // The norm of the change in iteration 1, then in iteration 2, which tell the contraction.
  void look(int64_t t, double norm) {
    if (t == 2) lambda = std::min(1 - (1 - (before == 0 ? 0 : std::min(norm / before, 1.0))) / 4, 0.9);
    before = norm;
  }

  // From the potential v, what the half-step would make of it, and what it was an iteration ago.
  template <typename T>
  T next(T v, T plain, T last) const {
    const T to_plain = static_cast<T>(omega * 2 / (2 - lambda)), away = static_cast<T>(omega - 1);
    return v + to_plain * (plain - v) + away * (v - last);
  }

  bool on = false;  // whether this iteration is accelerated

 private:
  bool wanted = false, measured = false;
  double lambda = 0, omega = 1, before = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
