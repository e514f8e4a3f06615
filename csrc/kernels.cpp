// The kernels of one capability; compiled once for each, with CPU_CAPABILITY naming it.
#include "backward.h"
#include "forward.h"
#include "rank.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {
namespace {

void run_nothing(const Team&, int64_t, void (*)(void*, int64_t, int64_t), void*) {}
void never(const Team&) {}

template <typename T, typename Work>
int64_t bytes(const Problem<T>& problem, const Job& job, int64_t threads) {
  Arena arena(nullptr);
  const Team team{threads, run_nothing, never};
  Work work(problem, job, team, arena);
  return arena.used();
}

template <typename T>
int64_t forward_bytes(const Problem<T>& problem, const Job& job, int64_t threads) {
  return bytes<T, Solver<T>>(problem, job, threads);
}

template <typename T>
void forward(const Problem<T>& problem, const Job& job, int64_t index, const ForwardResult<T>& result, const Team& team,
             void* workspace) {
  Arena arena(workspace);
  Solver<T>(problem, job, team, arena).run(index, result);
}

template <typename T>
int64_t backward_bytes(const Problem<T>& problem, const Job& job, int64_t threads) {
  return problem.implicit ? bytes<T, ImplicitAdjoint<T>>(problem, job, threads)
                          : bytes<T, TailAdjoint<T>>(problem, job, threads);
}

template <typename T>
void backward(const Problem<T>& problem, const Job& job, const BackwardGiven<T>& given, const BackwardResult<T>& result,
              const Team& team, void* workspace) {
  Arena arena(workspace);
  if (problem.implicit)
    ImplicitAdjoint<T>(problem, job, team, arena).run(given, result);
  else
    TailAdjoint<T>(problem, job, team, arena).run(given, result);
}

constexpr bool of_features(RankVerb verb) {
  return verb == RankVerb::value_gradient || verb == RankVerb::score_gradients;
}

template <typename T>
int64_t rank_state_bytes(const Problem<T>& problem, const Job& job) {
  Arena state(nullptr), scratch(nullptr);
  RankPlan<T>(RankVerb::pack, problem, job, {1, run_nothing, never}, state, scratch);
  return state.used();
}

template <typename T>
int64_t rank_bytes(RankVerb verb, const Problem<T>& problem, const Job& job, int64_t terms, int64_t threads) {
  Arena state(nullptr), scratch(nullptr);
  const Team team{threads, run_nothing, never};
  if (of_features(verb))
    RankAdjoint<T>(problem, job, team, state, scratch, terms);
  else
    RankPlan<T>(verb, problem, job, team, state, scratch);
  return scratch.used();
}

template <typename T>
void rank(RankVerb verb, const Problem<T>& problem, const Job& job, const RankGiven<T>& given,
          const RankResult<T>& result, const Team& team, void* memory, void* workspace) {
  Arena state(memory), scratch(workspace);
  if (of_features(verb))
    RankAdjoint<T>(problem, job, team, state, scratch, given.terms).run(verb, given, result);
  else
    RankPlan<T>(verb, problem, job, team, state, scratch).run(given, result);
}

template <typename T>
constexpr Kernels<T> kernels{forward_bytes<T>,    forward<T>,    backward_bytes<T>, backward<T>,
                             rank_state_bytes<T>, rank_bytes<T>, rank<T>};

}  // namespace
}  // namespace CPU_CAPABILITY

#define SINKHORN_JOIN(a, b) a##b
#define SINKHORN_NAME(capability) SINKHORN_JOIN(kernels_, capability)
extern const KernelTable SINKHORN_NAME(CPU_CAPABILITY);
const KernelTable SINKHORN_NAME(CPU_CAPABILITY) = {kernels<float>, kernels<double>};

}  // namespace sinkhorn
