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
        const std::int64_t token = s.kv_len - s.q_len + i;
        for (std::int64_t n = std::max<std::int64_t>(0, token - options.window + 1); n <= token; ++n) {
          double logit = 0;
          for (std::int64_t d = 0; d < s.head_dim; ++d) logit += p.q.get(b, h, i, d) * p.k.get(b, kv_head, n, d);
          logit *= static_cast<double>(options.scale);
          const auto cap = static_cast<double>(options.softcap);
          const double weight = std::exp(cap == 0 ? logit : cap * std::tanh(logit / cap));
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

TEST(Layers, CappedLogits) {
  for (const float cap : {0.5F, 4.0F, 1000.0F})
    for (const std::int64_t q_len : {41, 70}) {
      Problem problem({.shape = {.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = q_len, .kv_len = 70, .head_dim = 12},
                       .sinks = true});
      Options options = small_blocks(1);
      options.softcap = cap;
      expect_plain(problem, options);
    }
}

// Windows smaller than a block, of one, than a segment, of some, and of the sequence less one; all of the method's
// choices are without effect.
TEST(Layers, Windows) {
  for (const int window : {1, 2, 7, 8, 9, 15, 17, 40, 69, 70, 1000})
    for (const std::int64_t q_len : {1, 41, 70}) {
      SCOPED_TRACE(testing::Message() << "window " << window << ", q_len " << q_len);
      Problem problem({.shape = {.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = q_len, .kv_len = 70, .head_dim = 12},
                       .sinks = true});
      Options options = small_blocks(window < 70 ? 0.5F : 1);
      options.window = window;
      options.correction = Correction::mean;
      options.sink_blocks = 2;
      options.local_blocks = 3;
      expect_plain(problem, options);
    }
}

TEST(Layers, AWindowIsAllThatItsPlanComputes) {
  const Shape shape{.q_heads = 4, .kv_heads = 2, .q_len = 70, .kv_len = 70, .head_dim = 12};
  Problem problem({.shape = shape});
  std::vector<Options> heads(4, small_blocks(0.5F));
  for (Options& head : heads) head.window = 12;
  heads[2].sink_blocks = 3;
  const RunResult result = run(heads, problem, {.device = Device::reference()});
  EXPECT_EQ(result.options.permutation, Permutation::none);
  EXPECT_EQ(result.options.keep, KeepRule::all);
  EXPECT_EQ(result.options.window, 12);
  for (std::int64_t head = 0; head < 4; ++head) {
    EXPECT_EQ(row_list(result.trace, head, 0), (std::vector<std::int32_t>{0}));
    EXPECT_EQ(row_list(result.trace, head, 2), (std::vector<std::int32_t>{0, 1, 2}));  // token 16 sees 5 .. 16
    EXPECT_EQ(row_list(result.trace, head, 8), (std::vector<std::int32_t>{6, 7, 8}));
  }
  for (Options& head : heads) head.window = 70;  // hides nothing
  EXPECT_EQ(run(heads, problem, {.device = Device::reference()}).options.keep, KeepRule::top_p);
}

// A sink far above every logit takes all weight, one of -inf none. Finite ones have an end, which backends share.
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
  problem.sinks = {std::numeric_limits<float>::lowest(), std::numeric_limits<float>::max()};
  for (const Device& device : {Device::reference(), Device::cpu(1)}) {
    run(pbs(1), problem, {.device = device});
    const Values ends = outputs_of(problem);
    for (std::size_t i = 0; i < 20; ++i) EXPECT_NEAR(ends.lse[i], without.lse[i], 1e-5) << i;
    for (std::size_t i = 20; i < 40; ++i) EXPECT_NEAR(ends.lse[i], 2.3e38, 1e32) << i;
  }
}

}  // namespace
}  // namespace pbsattn::test
