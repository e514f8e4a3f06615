#include "crew.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "interrupt.h"
#include "tensor_api.h"
#include "tsan.h"

namespace sinkhorn {
namespace {

constexpr int64_t kMaxTeam = 8;  // as kMaxParts in head.h: more threads would find no part of a problem left
constexpr auto kSpin = std::chrono::microseconds(50), kPollEvery = std::chrono::microseconds(100000);

// A ticket: 32 bits number of the phase, 16 bits parts, 16 bits next part.
constexpr uint64_t kNextMask = 0xffff;
int64_t next_of(uint64_t ticket) { return static_cast<int64_t>(ticket & kNextMask); }
int64_t parts_of(uint64_t ticket) { return static_cast<int64_t>(ticket >> 16 & kNextMask); }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Crew::Board::open(int64_t parts) {
  const uint64_t number = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
  done.store(0, std::memory_order_relaxed);
  ticket.store(number << 32 | static_cast<uint64_t>(parts) << 16);
}

int64_t Crew::Board::take(int64_t& parts) {
  uint64_t found = ticket.load();
  while (next_of(found) < parts_of(found))
    if (ticket.compare_exchange_weak(found, found + 1)) {
      parts = parts_of(found);
      return next_of(found);
    }
  return -1;
}

Crew::Member::Member(Crew& crew, Board& board, Group& group, int64_t slot)
    : Team{crew.shared_ ? slots(crew.workers_) : 1, run_phase, check_stop},
      crew(crew),
      board(board),
      group(group),
      slot(crew.shared_ ? slot : 0) {}

int64_t Crew::slots(int64_t workers) { return std::min(workers, kMaxTeam); }

// The leaders are spread over the groups.
Crew::Crew(int64_t workers, int64_t leaders, bool shared)
    : workers_(workers),
      leaders_(leaders),
      groups_((workers + kMaxTeam - 1) / kMaxTeam),
      shared_(shared && workers > 1),
      boards_(new Board[static_cast<size_t>(leaders)]),
      crowd_(new Group[static_cast<size_t>(groups_)]) {}

void Crew::run(int64_t tasks, const std::function<void(int64_t, int64_t, const Team&)>& lead) {
  lead_ = &lead;
  tasks_ = tasks;
  caller_ = std::this_thread::get_id();
  next_poll_ = std::chrono::steady_clock::now() + kPollEvery;
  if (workers_ == 1) {
    work(0);
  } else {
    // However many threads there turn out to be (one, where the caller is a thread of a team itself): worker 0 is there,
    // and nobody waits for the others.
    const auto serve = [this](int64_t worker, int64_t) {
      tsan_acquire();
      work(worker);
      tsan_release();
    };
    tsan_release();
    parallel_for(workers_, serve);
    tsan_acquire();
  }
  if (why_ == Stop::interrupted) throw Interrupted{};
  if (why_ == Stop::memory) throw std::bad_alloc();
  if (why_ == Stop::error) throw std::runtime_error(error_);
}

void Crew::work(int64_t worker) {
  const int64_t group = worker / kMaxTeam, slot = worker % kMaxTeam, rank = slot * groups_ + group;
  if (rank < leaders_) lead_tasks(rank, slot);
  if (shared_) help(group, slot);
}

void Crew::lead_tasks(int64_t rank, int64_t slot) {
  const Member team(*this, boards_[rank], crowd_[rank % groups_], slot);
  ++leading_;  // before the task is taken: who sees none left sees who still works
  try {
    for (int64_t task = next_++; task < tasks_ && !stopped_; task = next_++) (*lead_)(task, rank, team);
  } catch (...) {
    stop_as_thrown();
  }
  if (--leading_ == 0) wake_all();
}

void Crew::help(int64_t group, int64_t slot) {
  while (!finished())
    if (!help_once(group, slot)) 
      wait(crowd_[group].work, crowd_[group].sleepers, [&] { return any_part(group) || finished(); });
}

bool Crew::help_once(int64_t group, int64_t slot) {
  for (int64_t rank = group; rank < leaders_; rank += groups_) {
    int64_t parts = 0;
    const int64_t part = boards_[rank].take(parts);
    if (part < 0) continue;
    do_part(boards_[rank], part, parts, slot);
    return true;
  }
  return false;
}

bool Crew::any_part(int64_t group) const {
  for (int64_t rank = group; rank < leaders_; rank += groups_) {
    const uint64_t ticket = boards_[rank].ticket.load();
    if (next_of(ticket) < parts_of(ticket)) return true;
  }
  return false;
}

bool Crew::finished() const { return (next_ >= tasks_ || stopped_) && leading_ == 0; }

void Crew::do_part(Board& board, int64_t part, int64_t parts, int64_t slot) {
  try {
    if (!stopped_) board.body(board.context, part, slot);
  } catch (...) {
    stop_as_thrown();
  }
  if (board.done.fetch_add(1) + 1 == parts && board.waiting > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }
    done_.notify_all();
  }
}

// The leader's side of a phase: it leaves when every part is done, whoever did it.
void Crew::run_phase(const Team& team, int64_t parts, void (*body)(void*, int64_t, int64_t), void* context) {
  const auto& member = static_cast<const Member&>(team);
  Crew& crew = member.crew;
  Board& board = member.board;
  if (parts == 1 || !crew.shared_ || parts > static_cast<int64_t>(kNextMask)) {
    for (int64_t part = 0; part < parts; ++part) body(context, part, member.slot);
    return;
  }
  board.body = body;
  board.context = context;
  board.open(parts);
  if (const int64_t asleep = std::min<int64_t>(member.group.sleepers, parts - 1); asleep > 0) {
    { const std::lock_guard<std::mutex> lock(crew.mutex_); }
    for (int64_t k = 0; k < asleep; ++k) member.group.work.notify_one();
  }
  int64_t all = 0;
  for (int64_t part = board.take(all); part >= 0; part = board.take(all)) crew.do_part(board, part, all, member.slot);
  crew.wait(crew.done_, board.waiting, [&] { return board.done == parts; });
  if (crew.stopped_) throw Interrupted{};
}

void Crew::check_stop(const Team& team) {
  const auto& member = static_cast<const Member&>(team);
  if (std::this_thread::get_id() == member.crew.caller_) member.crew.poll();
  if (member.crew.stopped_) throw Interrupted{};
}

void Crew::poll() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_poll_) return;
  next_poll_ = now + kPollEvery;
  if (hears_interrupts() && interrupt_pending()) stop(Stop::interrupted);
}

void Crew::stop(Stop why) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (why_ == Stop::no) why_ = why;
    stopped_ = true;
  }
  wake_all();
}

void Crew::stop_as_thrown() {
  try {
    throw;
  } catch (const Interrupted&) {
    stop(Stop::interrupted);
  } catch (const std::bad_alloc&) {
    stop(Stop::memory);
  } catch (const std::exception& error) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (error_.empty()) error_ = error.what();
    }
    stop(Stop::error);
  }
}

void Crew::wake_all() {
  { const std::lock_guard<std::mutex> lock(mutex_); }
  for (int64_t group = 0; group < groups_; ++group) crowd_[group].work.notify_all();
}

template <typename Ready>
void Crew::wait(std::condition_variable& signal, std::atomic<int64_t>& sleepers, const Ready& ready) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int k = 0; k < 16; ++k) {
      if (ready()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  const bool polls = hears_interrupts();
  while (!ready()) {
    if (polls) poll();
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers;
    if (polls)
      signal.wait_for(lock, kPollEvery, ready);
    else
      signal.wait(lock, ready);
    --sleepers;
  }
}

}  // namespace sinkhorn
