// Measurements: how they are taken, and the one form in which they are printed and written.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace bench {

// What seconds are counted in: those that pass, or those that this process's threads ran. On a machine shared with
// others, one thread's processor time says more than the time that passed.
enum class Clock { wall, processor };

// Seconds of each of `functions`, run in turn: A B A B ..., once unmeasured and then `runs` times, so that
// a machine whose speed drifts drifts for all. Returns one vector of `runs` times for each function.
std::vector<std::vector<double>> interleave(int runs, Clock clock, const std::vector<std::function<void()>>& functions);

double median(std::vector<double> values);
// (max - min) / median
double spread(const std::vector<double>& values);

struct Measurement {
  std::string name;       // "dense"
  nlohmann::json params;  // {"n": 8192, "head_dim": 64, "path": "avx512_bf16"}
  std::string metric;     // "rate"
  std::string unit;       // "GFLOP/s"
  double value = 0;
  std::string peer;  // "" where there is none
  double peer_value = 0;
  double ratio = 0;  // ours against the peer's, above 1 is better for us; 0 where there is none
  int runs = 0;
  double spread = 0;
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
