// The ops that torch_sinkhorn_attn/engines/cpu.py calls: tensors in, checked by checks.h, `Problem` and pointers out.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "given.h"

namespace sinkhorn {
namespace {

constexpr int64_t kInterface = 6;  // as INTERFACE in engines/cpu.py: of a library and a package that belong together

// Largest of `per_job` by batch element and head.
template <typename T>
Tensor by_head(const std::vector<Job>& jobs, const Tensor& per_job, const Problem<T>& p) {
  Tensor found = zeros({p.num, p.heads}, per_job.scalar_type());
  T* to = found.mutable_data_ptr<T>();
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
  const ScalarType dtype = given.dtype;
  const auto none = [&] { return zeros({0}, dtype); };
  const auto count = static_cast<int64_t>(jobs.size());
  Tensor output = given.has(kValue) ? zeros({p.num, p.heads, p.length, p.value_features}, dtype) : none();
  Tensor row = zeros({p.kept + 1, p.num, p.heads, p.length + p.bins}, dtype);
  Tensor col = zeros({p.kept + 1, p.num, p.heads, p.size + p.bins}, dtype);
  Tensor to_bin = p.bins ? zeros({p.num, p.heads, p.length}, dtype) : none();
  Tensor from_bin = p.bins ? zeros({p.num, p.heads, p.size}, dtype) : none();
  Tensor row_residual = residuals ? zeros({count}, dtype) : none(), col_residual = residuals ? zeros({count}, dtype) : none();
  ForwardResult<T> result;
  result.output = given.has(kValue) ? output.mutable_data_ptr<T>() : nullptr;
  result.row_potentials = row.mutable_data_ptr<T>(), result.col_potentials = col.mutable_data_ptr<T>();
  if (p.bins) result.to_bin = to_bin.mutable_data_ptr<T>(), result.from_bin = from_bin.mutable_data_ptr<T>();
  if (residuals) result.row_residual = row_residual.mutable_data_ptr<T>(), result.col_residual = col_residual.mutable_data_ptr<T>();
  run_forward(p, jobs, result);
  if (residuals) row_residual = by_head(jobs, row_residual, p), col_residual = by_head(jobs, col_residual, p);
  return {output, row, col, row_residual, col_residual, to_bin, from_bin};
}

Results cpu_forward(const MaybeTensors& tensors, Doubles numbers, Integers counts,
                    bool residuals) {
  const Given given = check_problem(tensors, numbers, counts);
  return given.dtype == ScalarType::Double ? forward_as<double>(given, residuals)
                                                         : forward_as<float>(given, residuals);
}

using PlanResults = std::tuple<Tensor, Tensor, Tensor>;

// The plan's last entry of each head: what goes from its dustbins to its dustbins.
template <typename T>
void fill_corners(const ForwardResult<T>& result, const Problem<T>& p) {
  const int64_t entries = (p.length + 1) * (p.size + 1);
  for (int64_t k = 0; k < p.num * p.heads; ++k)
    result.plan[(k + 1) * entries - 1] = std::accumulate(result.corner + k * p.bins, result.corner + (k + 1) * p.bins, T(0));
}

template <typename T>
PlanResults plan_as(const Given& given) {
  const Problem<T> p = problem_of<T>(given);
  const auto jobs = jobs_of(given, p);
  const ScalarType dtype = given.dtype;
  const int64_t extra = p.bins > 0;
  Tensor plan = zeros({p.num, p.heads, p.length + extra, p.size + extra}, dtype);
  Tensor corner = zeros({p.num, p.heads, p.bins}, dtype);
  Tensor row = zeros({p.kept + 1, p.num, p.heads, p.length + p.bins}, dtype);
  Tensor col = zeros({p.kept + 1, p.num, p.heads, p.size + p.bins}, dtype);
  ForwardResult<T> result;
  result.plan = plan.mutable_data_ptr<T>(), result.corner = corner.mutable_data_ptr<T>();
  result.row_potentials = row.mutable_data_ptr<T>(), result.col_potentials = col.mutable_data_ptr<T>();
  run_forward(p, jobs, result);
  if (extra) fill_corners(result, p);
  return {plan, row, col};
}

PlanResults cpu_plan(const MaybeTensors& tensors, Doubles numbers, Integers counts) {
  const Given given = check_problem(tensors, numbers, counts);
  return given.dtype == ScalarType::Double ? plan_as<double>(given) : plan_as<float>(given);
}

using MatchResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
MatchResults matches_as(const Given& given, int64_t partners) {
  Problem<T> p = problem_of<T>(given);
  p.partners = partners;
  p.value = Operand();
  const auto jobs = jobs_of(given, p);
  const ScalarType dtype = given.dtype;
  const auto nobody = [&](int64_t tokens) {
    Tensor index = zeros({p.num, p.heads, tokens, partners}, ScalarType::Long);
    std::fill_n(index.mutable_data_ptr<int64_t>(), p.num * p.heads * tokens * partners, int64_t(-1));
    return index;
  };
  const auto vector = [&](int64_t tokens) { return p.bins ? zeros({p.num, p.heads, tokens}, dtype) : zeros({0}, dtype); };
  Tensor row_index = nobody(p.length), col_index = nobody(p.size);
  Tensor row_mass = zeros({p.num, p.heads, p.length, partners}, dtype);
  Tensor col_mass = zeros({p.num, p.heads, p.size, partners}, dtype);
  Tensor to_bin = vector(p.length), from_bin = vector(p.size);
  Tensor row = zeros({p.kept + 1, p.num, p.heads, p.length + p.bins}, dtype);
  Tensor col = zeros({p.kept + 1, p.num, p.heads, p.size + p.bins}, dtype);
  ForwardResult<T> result;
  result.row_index = row_index.mutable_data_ptr<int64_t>(), result.col_index = col_index.mutable_data_ptr<int64_t>();
  result.row_mass = row_mass.mutable_data_ptr<T>(), result.col_mass = col_mass.mutable_data_ptr<T>();
  result.row_potentials = row.mutable_data_ptr<T>(), result.col_potentials = col.mutable_data_ptr<T>();
  if (p.bins) result.to_bin = to_bin.mutable_data_ptr<T>(), result.from_bin = from_bin.mutable_data_ptr<T>();
  run_forward(p, jobs, result);
  return {row_index, row_mass, col_index, col_mass, to_bin, from_bin};
}

MatchResults cpu_matches(const MaybeTensors& tensors, Doubles numbers, Integers counts, int64_t partners) {
  const Given given = check_problem(tensors, numbers, counts);
  check_partners(partners, kMostPartners);
  return given.dtype == ScalarType::Double ? matches_as<double>(given, partners) : matches_as<float>(given, partners);
}

template <typename T>
std::vector<Tensor> backward_as(const Given& given, const BackwardGiven<T>& cotangents, bool mask_grad) {
  mask_grad &= given.has(kMask);
  const Problem<T> p = problem_of<T>(given);
  const auto jobs = jobs_of(given, p);
  const ScalarType dtype = given.dtype;
  const auto made = [&](bool wanted, Shape shape) {
    return wanted ? zeros(shape, dtype) : zeros({0}, dtype);
  };
  const bool bins = p.bins > 0;
  Tensor query = made(true, {p.num, p.heads, p.length, p.features}),
         key = made(true, {p.num, p.heads, p.size, p.features});
  Tensor value = made(given.has(kValue), {p.num, p.heads, p.size, p.value_features});
  Tensor mask = mask_grad ? zeros(given[kMask].sizes(), dtype) : made(false, {});
  Tensor row_score = made(bins, {p.num, p.heads, p.length}), col_score = made(bins, {p.num, p.heads, p.size});
  Tensor corner = made(bins, {p.num, p.heads, p.bins});
  Tensor stored = made(given.has(kDustbinValue), {p.num, p.heads, p.bins, p.value_features});
  Tensor dropped = made(true, {p.num, p.heads, (p.kept || p.implicit ? p.length : p.size) + p.bins});
  BackwardResult<T> result;
  result.query = query.mutable_data_ptr<T>(), result.key = key.mutable_data_ptr<T>(),
  result.value = given.has(kValue) ? value.mutable_data_ptr<T>() : nullptr;
  if (mask_grad) set_mask(result, mask);
  if (bins) {
    result.row_score = row_score.mutable_data_ptr<T>(), result.col_score = col_score.mutable_data_ptr<T>();
    result.corner_score = corner.mutable_data_ptr<T>();
  }
  if (given.has(kDustbinValue)) result.dustbin_value = stored.mutable_data_ptr<T>();
  if (!p.implicit) result.dropped = dropped.mutable_data_ptr<T>();
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
                                 Doubles numbers, Integers counts, bool mask_grad) {
  const Given given = check_problem(tensors, numbers, counts);
  check_cotangents(given, grad, grad_to_bin, grad_from_bin, output, row, col);
  const auto run = given.dtype == ScalarType::Double ? backward_of<double> : backward_of<float>;
  return run(given, grad, grad_to_bin, grad_from_bin, output, row, col, mask_grad);
}

int64_t cpu_interface() { return kInterface; }

void cpu_retain_workspace(int64_t num_bytes) {
  check_bytes("num_bytes", num_bytes);
  retain_workspace(num_bytes);
}

}  // namespace

SINKHORN_LIBRARY(torch_sinkhorn_attn, m) {
  m.def(
      "cpu_forward(Tensor?[] tensors, float[] numbers, int[] counts, bool residuals) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_plan(Tensor?[] tensors, float[] numbers, int[] counts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_matches(Tensor?[] tensors, float[] numbers, int[] counts, int partners) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_backward(Tensor grad, Tensor? grad_to_bin, Tensor? grad_from_bin, Tensor? output, "
      "Tensor row_potentials, Tensor col_potentials, Tensor?[] tensors, float[] numbers, int[] counts, "
      "bool mask_grad) -> Tensor[]");
  m.def("cpu_interface() -> int");
  m.def("cpu_capabilities() -> str[]");
  m.def("cpu_capability() -> str");
  m.def("cpu_set_capability(str name) -> ()");
  m.def("cpu_last_workspace() -> int");
  m.def("cpu_retain_workspace(int num_bytes) -> ()");
}

SINKHORN_IMPL(torch_sinkhorn_attn, CPU, m) {
  m.impl("cpu_forward", SINKHORN_KERNEL(cpu_forward));
  m.impl("cpu_plan", SINKHORN_KERNEL(cpu_plan));
  m.impl("cpu_matches", SINKHORN_KERNEL(cpu_matches));
  m.impl("cpu_backward", SINKHORN_KERNEL(cpu_backward));
}

SINKHORN_IMPL(torch_sinkhorn_attn, Negative, m) {
  m.impl("cpu_forward", SINKHORN_KERNEL(Negated<cpu_forward>::refuse));
  m.impl("cpu_plan", SINKHORN_KERNEL(Negated<cpu_plan>::refuse));
  m.impl("cpu_matches", SINKHORN_KERNEL(Negated<cpu_matches>::refuse));
  m.impl("cpu_backward", SINKHORN_KERNEL(Negated<cpu_backward>::refuse));
}

SINKHORN_IMPL(torch_sinkhorn_attn, CompositeExplicitAutograd, m) {
  m.impl("cpu_interface", SINKHORN_KERNEL(cpu_interface));
  m.impl("cpu_capabilities", SINKHORN_KERNEL(capabilities));
  m.impl("cpu_capability", SINKHORN_KERNEL(capability));
  m.impl("cpu_set_capability", SINKHORN_KERNEL(set_capability));
  m.impl("cpu_last_workspace", SINKHORN_KERNEL(last_workspace));
  m.impl("cpu_retain_workspace", SINKHORN_KERNEL(cpu_retain_workspace));
}

}  // namespace sinkhorn
