// The ops that torch_sinkhorn_attn/engines/cpu.py calls: tensors in, checked by checks.h, `Problem` and pointers out.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "capability.h"
#include "checks.h"
#include "schedule.h"

namespace sinkhorn {
namespace {

using at::Tensor;

constexpr int64_t kInterface = 2;  // as INTERFACE in engines/cpu.py: of a library and a package that belong together

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Kind::float64;
    case at::kFloat:
      return Kind::float32;
    case at::kHalf:
      return Kind::float16;
    case at::kBFloat16:
      return Kind::bfloat16;
    case at::kBool:
      return Kind::boolean;
    default:
      TORCH_CHECK(false, "the CPU engine does not read tensors of dtype ", x.scalar_type());
  }
}

// A tensor [N, H, rows, cols] or one that broadcasts to it.
Operand operand(const std::optional<Tensor>& x) {
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

double lowest(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return std::numeric_limits<double>::lowest();
    case at::kHalf:
      return -65504.0;
    case at::kBFloat16:
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
  p.dropout_p = numbers[kDropoutP];
  p.stopped = counts[kStopped], p.kept = counts[kKept], p.implicit = counts[kImplicit] != 0;
  p.banded = counts[kBanded] != 0;
  p.budget = counts[kBudget];
  return p;
}

template <typename T>
std::vector<Job> jobs_of(const Given& given, const Problem<T>& p) {
  return find_jobs(p, pointer<int64_t>(given.tensors[kRowSegment]), pointer<int64_t>(given.tensors[kColSegment]));
}

template <typename T>
const Kernels<T>& kernels_of();
template <>
const Kernels<float>& kernels_of() {
  return kernels().f32;
}
template <>
const Kernels<double>& kernels_of() {
  return kernels().f64;
}

// Largest of `per_job` by batch element and head.
template <typename T>
Tensor by_head(const std::vector<Job>& jobs, const Tensor& per_job, const Problem<T>& p) {
  Tensor found = at::zeros({p.num, p.heads}, per_job.options());
  T* to = found.data_ptr<T>();
  const T* from = per_job.const_data_ptr<T>();
  for (size_t k = 0; k < jobs.size(); ++k) {
    T& most = to[jobs[k].batch * p.heads + jobs[k].head];
    most = std::isnan(from[k]) || from[k] > most ? from[k] : most;
  }
  return found;
}

template <typename T>
void run_forward(const Problem<T>& p, const std::vector<Job>& jobs, const ForwardResult<T>& result) {
  const auto& k = kernels_of<T>();
  run_jobs<T>(p, jobs, {},
              {k.forward_bytes, [&](const Problem<T>& problem, const Job& job, int64_t index, const Team& team,
                                    void* workspace) { k.forward(problem, job, index, result, team, workspace); }});
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Results forward_as(const Given& given, bool residuals) {
  const Problem<T> p = problem_of<T>(given);
  const auto jobs = jobs_of(given, p);
  const auto options = given[kLogRowMass].options();
  const auto none = [&] { return at::zeros({0}, options); };
  const auto count = static_cast<int64_t>(jobs.size());
  Tensor output = given.has(kValue) ? at::zeros({p.num, p.heads, p.length, p.value_features}, options) : none();
  Tensor row = at::zeros({p.kept + 1, p.num, p.heads, p.length + p.bins}, options);
  Tensor col = at::zeros({p.kept + 1, p.num, p.heads, p.size + p.bins}, options);
  Tensor to_bin = p.bins ? at::zeros({p.num, p.heads, p.length}, options) : none();
  Tensor from_bin = p.bins ? at::zeros({p.num, p.heads, p.size}, options) : none();
  Tensor row_residual = residuals ? at::zeros({count}, options) : none(), col_residual = row_residual.clone();
  ForwardResult<T> result;
  result.output = given.has(kValue) ? output.data_ptr<T>() : nullptr;
  result.row_potentials = row.data_ptr<T>(), result.col_potentials = col.data_ptr<T>();
  if (p.bins) result.to_bin = to_bin.data_ptr<T>(), result.from_bin = from_bin.data_ptr<T>();
  if (residuals) result.row_residual = row_residual.data_ptr<T>(), result.col_residual = col_residual.data_ptr<T>();
  run_forward(p, jobs, result);
  if (residuals) row_residual = by_head(jobs, row_residual, p), col_residual = by_head(jobs, col_residual, p);
  return {output, row, col, row_residual, col_residual, to_bin, from_bin};
}

Results cpu_forward(const MaybeTensors& tensors, c10::ArrayRef<double> numbers, c10::ArrayRef<int64_t> counts,
                    bool residuals) {
  const Given given = check_problem(tensors, numbers, counts);
  return given.dtype == at::kDouble ? forward_as<double>(given, residuals)
                                                         : forward_as<float>(given, residuals);
}

using PlanResults = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
PlanResults plan_as(const Given& given) {
  const Problem<T> p = problem_of<T>(given);
  const auto jobs = jobs_of(given, p);
  const auto options = given[kLogRowMass].options();
  const int64_t extra = p.bins > 0;
  Tensor plan = at::zeros({p.num, p.heads, p.length + extra, p.size + extra}, options);
  Tensor corner = at::zeros({p.num, p.heads, p.bins}, options);
  Tensor row = at::zeros({p.kept + 1, p.num, p.heads, p.length + p.bins}, options);
  Tensor col = at::zeros({p.kept + 1, p.num, p.heads, p.size + p.bins}, options);
  ForwardResult<T> result;
  result.plan = plan.data_ptr<T>(), result.corner = corner.data_ptr<T>();
  result.row_potentials = row.data_ptr<T>(), result.col_potentials = col.data_ptr<T>();
  run_forward(p, jobs, result);
  if (extra) plan.select(3, p.size).select(2, p.length).copy_(corner.sum(-1));
  return {plan, row, col};
}

PlanResults cpu_plan(const MaybeTensors& tensors, c10::ArrayRef<double> numbers, c10::ArrayRef<int64_t> counts) {
  const Given given = check_problem(tensors, numbers, counts);
  return given.dtype == at::kDouble ? plan_as<double>(given) : plan_as<float>(given);
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
std::vector<Tensor> backward_as(const Given& given, const BackwardGiven<T>& cotangents, bool mask_grad) {
  mask_grad &= given.has(kMask);
  const Problem<T> p = problem_of<T>(given);
  const auto jobs = jobs_of(given, p);
  const auto options = given[kLogRowMass].options();
  const auto made = [&](bool wanted, c10::IntArrayRef shape) {
    return wanted ? at::zeros(shape, options) : at::zeros({0}, options);
  };
  const bool bins = p.bins > 0;
  Tensor query = made(true, {p.num, p.heads, p.length, p.features}),
         key = made(true, {p.num, p.heads, p.size, p.features});
  Tensor value = made(given.has(kValue), {p.num, p.heads, p.size, p.value_features});
  Tensor mask = mask_grad ? at::zeros(given[kMask].sizes(), options) : made(false, {});
  Tensor row_score = made(bins, {p.num, p.heads, p.length}), col_score = made(bins, {p.num, p.heads, p.size});
  Tensor corner = made(bins, {p.num, p.heads, p.bins});
  Tensor stored = made(given.has(kDustbinValue), {p.num, p.heads, p.bins, p.value_features});
  Tensor dropped = made(true, {p.num, p.heads, (p.kept || p.implicit ? p.length : p.size) + p.bins});
  BackwardResult<T> result;
  result.query = query.data_ptr<T>(), result.key = key.data_ptr<T>(),
  result.value = given.has(kValue) ? value.data_ptr<T>() : nullptr;
  if (mask_grad) {
    const auto step = [&](int64_t dim) { return mask.size(dim) == 1 ? 0 : mask.stride(dim); };
    result.mask = mask.data_ptr<T>();
    result.mask_batch = step(0), result.mask_head = step(1), result.mask_row = step(2), result.mask_col = step(3);
  }
  if (bins) {
    result.row_score = row_score.data_ptr<T>(), result.col_score = col_score.data_ptr<T>();
    result.corner_score = corner.data_ptr<T>();
  }
  if (given.has(kDustbinValue)) result.dustbin_value = stored.data_ptr<T>();
  if (!p.implicit) result.dropped = dropped.data_ptr<T>();
  const auto& k = kernels_of<T>();
  run_jobs<T>(p, jobs, mask_grad ? mask_groups(jobs, p, given[kMask]) : std::vector<int64_t>{},
              {k.backward_bytes,
               [&](const Problem<T>& problem, const Job& job, int64_t, const Team& team, void* workspace) {
                 k.backward(problem, job, cotangents, result, team, workspace);
               }});
  return {query, key, value, mask, row_score, col_score, corner, stored, dropped};
}

// The cotangents of attention (`output` given) or of the plan.
template <typename T>
std::vector<Tensor> backward_of(const Given& given, const Tensor& grad, const std::optional<Tensor>& grad_to_bin,
                                const std::optional<Tensor>& grad_from_bin, const std::optional<Tensor>& output,
                                const Tensor& row, const Tensor& col, bool mask_grad) {
  BackwardGiven<T> cotangents;
  (output.has_value() ? cotangents.grad_output : cotangents.grad_plan) = operand(grad);
  cotangents.output = pointer<T>(output);
  cotangents.row_potentials = pointer<T>(row), cotangents.col_potentials = pointer<T>(col);
  cotangents.grad_to_bin = pointer<T>(grad_to_bin), cotangents.grad_from_bin = pointer<T>(grad_from_bin);
  return backward_as<T>(given, cotangents, mask_grad);
}

std::vector<Tensor> cpu_backward(const Tensor& grad, const std::optional<Tensor>& grad_to_bin,
                                 const std::optional<Tensor>& grad_from_bin, const std::optional<Tensor>& output,
                                 const Tensor& row, const Tensor& col, const MaybeTensors& tensors,
                                 c10::ArrayRef<double> numbers, c10::ArrayRef<int64_t> counts, bool mask_grad) {
  const Given given = check_problem(tensors, numbers, counts);
  check_cotangents(given, grad, grad_to_bin, grad_from_bin, output, row, col);
  const auto run = given.dtype == at::kDouble ? backward_of<double> : backward_of<float>;
  return run(given, grad, grad_to_bin, grad_from_bin, output, row, col, mask_grad);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_sinkhorn_attn, m) {
  m.def(
      "cpu_forward(Tensor?[] tensors, float[] numbers, int[] counts, bool residuals) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_plan(Tensor?[] tensors, float[] numbers, int[] counts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_backward(Tensor grad, Tensor? grad_to_bin, Tensor? grad_from_bin, Tensor? output, "
      "Tensor row_potentials, Tensor col_potentials, Tensor?[] tensors, float[] numbers, int[] counts, "
      "bool mask_grad) -> Tensor[]");
  m.def("cpu_interface() -> int", [] { return kInterface; });
  m.def("cpu_capabilities() -> str[]", capabilities);
  m.def("cpu_capability() -> str", capability);
  m.def("cpu_set_capability(str name) -> ()", set_capability);
  m.def("cpu_last_workspace() -> int", last_workspace);
  m.def("cpu_retain_workspace(int num_bytes) -> ()", [](int64_t num_bytes) {
    check_bytes("num_bytes", num_bytes);
    retain_workspace(num_bytes);
  });
}

TORCH_LIBRARY_IMPL(torch_sinkhorn_attn, CPU, m) {
  m.impl("cpu_forward", cpu_forward);
  m.impl("cpu_plan", cpu_plan);
  m.impl("cpu_backward", cpu_backward);
}

}  // namespace sinkhorn
