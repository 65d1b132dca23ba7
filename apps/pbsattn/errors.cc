#include "errors.h"

#include <csignal>

#include <fmt/format.h>

namespace app {
namespace {

volatile std::sig_atomic_t signal_seen = 0;

extern "C" void on_signal(int signal) {
  signal_seen = signal;
  std::signal(signal, SIG_DFL);  // the next one ends the process
}

}  // namespace

NobodyReads::NobodyReads() : Failure("", 128 + SIGPIPE) {}

void catch_signals() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  std::signal(SIGPIPE, SIG_IGN);
}

bool interrupted() noexcept {
  return signal_seen != 0;
}

void throw_if_interrupted() {
  if (const int signal = signal_seen; signal != 0)
    throw Failure(fmt::format("{}; nothing was written", signal == SIGINT ? "interrupted" : "terminated"),
                  128 + signal);
}

}  // namespace app
