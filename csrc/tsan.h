// What the thread sanitizer cannot see in an OpenMP runtime that is not instrumented: the fork and the join.
#pragma once

#ifdef __SANITIZE_THREAD__
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace sinkhorn {

inline char fork_and_join;  // stands for them

inline void tsan_acquire() {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&fork_and_join);
#endif
}

inline void tsan_release() {
#ifdef __SANITIZE_THREAD__
  __tsan_release(&fork_and_join);
#endif
}

}  // namespace sinkhorn
