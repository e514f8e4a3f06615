// The ops of engines/cpu_ranks.py: half-steps and passes of one rank of a sharded sequence, rank.h.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "given.h"

namespace sinkhorn {
namespace {

struct Known {
  const char* name;
  RankVerb verb;
  RankNeeds needs;
};

const Known& known(const std::string& name) {
  static const std::vector<Known> verbs{
      {"pack", RankVerb::pack, {{}, false}},
      {"row_lse", RankVerb::row_lse, {{kV}, false}},
      {"col_lse", RankVerb::col_lse, {{kU}, false}},
      {"absorb", RankVerb::absorb, {{kU, kV}, false}},
      {"row_sums", RankVerb::row_sums, {{kU, kV, kY}, false}},
      {"col_sums", RankVerb::col_sums, {{kU, kV, kX}, false}},
      {"sweep", RankVerb::sweep, {{kU, kV, kX, kY}, false}},
      {"values", RankVerb::values, {{kU, kV, kX, kY}, true}},
      {"value_gradient", RankVerb::value_gradient, {{kU, kV, kGrad, kOutput}, true}},
      {"score_gradients", RankVerb::score_gradients, {{kU, kV, kGrad, kOutput, kRowTerms, kColTerms}, true}},
  };
  std::string names;
  for (const auto& found : verbs) {
    if (name == found.name) return found;
    names += (names.empty() ? "" : ", ") + std::string(found.name);
  }
  throw std::invalid_argument("verb is '" + name + "'; one of " + names + " is needed");
}

// Half-steps are of real pairs: no dustbin, no segments of their own, and no schedule.
template <typename T>
Problem<T> pairs_of(const Given& given, Integers first) {
  Problem<T> p = problem_of<T>(given);
  p.stopped = p.kept = 0;
  p.implicit = false;
  p.first_row = first[0], p.first_col = first[1];
  return p;
}

// Where the state of each job begins, and the end of the last.
template <typename T>
std::vector<int64_t> places_of(Problem<T>& p, const std::vector<Job>& jobs) {
  p.budget /= std::max<int64_t>(1, static_cast<int64_t>(jobs.size()));
  std::vector<int64_t> places{0};
  for (const auto& job : jobs) places.push_back(places.back() + kernels_of<T>().rank_state_bytes(p, job));
  return places;
}

constexpr int64_t kAligned = 64;

template <typename T>
int64_t bytes_as(const Given& given) {
  const int64_t zero[2] = {0, 0};
  Problem<T> p = pairs_of<T>(given, zero);
  return places_of(p, jobs_of(given, p)).back() + kAligned;
}

int64_t rank_bytes(const MaybeTensors& tensors, Doubles numbers, Integers counts) {
  const Given given = check_problem(tensors, numbers, counts);
  return given.dtype == ScalarType::Double ? bytes_as<double>(given) : bytes_as<float>(given);
}

template <typename T>
void fill(Tensor& x, T value) {
  std::fill_n(x.mutable_data_ptr<T>(), x.numel(), value);
}

template <typename T>
std::vector<Tensor> rank_as(RankVerb verb, const Given& given, Tensor& state, const std::vector<MaybeTensor>& vectors,
                            Integers first, bool flag) {
  Problem<T> p = pairs_of<T>(given, first);
  const auto jobs = jobs_of(given, p);
  const auto places = places_of(p, jobs);
  check_state(state, places.back() + kAligned);
  const ScalarType dtype = given.dtype;
  const auto made = [&](bool wanted, Shape shape) { return wanted ? zeros(shape, dtype) : zeros({0}, dtype); };
  const bool lse = verb == RankVerb::row_lse || verb == RankVerb::col_lse, values = verb == RankVerb::values,
             scores = verb == RankVerb::score_gradients, mask_grad = scores && flag && given.has(kMask);
  const bool sweep = verb == RankVerb::sweep;
  const bool of_rows = verb == RankVerb::row_lse || verb == RankVerb::row_sums || sweep || values,
             of_cols = verb == RankVerb::col_lse || verb == RankVerb::col_sums || sweep;
  Tensor rows = made(of_rows, {p.num, p.heads, p.length}), cols = made(of_cols, {p.num, p.heads, p.size});
  if (lse) fill(of_rows ? rows : cols, -std::numeric_limits<T>::infinity());
  Tensor output = made(values, {p.num, p.heads, p.length, p.value_features});
  Tensor query = made(scores, {p.num, p.heads, p.length, p.features}),
         key = made(scores, {p.num, p.heads, p.size, p.features});
  Tensor value = made(verb == RankVerb::value_gradient, {p.num, p.heads, p.size, p.value_features});
  Tensor mask = mask_grad ? zeros(given[kMask].sizes(), dtype) : zeros({0}, dtype);

  RankGiven<T> g;
  g.u = pointer<T>(vectors[kU]), g.v = pointer<T>(vectors[kV]);
  g.x = pointer<T>(vectors[kX]), g.y = pointer<T>(vectors[kY]);
  g.scored = flag;
  if (vectors[kGrad]) g.backward.grad_output = operand(vectors[kGrad]);
  g.backward.output = pointer<T>(vectors[kOutput]);
  g.backward.row_potentials = g.u, g.backward.col_potentials = g.v;
  g.row_terms = pointer<T>(vectors[kRowTerms]), g.col_terms = pointer<T>(vectors[kColTerms]);
  if (scores) g.terms = vectors[kRowTerms]->size(3);
  RankResult<T> result;
  if (of_rows) result.rows = rows.mutable_data_ptr<T>();
  if (of_cols) result.cols = cols.mutable_data_ptr<T>();
  if (values) result.output = output.mutable_data_ptr<T>();
  if (scores) result.backward.query = query.mutable_data_ptr<T>(), result.backward.key = key.mutable_data_ptr<T>();
  if (verb == RankVerb::value_gradient) result.backward.value = value.mutable_data_ptr<T>();
  if (mask_grad) set_mask(result.backward, mask);

  char* memory = static_cast<char*>(state.mutable_data_ptr());
  memory += (kAligned - reinterpret_cast<uintptr_t>(memory) % kAligned) % kAligned;
  const auto& k = kernels_of<T>();
  const int64_t budget = p.budget;
  run_jobs<T>(p, jobs, mask_grad ? mask_groups(jobs, p, given[kMask]) : std::vector<int64_t>{},
              {[&](const Problem<T>& shared, const Job& job, int64_t threads) {
                 Problem<T> own = shared;
                 own.budget = budget;  // the tiles are the state's
                 return k.rank_bytes(verb, own, job, g.terms, threads);
               },
               [&](const Problem<T>& shared, const Job& job, int64_t index, const Team& team, void* workspace) {
                 Problem<T> own = shared;
                 own.budget = budget;
                 k.rank(verb, own, job, g, result, team, memory + places[static_cast<size_t>(index)], workspace);
               }});
  if (values) return {output, rows};
  if (scores) return {query, key, mask};
  if (verb == RankVerb::value_gradient) return {value};
  if (sweep) return {rows, cols};
  if (of_rows) return {rows};
  if (of_cols) return {cols};
  return {};
}

std::vector<Tensor> rank(Tensor state, std::string verb, const MaybeTensors& vectors, Integers first, bool flag,
                         const MaybeTensors& tensors, Doubles numbers, Integers counts) {
  const Given given = check_problem(tensors, numbers, counts);
  const Known& wanted = known(verb);
  const auto found = check_rank_call(given, vectors, wanted.needs, first);
  const auto run = given.dtype == ScalarType::Double ? rank_as<double> : rank_as<float>;
  return run(wanted.verb, given, state, found, first, flag);
}

}  // namespace

SINKHORN_LIBRARY(torch_sinkhorn_attn, m) {
  m.def("cpu_rank_bytes(Tensor?[] tensors, float[] numbers, int[] counts) -> int");
  m.def(
      "cpu_rank(Tensor(a!) state, str verb, Tensor?[] vectors, int[] first, bool flag, Tensor?[] tensors, "
      "float[] numbers, int[] counts) -> Tensor[]");
}

SINKHORN_IMPL(torch_sinkhorn_attn, CPU, m) {
  m.impl("cpu_rank_bytes", SINKHORN_KERNEL(rank_bytes));
  m.impl("cpu_rank", SINKHORN_KERNEL(rank));
}

SINKHORN_IMPL(torch_sinkhorn_attn, Negative, m) {
  m.impl("cpu_rank_bytes", SINKHORN_KERNEL(Negated<rank_bytes>::refuse));
  m.impl("cpu_rank", SINKHORN_KERNEL(Negated<rank>::refuse));
}

}  // namespace sinkhorn
