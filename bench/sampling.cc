#include "sampling.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

#include "peak.h"

namespace bench {
namespace {

double seconds_on(Clock clock) {
  if (clock == Clock::processor) {
    timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The process's best pace so far is what others are held against.
bool is_quiet(const Pace& now) {
  static double best = now.vectors;
  best = std::min(best, now.vectors);
  constexpr double tolerance = 1.25;
  constexpr double product_cycles = 16;
  return now.vectors <= tolerance * best && now.tiles <= tolerance * product_cycles;
}

#if defined(__linux__)

// The cores that this thread may run on, and those of them that it does run on.
class Cores {
 public:
  explicit Cores(int wanted) : wanted_(static_cast<std::size_t>(wanted)) {
    sched_getaffinity(0, sizeof all_, &all_);
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &all_)) cores_.push_back(core);
    chosen_ = cores_;
    if (chosen_.size() > wanted_) chosen_.resize(wanted_);
    for (const int core : cores_) quiet_on(core);  // so that the first to be judged has something to be held against
    search();
  }
  ~Cores() { pin_process(cores_); }
  Cores(const Cores&) = delete;
  Cores& operator=(const Cores&) = delete;

  // Whether all the chosen ones are undisturbed now.
  bool quiet() {
    bool all = true;
    for (const int core : chosen_) all = quiet_on(core) && all;
    pin(gettid(), chosen_);
    return all;
  }

  // Looks for as many undisturbed cores as are wanted, from the one after the last chosen on. Where there are too few,
  // takes others beside them.
  bool search() {
    std::vector<int> undisturbed;
    std::vector<int> others;
    const auto start = std::ranges::find(cores_, chosen_.back()) - cores_.begin() + 1;
    for (std::size_t i = 0; i < cores_.size() && undisturbed.size() < wanted_; ++i) {
      const int core = cores_[(static_cast<std::size_t>(start) + i) % cores_.size()];
      (quiet_on(core) ? undisturbed : others).push_back(core);
    }
    const bool enough = undisturbed.size() >= wanted_;
    undisturbed.insert(undisturbed.end(), others.begin(), others.end());
    undisturbed.resize(std::min(undisturbed.size(), wanted_));
    chosen_ = std::move(undisturbed);
    pin_process(chosen_);
    return enough;
  }

 private:
  static bool quiet_on(int core) {
    pin(gettid(), {&core, 1});
    return is_quiet(pace());
  }
  static void pin(pid_t thread, std::span<const int> cores) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int core : cores) CPU_SET(core, &set);
    sched_setaffinity(thread, sizeof set, &set);
  }
  // Workers too, whoever started them.
  static void pin_process(std::span<const int> cores) {
    std::error_code none;
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", none))
      pin(static_cast<pid_t>(std::stol(task.path().filename().string())), cores);
    pin(gettid(), cores);
  }

  std::size_t wanted_;
  cpu_set_t all_{};
  std::vector<int> cores_;
  std::vector<int> chosen_;
};

#else

class Cores {
 public:
  explicit Cores(int /*wanted*/) {}
  static bool quiet() { return is_quiet(pace()); }
  static bool search() { return quiet(); }
};

#endif

}  // namespace

int Samples::undisturbed() const {
  return static_cast<int>(std::ranges::count(quiet, true));
}

std::vector<double> Samples::counted(std::span<const double> values) const {
  constexpr int fewest = 3;
  const bool choose = undisturbed() >= fewest;
  std::vector<double> chosen;
  for (std::size_t i = 0; i < values.size(); ++i)
    if (!choose || quiet[i]) chosen.push_back(values[i]);
  return chosen;
}

std::vector<Samples> sample(const Sampling& sampling, const std::vector<std::function<void()>>& functions) {
  std::vector<Samples> taken(functions.size());
  const auto each = [&](auto&& count) {
    return std::ranges::all_of(taken, [&](const Samples& s) { return std::invoke(count, s) >= sampling.runs; });
  };
  Cores cores(sampling.threads);
  for (const auto& function : functions) function();
  const double start = seconds_on(Clock::wall);
  bool quiet = cores.quiet();
  for (std::size_t i = 0;;) {
    const bool each_ran = each([](const Samples& s) { return static_cast<int>(s.seconds.size()); });
    const bool late = seconds_on(Clock::wall) - start > sampling.limit;
    if (each_ran && (late || each(&Samples::undisturbed))) return taken;
    quiet = quiet || cores.search();
    if (!quiet && each_ran) {  // there is something to report: from here only undisturbed samples are worth the time
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      continue;
    }
    const double begin = seconds_on(sampling.clock);
    functions[i]();
    taken[i].seconds.push_back(seconds_on(sampling.clock) - begin);
    const bool before = quiet;
    quiet = cores.quiet();
    taken[i].quiet.push_back(before && quiet);
    i = (i + 1) % functions.size();
  }
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double spread(const std::vector<double>& values) {
  if (values.empty()) return 0;
  const auto [low, high] = std::ranges::minmax(values);
  return (high - low) / median(values);
}

}  // namespace bench
