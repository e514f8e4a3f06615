// From a checked call to the `Problem` that the kernels read, for every file of ops.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

#include "capability.h"
#include "checks.h"
#include "schedule.h"

namespace sinkhorn {

inline Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Kind::float64;
    case ScalarType::Float:
      return Kind::float32;
    case ScalarType::Half:
      return Kind::float16;
    case ScalarType::BFloat16:
      return Kind::bfloat16;
    case ScalarType::Bool:
      return Kind::boolean;
    default:
      throw std::invalid_argument("the CPU engine does not read tensors of this dtype");
  }
}

// A tensor [N, H, rows, cols] or one that broadcasts to it.
inline Operand operand(const std::optional<Tensor>& x) {
  Operand found;
  if (!x.has_value()) return found;
  const auto step = [&](int64_t dim) { return x->size(dim) == 1 ? 0 : x->stride(dim); };
  found.data = x->const_data_ptr();
  found.kind = kind_of(*x);
  found.batch = step(0), found.head = step(1), found.row = step(2), found.col = x->stride(3);
  return found;
}

template <typename T>
const T* pointer(const std::optional<Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<T>() : nullptr;
}

inline double lowest(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return std::numeric_limits<double>::lowest();
    case ScalarType::Half:
      return -65504.0;
    case ScalarType::BFloat16:
      return -3.3895313892515355e38;
    default:
      return std::numeric_limits<float>::lowest();
  }
}

// The problem of a checked call.
template <typename T>
Problem<T> problem_of(const Given& given) {
  const auto& tensors = given.tensors;
  Problem<T> p;
  p.query = operand(tensors[kQuery]), p.key = operand(tensors[kKey]), p.value = operand(tensors[kValue]);
  p.mask = operand(tensors[kMask]);
  if (p.mask && p.mask.kind != Kind::boolean)
    p.mask_floor =
        std::max(lowest(given[kMask].scalar_type()), static_cast<double>(std::numeric_limits<T>::lowest())) / 2;
  if (p.mask && given[kMask].size(3) == 1) p.mask.col = 0;
  p.row_score = pointer<T>(tensors[kRowScore]), p.col_score = pointer<T>(tensors[kColScore]);
  p.corner_score = pointer<T>(tensors[kCornerScore]), p.dustbin_value = pointer<T>(tensors[kDustbinValue]);
  p.row_lo = pointer<int64_t>(tensors[kRowLo]), p.row_hi = pointer<int64_t>(tensors[kRowHi]);
  p.log_row_mass = pointer<T>(tensors[kLogRowMass]), p.log_col_mass = pointer<T>(tensors[kLogColMass]);
  p.log_row_capacity = pointer<T>(tensors[kLogRowCapacity]);
  p.log_col_capacity = pointer<T>(tensors[kLogColCapacity]);
  p.initial_row = pointer<T>(tensors[kInitialRow]), p.initial_col = pointer<T>(tensors[kInitialCol]);
  if (const auto* seed = pointer<int64_t>(tensors[kDropoutSeed])) {
    p.dropout = true;
    p.seed[0] = static_cast<uint32_t>(seed[0]), p.seed[1] = static_cast<uint32_t>(seed[1]);
  }
  p.num = given.num, p.heads = given.heads, p.length = given.length, p.features = given.features;
  p.key_heads = given.key_heads, p.size = given.size;
  p.value_features = given.value_features, p.bins = given.bins;
  const auto& numbers = given.numbers;
  const auto& counts = given.counts;
  p.epsilon = numbers[kEpsilon], p.score_factor = numbers[kScale] / numbers[kEpsilon];
  p.rho_row = numbers[kRhoRow], p.rho_col = numbers[kRhoCol];
  p.balanced = p.rho_row == 1 && p.rho_col == 1;
  p.tolerance = numbers[kTolerance], p.over_relaxation = numbers[kOverRelaxation];
  p.accelerated = counts[kAccelerated] != 0, p.contraction = numbers[kContraction];
  p.dropout_p = numbers[kDropoutP];
  p.stopped = counts[kStopped], p.kept = counts[kKept], p.implicit = counts[kImplicit] != 0;
  p.banded = counts[kBanded] != 0;
  p.budget = counts[kBudget], p.poisoned = counts[kPoisoned] != 0;
  return p;
}

template <typename T>
std::vector<Job> jobs_of(const Given& given, const Problem<T>& p) {
  return find_jobs(p, pointer<int64_t>(given.tensors[kRowSegment]), pointer<int64_t>(given.tensors[kColSegment]));
}

template <typename T>
const Kernels<T>& kernels_of();
template <>
inline const Kernels<float>& kernels_of() {
  return kernels().f32;
}
template <>
inline const Kernels<double>& kernels_of() {
  return kernels().f64;
}

// Jobs that add to the same entries of the mask's gradient.
template <typename T>
std::vector<int64_t> mask_groups(const std::vector<Job>& jobs, const Problem<T>& p, const Tensor& mask) {
  std::vector<int64_t> groups;
  for (const auto& job : jobs)
    groups.push_back((mask.size(0) == 1 ? 0 : job.batch) * p.heads + (mask.size(1) == 1 ? 0 : job.head));
  return groups;
}

template <typename T>
void set_mask(BackwardResult<T>& result, Tensor& mask) {
  const auto step = [&](int64_t dim) { return mask.size(dim) == 1 ? 0 : mask.stride(dim); };
  result.mask = mask.mutable_data_ptr<T>();
  result.mask_batch = step(0), result.mask_head = step(1), result.mask_row = step(2), result.mask_col = step(3);
}

// In place of `function` where a tensor's bits are to be read with the other sign: torch resolves that by itself for
// single tensors, not for those in a list.
template <auto function>
struct Negated;
template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Negated<function> {
  static Result refuse(Arguments...) {
    throw std::invalid_argument("a tensor has the negative bit; pass x.resolve_neg()");
  }
};

}  // namespace sinkhorn
