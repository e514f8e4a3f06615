#include "schedule.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace sinkhorn {
namespace {

// Problems of so many pairs are worked on by all threads together, whatever their number: the tiles of one such problem
// fill a cache, and those of several would drive each other out. Below the first number the threads' meeting costs more
// than it saves; in between they meet where the problems are too few or too unequal to go round.
constexpr int64_t kSharedPairs = 1 << 17, kAlwaysSharedPairs = 1 << 20;

std::atomic<int64_t> last_bytes{0};

// Trims [first, last) to the entries above -inf.
template <typename T>
void trim(const T* log_mass, int64_t& first, int64_t& last) {
  while (first < last && std::isinf(log_mass[first])) ++first;
  while (first < last && std::isinf(log_mass[last - 1])) --last;
}

// Runs body on the parts, each thread taking a run of them.
void run_parts(const Team& team, int64_t parts, void (*body)(void*, int64_t, int64_t), void* context) {
  if (team.threads == 1) {
    for (int64_t part = 0; part < parts; ++part) body(context, part, 0);
    return;
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(context, part, at::get_thread_num());
  });
}

// Memory for one call. The largest of up to `retained_limit` bytes is kept for the next call, since mapping fresh pages
// would cost as much as the work of a narrow band; it holds nothing that anybody needs.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : size(bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (kept().defined() && kept().numel() >= bytes) memory_ = std::exchange(kept(), at::Tensor());
    }
    if (!memory_.defined())
      memory_ = at::empty({bytes}, at::kByte);
    else if (at::globalContext().deterministicAlgorithms() &&
             at::globalContext().deterministicFillUninitializedMemory())
      memory_.fill_(255);  // as torch.empty would be
  }

  ~Workspace() { offer(std::move(memory_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return static_cast<char*>(memory_.data_ptr()); }
  const int64_t size;

  static void set_limit(int64_t bytes) {
    limit() = bytes;
    offer({});
  }

 private:
  static void offer(at::Tensor memory) {
    const std::lock_guard<std::mutex> lock(mutex());
    if (memory.defined() && (!kept().defined() || kept().numel() < memory.numel())) kept() = std::move(memory);
    if (kept().defined() && kept().numel() > limit()) kept().reset();
  }
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static at::Tensor& kept() {
    static auto* memory = new at::Tensor;  // outlives whatever torch takes down at exit
    return *memory;
  }
  static std::atomic<int64_t>& limit() {
    static std::atomic<int64_t> bytes{0};
    return bytes;
  }

  at::Tensor memory_;
};

// Pairs in the support of a job, before its mask.
template <typename T>
int64_t pairs(const Problem<T>& problem, const Job& job) {
  int64_t total = 0;
  const int64_t *low = problem.row_lo + job.batch * problem.length, *high = problem.row_hi + job.batch * problem.length;
  for (int64_t i = job.row0; i < job.row1; ++i) total += high[i] - low[i];
  return total;
}

bool same_shape(const Job& x, const Job& y) {
  return std::tie(x.batch, x.row0, x.row1, x.col0, x.col1) == std::tie(y.batch, y.row0, y.row1, y.col0, y.col1);
}

}  // namespace

int64_t last_workspace() { return last_bytes.load(); }

void retain_workspace(int64_t bytes) { Workspace::set_limit(bytes); }

template <typename T>
std::vector<Job> find_jobs(const Problem<T>& p, const int64_t* row_segment, const int64_t* col_segment) {
  std::vector<Job> jobs;
  for (int64_t n = 0; n < p.num; ++n) {
    const int64_t *rows = row_segment ? row_segment + n * p.length : nullptr,
                  *cols = col_segment ? col_segment + n * p.size : nullptr;
    int64_t row = 0, col = 0;
    while (row < p.length && col < p.size) {
      Job job{n, 0, row, p.length, col, p.size, 0};
      if (rows) {
        job.bin = std::max(rows[row], cols[col]);  // a segment whose tokens are on one side only is inactive
        row = job.row0 = std::lower_bound(rows + row, rows + p.length, job.bin) - rows;
        col = job.col0 = std::lower_bound(cols + col, cols + p.size, job.bin) - cols;
        if (row >= p.length || col >= p.size) break;
        job.row1 = std::upper_bound(rows + row, rows + p.length, job.bin) - rows;
        job.col1 = std::upper_bound(cols + col, cols + p.size, job.bin) - cols;
      }
      row = job.row1;
      col = job.col1;
      for (job.head = 0; job.head < p.heads; ++job.head) {
        Job trimmed = job;
        trim(p.log_row_mass + (n * p.heads + job.head) * p.length, trimmed.row0, trimmed.row1);
        trim(p.log_col_mass + (n * p.heads + job.head) * p.size, trimmed.col0, trimmed.col1);
        if (trimmed.row0 < trimmed.row1 && trimmed.col0 < trimmed.col1) jobs.push_back(trimmed);
      }
    }
  }
  return jobs;
}

