// What only the AMX path can get wrong: its schedule with whole units of 128 keys, the strips it does again, and
// the processor state that it borrows from its caller's thread.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "cpu/path.h"
#include "support/hostile.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr const char* path = "amx_bf16";

class Amx : public testing::Test {
 protected:
  void SetUp() override {
    const auto paths = describe_cpu().paths;
    if (std::ranges::find(paths, path) == paths.end())
      GTEST_SKIP() << "this machine and build have no " << path << " path; PBSATTN_EMULATE_AMX=ON builds one";
    forced_.emplace(path);
  }

 private:
  std::optional<ForcedPath> forced_;
};

Problem make(std::int64_t tokens, std::int64_t head_dim, std::int64_t q_heads = 2) {
  return Problem({.shape = {.q_heads = q_heads, .kv_heads = 1, .q_len = tokens, .kv_len = tokens, .head_dim = head_dim},
                  .q = DType::bf16,
                  .k = DType::bf16,
                  .v = DType::bf16});
}

void expect_right_under(const char* name, const Problem& problem, const RunResult& result) {
  SCOPED_TRACE(name);
  EXPECT_EQ(result.path, path);
  expect_right(problem, result, DType::bf16);
}

// Enough blocks that the pipeline runs full, for every number of tiles that a head takes.
TEST_F(Amx, FullPipeline) {
  for (const std::int64_t head_dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
    SCOPED_TRACE(head_dim);
    Problem problem = make(640, head_dim);
    expect_right_under("full", problem, run(method("full"), problem));
  }
}

TEST_F(Amx, HostileInputsInWholeUnits) {
  const Shape shape = make(820, 64).shape;
  for (const HostileCase& hostile : hostile_cases(shape, 128)) {
    SCOPED_TRACE(hostile.name);
    Problem problem = make(820, 64);
    hostile.change(problem);
    expect_right_under("full", problem, run(method("full"), problem));
  }
}

// A strip's scores are measured from the maximum of its first 32 keys. Later ones that are higher by more than
// float32 can hold make it start again.
TEST_F(Amx, MaximaThatGrowLate) {
  for (const double height : {4.0, 40.0, 70.0, 400.0, 1e4}) {
    for (const std::int64_t token : {40, 130, 650}) {
      SCOPED_TRACE(testing::Message() << "score " << height << " at token " << token);
      Problem problem = make(700, 64);
      problem.q.fill(1.0);
      set_row(problem.k, token, height / 8);  // times 64, times the scale of 1/8
      expect_right_under("full", problem, run(method("full"), problem));
      expect_right_under("pbs", problem, run(method("pbs"), problem));
    }
  }
}

TEST_F(Amx, SumsOfHugeValuesOverWeightsAboveOne) {
  Problem problem = make(700, 64);
  problem.q.fill(1.0);
  set_row(problem.k, 600, 4.0);  // weight e^32 against the first keys
  for (std::int64_t token = 0; token < 700; ++token) problem.v.set(0, 0, token, 3, 1e30);
  expect_right_under("full", problem, run(method("full"), problem));
}

// Rounding shows most where weights are few, so there they have 16 bits instead of 8.
TEST_F(Amx, WeightsOfShortRowsAreFine) {
  Problem problem = make(256, 64);
  const RunResult result = run(method("full"), problem);
  const auto error = [&](const Values& values) {
    return distance(values.out, attend_exact(problem, result.options, result.trace).out).root_mean_square;
  };
  EXPECT_LT(error(outputs_of(problem)), 0.1 * error(attend_plain(problem, result.options, result.trace, DType::bf16)));
}

TEST_F(Amx, RowsOfOneUnitFollowOneAnother) {
  for (const std::int64_t tokens : {1, 31, 33, 100}) {
    SCOPED_TRACE(tokens);
    Problem problem = make(tokens, 128, 8);
    expect_right_under("full", problem, run(method("full"), problem, {.device = Device::cpu(1)}));
  }
}

#if defined(__x86_64__) && !defined(PBSATTN_EMULATE_AMX)

struct alignas(64) TileConfig {
  std::array<std::uint8_t, 64> bytes{};
};

TileConfig stored_config() {
  TileConfig config;
  asm volatile("sttilecfg %0" : "=m"(config)::"memory");
  return config;
}

// Libraries remember that they configured a thread's tiles.
TEST_F(Amx, LeavesTheTileConfigurationOfItsThreadAlone) {
  static TileConfig config;
  config.bytes[0] = 1;  // palette
  for (std::size_t tile = 0; tile < 3; ++tile) {
    config.bytes[16 + 2 * tile] = static_cast<std::uint8_t>(4 * (tile + 1));  // bytes of a row
    config.bytes[48 + tile] = static_cast<std::uint8_t>(5 + tile);            // rows
  }
  Problem problem = make(400, 64);
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  run(method("pbs"), problem, {.device = Device::cpu(1)});
  const TileConfig after = stored_config();
  asm volatile("tilerelease" ::: "memory");
  EXPECT_EQ(after.bytes, config.bytes);
  run(method("pbs"), problem, {.device = Device::cpu(1)});
  EXPECT_EQ(stored_config().bytes, TileConfig{}.bytes);
}

#endif

}  // namespace
}  // namespace pbsattn::test
