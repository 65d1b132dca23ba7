// What layers of models carry beside keys and values, against a softmax written here, in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/case.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

// Computes dense causal attention of all heads.
Values attend_plainly(const Problem& p, const Options& options) {
  const Shape& s = p.shape;
  Values values;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.q_heads; ++h)
      for (std::int64_t i = 0; i < s.q_len; ++i) {
        const std::int64_t kv_head = h / (s.q_heads / s.kv_heads);
        double sum = p.sinks.empty() ? 0 : std::exp(static_cast<double>(p.sinks[h]));
        std::vector<double> out(value_dim(s), 0.0);
        for (std::int64_t n = 0; n <= s.kv_len - s.q_len + i; ++n) {
          double logit = 0;
          for (std::int64_t d = 0; d < s.head_dim; ++d) logit += p.q.get(b, h, i, d) * p.k.get(b, kv_head, n, d);
          const double weight = std::exp(logit * static_cast<double>(options.scale));
          sum += weight;
          for (std::int64_t d = 0; d < value_dim(s); ++d) out[d] += weight * p.v.get(b, kv_head, n, d);
        }
        for (const double x : out) values.out.push_back(x / sum);
        values.lse.push_back(std::log(sum));
      }
  return values;
}

void expect_plain(Problem& problem, const Options& options) {
  const RunResult result = run(options, problem, {.device = Device::reference()});
  const Values ours = outputs_of(problem);
  const Values plain = attend_plainly(problem, result.options);
  ASSERT_EQ(ours.out.size(), plain.out.size());
  EXPECT_LT(distance(ours.out, plain.out).largest, 1e-6);  // outputs are float32
  EXPECT_LT(distance(ours.lse, plain.lse).largest, 1e-5);
}

Options small_blocks(float top_p) {
  Options options = pbs(top_p);
  options.block = 8;
  options.segment = 16;
  return options;
}

TEST(Layers, ValuesOfAnotherWidth) {
  for (const std::int64_t width : {1, 5, 24})
    for (const std::int64_t q_len : {41, 70}) {
      Problem problem({.shape = {.batch = 2,
                                 .q_heads = 4,
                                 .kv_heads = 2,
                                 .q_len = q_len,
                                 .kv_len = 70,
                                 .head_dim = 12,
                                 .head_dim_v = width},
                       .layout = TensorLayout::padded});
      expect_plain(problem, small_blocks(1));
    }
}

TEST(Layers, Sinks) {
  for (const std::int64_t q_len : {41, 70}) {
    Problem problem({.shape = {.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = q_len, .kv_len = 70, .head_dim = 12},
                     .sinks = true});
    expect_plain(problem, small_blocks(1));
  }
}

// A sink far above every logit takes all weight, one of -inf none.
TEST(Layers, SinksAtTheirEnds) {
  Problem problem({.shape = {.q_heads = 2, .q_len = 20, .kv_len = 20, .head_dim = 8}});
  run(small_blocks(1), problem, {.device = Device::reference()});
  const Values without = outputs_of(problem);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  problem.sinks = {-infinity, 1e6F};
  run(small_blocks(1), problem, {.device = Device::reference()});
  const Values with = outputs_of(problem);
  for (std::size_t i = 0; i < with.lse.size(); ++i) EXPECT_EQ(with.lse[i], i < 20 ? without.lse[i] : 1e6);
  for (std::size_t i = 0; i < with.out.size(); ++i) EXPECT_EQ(with.out[i], i < 160 ? without.out[i] : 0);
}

}  // namespace
}  // namespace pbsattn::test
