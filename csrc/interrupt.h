// Ctrl-C during a call. The library knows nothing of Python's ABI: the few functions it needs are looked up in the
// process.
#pragma once

namespace sinkhorn {

// Whether the calling thread is the one that Python handles signals on.
bool hears_interrupts();

// Whether SIGINT has arrived since Python last ran its handler. The signal stays pending: the interpreter runs the
// handler when the call has returned to it. Only where `hears_interrupts()`.
bool interrupt_pending();

}  // namespace sinkhorn
