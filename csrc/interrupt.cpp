#include "interrupt.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>

#include <csignal>
#define SINKHORN_HEARS
#endif

namespace sinkhorn {

#ifdef SINKHORN_HEARS
namespace {

template <typename Function>
void look_up(Function*& to, const char* name) {
  to = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

struct Python {
  int (*initialized)();
  int (*ensure)();  // PyGILState_STATE is an enum
  void (*release)(int);
  int (*occurred)();
  int (*set_interrupt)(int);

  Python() {
    look_up(initialized, "Py_IsInitialized");
    look_up(ensure, "PyGILState_Ensure");
    look_up(release, "PyGILState_Release");
    look_up(occurred, "PyOS_InterruptOccurred");
    look_up(set_interrupt, "PyErr_SetInterruptEx");
  }
  bool present() const {
    return initialized && ensure && release && occurred && set_interrupt && initialized() != 0;
  }
};

const Python& python() {
  static const Python found;
  return found;
}

bool is_main_thread() {
#ifdef __linux__
  return syscall(SYS_gettid) == getpid();
#else
  return pthread_main_np() != 0;
#endif
}

}  // namespace

bool hears_interrupts() { return is_main_thread() && python().present(); }

bool interrupt_pending() {
  const int state = python().ensure();
  const bool pending = python().occurred() != 0;  // and forgets it
  if (pending) python().set_interrupt(SIGINT);
  python().release(state);
  return pending;
}
#else
bool hears_interrupts() { return false; }
bool interrupt_pending() { return false; }
#endif

}  // namespace sinkhorn
