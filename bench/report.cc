#include "report.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "pbsattn/pbsattn.hpp"

namespace bench {

void Report::add(const Measurement& m) {
  const auto info = pbsattn::describe_cpu();
  const bool has_peer = !m.peer.empty();
  const bool sampled = !m.samples.seconds.empty();
  records_.push_back({{"suite", suite_},
                      {"case", m.name},
                      {"params", m.params},
                      {"metric", m.metric},
                      {"value", m.value},
                      {"unit", m.unit},
                      {"peer", has_peer ? nlohmann::json(m.peer) : nlohmann::json()},
                      {"peer_value", has_peer ? nlohmann::json(m.peer_value) : nlohmann::json()},
                      {"ratio", has_peer ? nlohmann::json(m.ratio) : nlohmann::json()},
                      {"runs", m.samples.counted().size()},
                      {"spread", spread(m.samples.counted())},
                      {"undisturbed", sampled ? nlohmann::json(m.samples.undisturbed()) : nlohmann::json()},
                      {"samples", sampled ? nlohmann::json(m.samples.seconds.size()) : nlohmann::json()},
                      {"device", info.processor},
                      {"commit", PBSATTN_COMMIT},
                      {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))}});
  std::string params;
  for (const auto& [key, value] : m.params.items())
    params += fmt::format("{}{}={}", params.empty() ? "" : " ", key,
                          value.is_string() ? value.get<std::string>() : value.dump());
  fmt::print("{:<10} {:<62} {:>9.3f} {:<8}", m.name, params, m.value, m.unit);
  if (has_peer) fmt::print("  {:>8.3f} {:<6} {:>6.2f}x", m.peer_value, m.peer, m.ratio);
  if (sampled)
    fmt::print("  (spread {:.0f} %; {} of {} undisturbed)", 100 * spread(m.samples.counted()), m.samples.undisturbed(),
               m.samples.seconds.size());
  fmt::print("\n");
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
