// Which problems there are and who works on them: whole problems go to single threads while there are enough of them and
// their tiles find room; the threads that are left help. Results do not depend on it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "problem.h"

namespace sinkhorn {

// The jobs with at least one active row and column. Segments are given by [N, L] and [N, S] ids that never decrease, or
// null: one problem per batch element and head.
template <typename T>
std::vector<Job> find_jobs(const Problem<T>& problem, const int64_t* row_segment, const int64_t* col_segment);

// What is done with a job of a problem whose `budget` the schedule has set.
template <typename T>
struct Work {
  std::function<int64_t(const Problem<T>&, const Job&, int64_t threads)> bytes;
  std::function<void(const Problem<T>&, const Job&, int64_t index, const Team&, void* workspace)> run;
};

// Runs every job. Jobs of one `group` (one number per job, or none) run one after the other, in order. `problem.budget`
// bounds the plan tiles that all calls of the process keep at a time. Throws std::runtime_error when a signal is pending.
template <typename T>
void run_jobs(const Problem<T>& problem, const std::vector<Job>& jobs, const std::vector<int64_t>& group,
              const Work<T>& work);

int64_t last_workspace();              // bytes that the last call of this process took beside its results
void retain_workspace(int64_t bytes);  // how many of them may be kept for the next call

}  // namespace sinkhorn
