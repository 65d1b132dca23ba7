// What the backends' judge takes for a near tie, and what it doesn't.
#include "support/judge.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace pbsattn::test {
namespace {

struct Judged {
  Problem problem{{.shape = {.q_heads = 1, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 16}}};
  Options options = [] {
    Options pbs = method("pbs+");
    pbs.block = 32;
    pbs.segment = 64;
    return pbs;
  }();
  RunResult result = run(options, problem, {.device = Device::reference()});
};

TEST(Judge, TakesTheReferencesDecisions) {
  const Judged judged;
  expect_order(judged.problem, judged.result.options, judged.result.trace, {.key_score = 0});
  expect_lists(judged.problem, judged.result.options, judged.result.trace, {.block_score = 0});
}

TEST(Judge, OrderInsideBlocksCounts) {
  Judged judged;
  auto& order = judged.result.trace.order;
  for (std::int64_t slot = 0; slot < 576; slot += 32) std::sort(order.begin() + slot, order.begin() + slot + 32);
  EXPECT_NONFATAL_FAILURE(expect_order(judged.problem, judged.result.options, judged.result.trace, {}), "wrong order");
}

TEST(Judge, EqualKeysStandInTheirOrder) {
  Judged judged;
  judged.problem.k.fill(0.5);
  judged.result = run(judged.options, judged.problem, {.device = Device::reference()});
  expect_order(judged.problem, judged.result.options, judged.result.trace, {});
  std::swap(judged.result.trace.order[70], judged.result.trace.order[71]);
  EXPECT_NONFATAL_FAILURE(expect_order(judged.problem, judged.result.options, judged.result.trace, {}), "same score");
}

TEST(Judge, ListsOfOtherSettingsAreNoTies) {
  Judged judged;
  const Geometry geometry = geometry_of(judged.options, judged.problem.shape);
  const reference::Head head = reference::load_head(judged.problem.inputs(), geometry, 0, 0);
  const auto order = head_order(judged.result.trace, 0, 600);
  for (const KeepRule keep :
       {KeepRule::top_p, KeepRule::threshold, KeepRule::relative, KeepRule::top_k, KeepRule::density}) {
    SCOPED_TRACE(static_cast<int>(keep));
    Options options = judged.result.options;
    options.keep = keep;
    options.threshold = keep == KeepRule::relative ? 0.3F : 0.1F;
    options.top_k = 3;
    options.density = 0.4F;
    const auto scoring = reference::prepare_scores(head, options, geometry, order);
    int swapped = 0;
    for (std::int64_t row = 4; row < geometry.rows(); ++row) {
      const auto scores = reference::row_scores(head, options, geometry, row, order, scoring);
      const auto tie = [&](const std::vector<std::int32_t>& list) {
        return tie_behind(options, geometry, row, scoring, scores, order, list, 1e-4);
      };
      auto list = reference::select_blocks(options, geometry, row, scores, order);
      EXPECT_EQ(tie(list), 0.0);
      // The lowest that is kept gives its place to one that isn't, and then nearly ties with it.
      const auto& one = scores.front();
      const auto token_0 = static_cast<std::int32_t>((std::ranges::find(order, 0) - order.begin()) / geometry.block);
      std::int32_t kept = -1;
      std::int32_t other = -1;
      for (std::int32_t b = 0; b < geometry.own_begin(row); ++b) {
        const bool in = std::ranges::binary_search(list, b);
        if (in && b != token_0 && (kept < 0 || one[b] < one[kept])) kept = b;
        if (!in && (other < 0 || one[b] > one[other])) other = b;
      }
      if (kept < 0 || other < 0) continue;
      ++swapped;
      *std::ranges::find(list, kept) = other;
      std::ranges::sort(list);
      ASSERT_GT(one[kept] - one[other], 2e-4);
      EXPECT_FALSE(tie(list)) << "row " << row;
      if (keep != KeepRule::top_k && keep != KeepRule::density) continue;   // others need not keep either any more
      if (one[token_0] > one[other] && one[token_0] < one[kept]) continue;  // it would be the one that is kept
      auto nearly = scores;
      nearly.front()[kept] = nearly.front()[other] + 5e-5;
      EXPECT_TRUE(tie_behind(options, geometry, row, scoring, nearly, order, list, 1e-4)) << "row " << row;
    }
    EXPECT_GT(swapped, 5);
  }
}

TEST(Judge, TopPThatIsMissedByRoundingIsATie) {
  Judged judged;
  const Geometry geometry = geometry_of(judged.options, judged.problem.shape);
  const reference::Head head = reference::load_head(judged.problem.inputs(), geometry, 0, 0);
  const auto order = head_order(judged.result.trace, 0, 600);
  Options options = judged.result.options;
  const auto scoring = reference::prepare_scores(head, options, geometry, order);
  const std::int64_t row = geometry.rows() - 1;
  const auto scores = reference::row_scores(head, options, geometry, row, order, scoring);
  // At the sum that ends with the heaviest block, a step up takes one block more.
  const double sum = std::ranges::max(scores.front());
  const auto at = [&](double top_p) {
    options.top_p = static_cast<float>(top_p);
    return reference::select_blocks(options, geometry, row, scores, order);
  };
  const auto fewer = at(sum - 1e-5);
  const auto more = at(sum + 1e-5);
  ASSERT_EQ(fewer.size() + 1, more.size());
  options.top_p = static_cast<float>(sum + 1e-5);
  EXPECT_TRUE(tie_behind(options, geometry, row, scoring, scores, order, fewer, 1e-4));
  EXPECT_FALSE(tie_behind(options, geometry, row, scoring, scores, order, fewer, 1e-7));
  options.top_p = static_cast<float>(sum + 0.01);
  EXPECT_FALSE(tie_behind(options, geometry, row, scoring, scores, order, fewer, 1e-4));
}

}  // namespace
}  // namespace pbsattn::test
