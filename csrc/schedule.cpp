#include "schedule.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "crew.h"
#include "tensor_api.h"

namespace sinkhorn {
namespace {

// Below so many pairs a problem is one thread's: what a meeting of threads costs is more than it saves.
constexpr int64_t kSharedPairs = 1 << 17;

std::atomic<int64_t> last_bytes{0};

// Trims [first, last) to the entries above -inf.
template <typename T>
void trim(const T* log_mass, int64_t& first, int64_t& last) {
  while (first < last && std::isinf(log_mass[first])) ++first;
  while (first < last && std::isinf(log_mass[last - 1])) --last;
}

// A share of the bytes of tiles that all calls of the process may keep at a time, given back at the end of the call.
class TileShare {
 public:
  TileShare(int64_t wanted, int64_t limit) {
    int64_t used = taken().load();
    do bytes = std::clamp<int64_t>(limit - used, 0, wanted);
    while (!taken().compare_exchange_weak(used, used + bytes));
  }
  ~TileShare() { taken() -= bytes; }
  TileShare(const TileShare&) = delete;
  TileShare& operator=(const TileShare&) = delete;

  int64_t bytes;

 private:
  static std::atomic<int64_t>& taken() {
    static std::atomic<int64_t> total{0};
    return total;
  }
};

// Much of it is the system's own pages: malloc would keep what a thread has given back for that thread alone.
constexpr size_t kMuch = 1 << 20;
constexpr std::align_val_t kAlignment{64};
struct Free {
  size_t size = 0;
  void operator()(char* start) const {
    if (size < kMuch)
      ::operator delete(start, kAlignment);
    else
      munmap(start, size);
  }
};
using Memory = std::unique_ptr<char, Free>;

Memory take(size_t size) {
  if (size < kMuch) return Memory(static_cast<char*>(::operator new(size, kAlignment)), Free{size});
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  return Memory(static_cast<char*>(start), Free{size});
}
size_t size_of(const Memory& memory) { return memory ? memory.get_deleter().size : 0; }

// Memory for one call. The largest of up to `retained_limit` bytes is kept for the next call, since mapping fresh pages
// would cost as much as the work of a narrow band; it holds nothing that anybody needs.
class Workspace {
 public:
  Workspace(int64_t bytes, bool poisoned) : size(bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (size_of(kept()) >= static_cast<size_t>(bytes)) memory_ = std::move(kept());
    }
    if (!memory_) memory_ = take(static_cast<size_t>(bytes));
    if (poisoned) std::memset(data(), 255, static_cast<size_t>(bytes));
  }

  ~Workspace() { offer(std::move(memory_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return memory_.get(); }
  const int64_t size;

  static void set_limit(int64_t bytes) {
    limit() = bytes;
    offer({});
  }

 private:
  static void offer(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex());
    if (size_of(kept()) < size_of(memory)) kept() = std::move(memory);
    if (size_of(kept()) > static_cast<size_t>(limit())) kept().reset();
  }
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static Memory& kept() {
    static auto* memory = new Memory;  // outlives whatever is taken down at exit
    return *memory;
  }
  static std::atomic<int64_t>& limit() {
    static std::atomic<int64_t> bytes{0};
    return bytes;
  }

  Memory memory_;
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
void run_jobs(const Problem<T>& given, const std::vector<Job>& jobs, const std::vector<int64_t>& group,
              const Work<T>& work) {
  const auto count = static_cast<int64_t>(jobs.size());
  if (count == 0) return;
  std::vector<std::vector<int64_t>> tasks;         // the jobs of one group
  std::unordered_map<int64_t, size_t> by_group;    // the task of each
  int64_t most_pairs = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (k == 0 || !same_shape(jobs[k], jobs[k - 1])) most_pairs = std::max(most_pairs, pairs(given, jobs[k]));
    if (group.empty()) {
      tasks.push_back({k});
      continue;
    }
    const auto [found, is_new] = by_group.emplace(group[k], tasks.size());
    if (is_new) tasks.emplace_back();
    tasks[found->second].push_back(k);
  }
  const auto most_bytes = [&](const Problem<T>& problem, int64_t threads) {
    int64_t most = 0;
    for (int64_t k = 0; k < count; ++k)
      if (k == 0 || !same_shape(jobs[k], jobs[k - 1])) most = std::max(most, work.bytes(problem, jobs[k], threads));
    return most;
  };
  // One number, taken once: everything below is sized and indexed by it.
  const int64_t threads = num_threads();
  const bool shared = most_pairs >= kSharedPairs;
  const int64_t possible = std::min<int64_t>(threads, static_cast<int64_t>(tasks.size()));  // leaders
  Problem<T> problem = given;
  problem.budget = std::numeric_limits<int64_t>::max();
  int64_t tiles = most_bytes(problem, 1);
  problem.budget = 0;
  tiles -= most_bytes(problem, 1);
  const TileShare share(possible * tiles, given.budget);
  const int64_t leaders = shared && tiles > 0 ? std::clamp<int64_t>(share.bytes / tiles, 1, possible) : possible;
  const int64_t workers = shared ? std::min(threads, leaders * Crew::slots(threads)) : leaders;
  problem.budget = share.bytes / leaders;
  const int64_t bytes = (most_bytes(problem, shared ? Crew::slots(workers) : 1) + 4095) / 4096 * 4096;
  const Workspace workspace(bytes * leaders, given.poisoned);
  last_bytes = workspace.size;
  Crew crew(workers, leaders, shared);
  try {
    crew.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t rank, const Team& team) {
      for (const int64_t k : tasks[task]) work.run(problem, jobs[k], k, team, workspace.data() + rank * bytes);
    });
  } catch (const Interrupted&) {
    throw std::runtime_error("interrupted by a signal");  // as INTERRUPTED in engines/cpu.py
  }
}

template std::vector<Job> find_jobs(const Problem<float>&, const int64_t*, const int64_t*);
template std::vector<Job> find_jobs(const Problem<double>&, const int64_t*, const int64_t*);
template void run_jobs(const Problem<float>&, const std::vector<Job>&, const std::vector<int64_t>&, const Work<float>&);
template void run_jobs(const Problem<double>&, const std::vector<Job>&, const std::vector<int64_t>&, const Work<double>&);

}  // namespace sinkhorn
