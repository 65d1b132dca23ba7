#include "report.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "pbsattn/pbsattn.hpp"

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

}  // namespace

std::vector<std::vector<double>> interleave(int runs, Clock clock,
                                            const std::vector<std::function<void()>>& functions) {
  std::vector<std::vector<double>> seconds(functions.size());
  for (int run = -1; run < runs; ++run) {
    for (std::size_t i = 0; i < functions.size(); ++i) {
      const double start = seconds_on(clock);
      functions[i]();
      if (run >= 0) seconds[i].push_back(seconds_on(clock) - start);
    }
  }
  return seconds;
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double spread(const std::vector<double>& values) {
  const auto [low, high] = std::ranges::minmax(values);
  return (high - low) / median(values);
}

void Report::add(const Measurement& m) {
  const auto info = pbsattn::describe_cpu();
  const bool has_peer = !m.peer.empty();
  records_.push_back({{"suite", suite_},
                      {"case", m.name},
                      {"params", m.params},
                      {"metric", m.metric},
                      {"value", m.value},
                      {"unit", m.unit},
                      {"peer", has_peer ? nlohmann::json(m.peer) : nlohmann::json()},
                      {"peer_value", has_peer ? nlohmann::json(m.peer_value) : nlohmann::json()},
                      {"ratio", has_peer ? nlohmann::json(m.ratio) : nlohmann::json()},
                      {"runs", m.runs},
                      {"spread", m.spread},
                      {"device", info.processor},
                      {"commit", PBSATTN_COMMIT},
                      {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))}});
  std::string params;
  for (const auto& [key, value] : m.params.items())
    params += fmt::format("{}{}={}", params.empty() ? "" : " ", key,
                          value.is_string() ? value.get<std::string>() : value.dump());
  fmt::print("{:<10} {:<62} {:>9.3f} {:<8}", m.name, params, m.value, m.unit);
  if (has_peer) fmt::print("  {:>8.3f} {:<6} {:>6.2f}x", m.peer_value, m.peer, m.ratio);
  fmt::print("  (spread {:.0f} %)\n", 100 * m.spread);
  std::fflush(stdout);
}

void Report::write(const std::string& path) const {
  const std::string partial = path + ".partial";
  std::ofstream file(partial);
  file << records_.dump(2) << '\n';
  file.close();
  if (!file) {
    std::remove(partial.c_str());
    throw std::runtime_error(fmt::format("--json \"{}\": can't be written; name a file in a folder with room", path));
  }
  std::filesystem::rename(partial, path);
}

}  // namespace bench
