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

void draw(const std::string& label, double fraction, double seconds) {
  constexpr int width = 30;
  const int filled = static_cast<int>(std::lround(fraction * width));
  const std::string eta =
      fraction > 0.02 ? fmt::format("{:.0f} s left", seconds * (1 - fraction) / fraction) : std::string("...");
  fmt::print(stderr, "\r\033[K{:>16} [{:#<{}}{:.<{}}] {:3.0f} %  {:.0f} s, {}", label, "", filled, "", width - filled,
             100 * fraction, seconds, eta);
  std::fflush(stderr);
}

}  // namespace

Progress::Progress(std::string label, std::function<double()> fraction) {
  if (isatty(STDERR_FILENO) == 0) return;
  thread_ = std::jthread([label = std::move(label), fraction = std::move(fraction)](const std::stop_token& stop) {
    using clock = std::chrono::steady_clock;
    const auto start = clock::now();
    std::mutex mutex;
    std::condition_variable_any tick;
    std::unique_lock lock(mutex);
    while (!stop.stop_requested()) {
      draw(label, fraction(), std::chrono::duration<double>(clock::now() - start).count());
      tick.wait_for(lock, stop, std::chrono::milliseconds(200), [] { return false; });
    }
    fmt::print(stderr, "\r\033[K");
  });
}

Progress::~Progress() = default;

}  // namespace app
