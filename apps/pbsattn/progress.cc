#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <stop_token>
#include <utility>

namespace app {
namespace {

std::string time_left(double fraction, double seconds) {
  return fraction > 0.02 ? fmt::format("{:.0f} s left", seconds * (1 - fraction) / fraction) : std::string("...");
}

std::string bar(const std::string& label, double fraction, double seconds) {
  constexpr int width = 30;
  const int filled = static_cast<int>(std::lround(fraction * width));
  return fmt::format("\r\033[K{:>16} [{:#<{}}{:.<{}}] {:3.0f} %  {:.0f} s, {}", label, "", filled, "", width - filled,
                     100 * fraction, seconds, time_left(fraction, seconds));
}

std::string line(const std::string& label, double fraction, double seconds) {
  return fmt::format("{}: {:.0f} % after {:.0f} s, {}\n", label, 100 * fraction, seconds, time_left(fraction, seconds));
}

}  // namespace

Progress::Progress(std::string label, std::function<double()> fraction, Output output) {
  const bool terminal = isatty(fileno(output.file)) != 0;
  thread_ = std::jthread([=, label = std::move(label), fraction = std::move(fraction)](const std::stop_token& stop) {
    using clock = std::chrono::steady_clock;
    const auto start = clock::now();
    const auto tell = [&](const std::string& text) {  // a stream that can't be written is no reason to end
      std::fputs(text.c_str(), output.file);
      std::fflush(output.file);
    };
    const auto seconds = [&] { return std::chrono::duration<double>(clock::now() - start).count(); };
    std::mutex mutex;
    std::condition_variable_any tick;
    std::unique_lock lock(mutex);
    while (!stop.stop_requested()) {
      if (terminal) tell(bar(label, fraction(), seconds()));
      tick.wait_for(lock, stop, terminal ? std::chrono::milliseconds(200) : output.line_every, [] { return false; });
      if (!terminal && !stop.stop_requested()) tell(line(label, fraction(), seconds()));
    }
    if (terminal) tell("\r\033[K");
  });
}

Progress::~Progress() = default;

}  // namespace app
