// Rows at a prompt's end attend to everything in micro-batches that may be its last.
#include "prompt_ends.h"

#include <gtest/gtest.h>

#include "attention_graph.h"
#include "interface.h"

namespace pbsattn::ggml::test {
namespace {

TEST(PromptEnds, AreNotWhereAnotherOfTheLengthWentBefore) {
  PromptEnds ends;
  EXPECT_TRUE(ends.may_be_last(0, 512, 512)) << "a whole prompt";
  EXPECT_FALSE(ends.may_be_last(0, 512, 1024));
  EXPECT_FALSE(ends.may_be_last(0, 512, 1536));
  EXPECT_TRUE(ends.may_be_last(0, 300, 1836)) << "the rest";
  EXPECT_TRUE(ends.may_be_last(0, 512, 2348)) << "after one of another length";
  EXPECT_TRUE(ends.may_be_last(0, 512, 2900)) << "tokens that were left to ggml lie between";
  EXPECT_FALSE(ends.may_be_last(0, 512, 3412));
  EXPECT_TRUE(ends.may_be_last(0, 512, 512)) << "another prompt";
  EXPECT_TRUE(ends.may_be_last(1, 512, 1024)) << "another layer";
  for (const std::int64_t keys : {512, 1024}) EXPECT_TRUE(ends.may_be_last(-1, 512, keys)) << "which layer isn't known";
}

AttentionGraph micro_batch(std::int64_t queries, std::int64_t offset) {
  return AttentionGraph({.q_heads = 2, .kv_heads = 1, .n_q = queries, .n_kv = 2048, .offset = offset});
}

bool use(std::int32_t dense_last_rows) {
  Config config = default_config();
  EXPECT_EQ(pbsattn_method("two-step:threshold=0.5", &config.options), PBSATTN_OK);
  config.options.dense_last_rows = dense_last_rows;
  config.min_tokens = 257;
  return configure(config);
}

std::vector<float> alone(const AttentionGraph& graph, std::int32_t dense_last_rows) {
  EXPECT_TRUE(use(dense_last_rows)) << ggml_backend_pbsattn_last_error();
  return graph.compute(Backends(true).all()).values;
}

TEST(PromptEnds, KeepTheirDenseRows) {
  const AttentionGraph first = micro_batch(512, 512), next = micro_batch(512, 1024), rest = micro_batch(400, 1536);
  for (const AttentionGraph* graph : {&first, &next, &rest}) ASSERT_NE(alone(*graph, 1), alone(*graph, 0));

  ASSERT_TRUE(use(1)) << ggml_backend_pbsattn_last_error();
  const Backends context(true);
  const std::vector<float> of_first = first.compute(context.all()).values, of_next = next.compute(context.all()).values,
                           of_rest = rest.compute(context.all()).values;
  EXPECT_EQ(of_first, alone(first, 1));
  EXPECT_EQ(of_next, alone(next, 0));
  EXPECT_EQ(of_rest, alone(rest, 1));
}

}  // namespace
}  // namespace pbsattn::ggml::test