template <typename T>
void run_jobs(const Problem<T>& problem, const std::vector<Job>& jobs, const std::vector<int64_t>& group,
              const Work& work) {
  const int64_t count = static_cast<int64_t>(jobs.size());
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::vector<int64_t> cost(count);
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) {
    cost[k] = k && same_shape(jobs[k], jobs[k - 1]) ? cost[k - 1] : pairs(problem, jobs[k]);
    total += cost[k];
  }
  // Alone: one thread per task; a task is the jobs of one group. Shared: all threads on one job after the other.
  std::vector<int64_t> shared;
  std::vector<std::vector<int64_t>> tasks;
  std::unordered_map<int64_t, size_t> by_group;  // the task of each
  for (int64_t k = 0; k < count; ++k) {
    if (threads > 1 && (cost[k] >= kAlwaysSharedPairs || (cost[k] >= kSharedPairs && cost[k] * 2 * threads > total))) {
      shared.push_back(k);
      continue;
    }
    if (group.empty()) {
      tasks.push_back({k});
      continue;
    }
    const auto [found, is_new] = by_group.emplace(group[k], tasks.size());
    if (is_new) tasks.emplace_back();
    tasks[found->second].push_back(k);
  }
  if (!group.empty() && !shared.empty()) {  // sums over a group are taken in the jobs' order, whoever runs them
    tasks.clear();
    shared.resize(count);
    for (int64_t k = 0; k < count; ++k) shared[k] = k;
  }
  const auto most_bytes = [&](const std::vector<int64_t>& which, int64_t team) {
    int64_t most = 0;
    for (size_t k = 0; k < which.size(); ++k)
      if (k == 0 || !same_shape(jobs[which[k]], jobs[which[k - 1]]))
        most = std::max(most, work.bytes(jobs[which[k]], team));
    return most;
  };
  int64_t used = 0;
  if (!shared.empty()) {
    const Team team{threads, run_parts};
    const Workspace workspace(most_bytes(shared, threads));
    used = workspace.size;
    for (const int64_t k : shared) work.run(jobs[k], k, team, workspace.data());
  }
  if (!tasks.empty()) {
    std::vector<int64_t> all;
    for (const auto& task : tasks) all.insert(all.end(), task.begin(), task.end());
    const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(tasks.size()));
    const int64_t bytes = (most_bytes(all, 1) + 4095) / 4096 * 4096;
    const Workspace workspace(bytes * workers);
    used = std::max(used, bytes * workers);
    std::atomic<size_t> next{0};
    const auto serve = [&](int64_t slot) {
      const Team team{1, run_parts};
      char* memory = workspace.data() + slot * bytes;
      for (size_t t = next++; t < tasks.size(); t = next++)
        for (const int64_t k : tasks[t]) work.run(jobs[k], k, team, memory);
    };
    if (workers == 1)
      serve(0);
    else
      at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slot = begin; slot < end; ++slot) serve(slot);
      });
  }
  last_bytes = used;
}

template std::vector<Job> find_jobs(const Problem<float>&, const int64_t*, const int64_t*);
template std::vector<Job> find_jobs(const Problem<double>&, const int64_t*, const int64_t*);
template void run_jobs(const Problem<float>&, const std::vector<Job>&, const std::vector<int64_t>&, const Work&);
template void run_jobs(const Problem<double>&, const std::vector<Job>&, const std::vector<int64_t>&, const Work&);

}  // namespace sinkhorn
