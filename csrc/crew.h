// The threads of one call. Every worker leads tasks (whole problems, one after the other) while there are some; then it
// helps those that are still led: a leader publishes each of its phases, and whoever is awake takes parts of it. Nobody
// waits for a thread that the system is not running unless that thread holds a part, so a busy neighbour costs little.
//
// The number of workers is fixed once, by the caller; slots, leaders and helpers all derive from it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "problem.h"

namespace sinkhorn {

// What leaves a call that has been told to stop.
struct Interrupted {};

class Crew {
 public:
  // `leaders` of the workers may lead tasks, each with `slots(workers)` threads, or alone unless `shared`.
  Crew(int64_t workers, int64_t leaders, bool shared);

  // lead(task, rank, team) for every task, rank < leaders being private to the caller's thread. Throws what a task
  // throws, once all workers have stopped.
  void run(int64_t tasks, const std::function<void(int64_t task, int64_t rank, const Team& team)>& lead);

  // How many threads may work on one problem of a call with so many workers.
  static int64_t slots(int64_t workers);

 private:
  // The phase in progress of one leader. The ticket holds the number of the phase, its parts and the next part that
  // nobody has taken: who takes one by compare-and-swap knows that the phase cannot end before that part has.
  struct Board {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> done{0};
    std::atomic<int64_t> waiting{0};
    void (*body)(void*, int64_t, int64_t) = nullptr;
    void* context = nullptr;

    void open(int64_t parts);
    // A part, and how many its phase has; -1 if none is left.
    int64_t take(int64_t& parts);
  };

  // Workers that help each other.
  struct Group {
    std::atomic<int64_t> sleepers{0};
    std::condition_variable work;
  };

  struct Member : Team {
    Member(Crew& crew, Board& board, Group& group, int64_t slot);
    Crew& crew;
    Board& board;
    Group& group;
    const int64_t slot;
  };

  // Not a std::exception_ptr, whose members ask for a newer libstdc++ than anything else here.
  enum class Stop { no, interrupted, memory, error };

  static void run_phase(const Team& team, int64_t parts, void (*body)(void*, int64_t, int64_t), void* context);
  static void check_stop(const Team& team);

  void work(int64_t worker);
  void lead_tasks(int64_t rank, int64_t slot);
  void help(int64_t group, int64_t slot);
  bool help_once(int64_t group, int64_t slot);
  void do_part(Board& board, int64_t part, int64_t parts, int64_t slot);
  bool any_part(int64_t group) const;
  bool finished() const;
  void stop(Stop why);
  void stop_as_thrown();  // within a handler
  void poll();  // the caller's thread: stops the crew when an interrupt is pending

  // Until ready(): spins briefly, then sleeps.
  template <typename Ready>
  void wait(std::condition_variable& signal, std::atomic<int64_t>& sleepers, const Ready& ready);
  void wake_all();

  const int64_t workers_, leaders_, groups_;
  const bool shared_;
  const std::unique_ptr<Board[]> boards_;  // [leaders]
  const std::unique_ptr<Group[]> crowd_;   // [groups]
  const std::function<void(int64_t, int64_t, const Team&)>* lead_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0}, leading_{0};
  std::atomic<bool> stopped_{false};
  Stop why_ = Stop::no;
  std::string error_;  // what() of an exception that is neither
  std::mutex mutex_;
  std::condition_variable done_;  // for leaders
  std::thread::id caller_;
  std::chrono::steady_clock::time_point next_poll_;
};

}  // namespace sinkhorn
