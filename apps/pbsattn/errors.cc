#include "errors.h"

#include <csignal>

namespace app {
namespace {

volatile std::sig_atomic_t interrupt_seen = 0;

extern "C" void on_interrupt(int) {
  interrupt_seen = 1;
  std::signal(SIGINT, SIG_DFL);  // the next one ends the process
}

}  // namespace

void catch_interrupt() {
  std::signal(SIGINT, on_interrupt);
}

bool interrupted() noexcept {
  return interrupt_seen != 0;
}

void throw_if_interrupted() {
  if (interrupted()) throw Failure("interrupted; nothing was written", interrupted_by_user);
}

}  // namespace app
