#include <gtest/gtest.h>

#include <set>
#include <string>
#include <utility>

#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.hpp"
#include "support/refusal.h"

namespace pbsattn {
namespace {

std::string message_of(std::string_view name) {
  return test::refusal_of([&] { method(name); });
}

TEST(Methods, EveryRowIsFoundByItsNameAndPlans) {
  std::set<std::string_view> names;
  for (const MethodInfo& info : methods()) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name << " twice";
    EXPECT_FALSE(info.summary.empty());
    constexpr std::int64_t long_enough = 65'536;  // for every method's own options, whatever its fallback
    const Shape shape{.q_len = long_enough, .kv_len = long_enough, .head_dim = 64};
    const Plan plan = Plan::create(method(info.name), shape, Device::reference());
    EXPECT_EQ(plan.options().keep, info.options.keep);
  }
}

TEST(Methods, ThePaper) {
  const Options pbs = method("pbs");
  EXPECT_EQ(pbs.permutation, Permutation::last_queries);
  EXPECT_EQ(pbs.score, BlockScore::mean_pool);
  EXPECT_EQ(pbs.keep, KeepRule::top_p);
  EXPECT_EQ(pbs.order_scope, OrderScope::query_head);
  EXPECT_EQ(pbs.rules, Rules::reference_code);
  EXPECT_EQ(pbs.top_p, 0.9F);
  EXPECT_EQ(pbs.block, 128);
  EXPECT_EQ(pbs.segment, 256);
  EXPECT_EQ(pbs.dense_last_rows, 0);
}

TEST(Methods, Threshold) {
  const Options options = method("pbs-threshold");
  EXPECT_EQ(options.permutation, Permutation::last_queries);
  EXPECT_EQ(options.score, BlockScore::per_query);
  EXPECT_EQ(options.keep, KeepRule::threshold);
  EXPECT_EQ(options.dense_last_rows, 1);
  EXPECT_EQ(options.floor_top_p, 0.0F);
}

TEST(Methods, TwoStep) {
  const Options options = method("pbs-two-step");
  EXPECT_EQ(options.permutation, Permutation::last_queries);
  EXPECT_EQ(options.score, BlockScore::two_step);
  EXPECT_EQ(options.keep, KeepRule::threshold);
  EXPECT_EQ(options.threshold_tokens, 128.0F);
  EXPECT_EQ(options.two_step_queries, 16);
  EXPECT_EQ(options.two_step_exact, 4);
  EXPECT_EQ(options.two_step_reach, 4);
  EXPECT_EQ(method("two-step").permutation, Permutation::none);
}

TEST(Methods, OptionsAreSetByName) {
  Options options = method("pbs");
  for (const auto& [name, value] : {std::pair{"keep", "top_k"},
                                    {"score", "per_query"},
                                    {"top_k", "20"},
                                    {"threshold", "1e-3"},
                                    {"correction", "mean"},
                                    {"order_scope", "kv_head"}})
    set_option(options, name, value);
  EXPECT_EQ(options.keep, KeepRule::top_k);
  EXPECT_EQ(options.score, BlockScore::per_query);
  EXPECT_EQ(options.top_k, 20);
  EXPECT_EQ(options.threshold, 1e-3F);
  EXPECT_EQ(options.correction, Correction::mean);
  EXPECT_EQ(options.order_scope, OrderScope::kv_head);

  const auto refusal = [&](std::string_view name, std::string_view value) {
    return test::refusal_of([&] { set_option(options, name, value); });
  };
  EXPECT_NE(refusal("keep", "most").find("keep \"most\": no such value; there are all, top_p"), std::string::npos);
  EXPECT_NE(refusal("top_k", "2.5").find("not a whole number"), std::string::npos);
  EXPECT_NE(refusal("top_p", "much").find("top_p \"much\": not a number"), std::string::npos);
  EXPECT_NE(refusal("top_p", "").find("not a number"), std::string::npos);
  EXPECT_NE(refusal("p", "1").find("\"p\": no such option of a method; there are permutation, "), std::string::npos);
  EXPECT_LT(refusal(std::string(1 << 20, 'x'), std::string(1 << 20, 'x')).size(), 600U) << "what is long is cut";
}

TEST(Methods, EveryEnumeratorHasAName) {
  EXPECT_EQ(name_of(BlockScore::flexible), "flexible");
  EXPECT_EQ(name_of(BlockScore::two_step), "two_step");
  EXPECT_EQ(name_of(KeepRule::coverage), "coverage");
  EXPECT_EQ(name_of(Precision::bf16), "bf16");
  EXPECT_EQ(name_of(static_cast<KeepRule>(200)), "");
}

TEST(Methods, UnknownNamesSuggestTheNearest) {
  EXPECT_EQ(message_of("pbss"), "method \"pbss\": no such method; did you mean \"pbs\"?");
  EXPECT_NE(message_of("ful").find("\"full\"?"), std::string::npos);
  EXPECT_NE(message_of("pbs-unpermutd").find("\"pbs-unpermuted\"?"), std::string::npos);
  EXPECT_NE(message_of("").find("no such method"), std::string::npos);
  EXPECT_LT(message_of(std::string(1 << 20, 'x')).size(), 200U) << "a long name is cut";
}

TEST(Methods, MessagesAreOneLineOfWholeCharacters) {
  EXPECT_NE(message_of("p\nb\x1Bs\x7F").find("method \"p?b?s?\""), std::string::npos);
  std::string umlauts;  // of two bytes each, the first at an odd place
  for (int i = 0; i < 100; ++i) umlauts += "ü";
  EXPECT_NE(message_of("x" + umlauts).find("\"x" + umlauts.substr(0, 62) + "\""), std::string::npos);
  Options options;
  for (const auto& [name, value] : {std::pair{"keep", "to\tp"}, {"top_p", "\v"}, {"to\np", "1"}})
    for (const char c : test::refusal_of([&, name = name, value = value] { set_option(options, name, value); }))
      EXPECT_GE(static_cast<unsigned char>(c), 0x20) << name;
}

}  // namespace
}  // namespace pbsattn
