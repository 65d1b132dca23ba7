// Measurements, and the one form in which they are printed and written.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "sampling.h"

namespace bench {

struct Measurement {
  std::string name;       // "dense"
  nlohmann::json params;  // {"n": 8192, "head_dim": 64, "path": "avx512_bf16"}
  std::string metric;     // "rate"
  std::string unit;       // "GFLOP/s"
  double value = 0;
  std::string peer{};  // "" where there is none
  double peer_value = 0;
  double ratio = 0;   // ours against the peer's, above 1 is better for us; 0 where there is none
  Samples samples{};  // what the value is the median of; none where it is no such thing
};

class Report {
 public:
  explicit Report(std::string suite) : suite_(std::move(suite)) {}
  // Prints the measurement's row at once: a long suite shows what it does.
  void add(const Measurement& measurement);
  // Writes all of them to `path`, whole or not at all.
  void write(const std::string& path) const;

 private:
  std::string suite_;
  nlohmann::json records_ = nlohmann::json::array();
};

}  // namespace bench
