// Two-step scores as numbers: lists show little of what blocks that aren't read weigh.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cuda/device_run.h"
#include "cuda/permute/permute.h"
#include "cuda/select/scores/scores.h"
#include "cuda/workspace.h"
#include "reference/definition.h"
#include "support/case.h"

namespace pbsattn::test {
namespace {

struct Numbers {
  std::string name;
  Shape shape;
  float threshold;
  int queries, exact, reach;
};

class CudaTwoStepScores : public testing::TestWithParam<Numbers> {};

TEST_P(CudaTwoStepScores, ScoresAreTheReferences) {
  const auto& [name, shape, threshold, queries, exact, reach] = GetParam();
  Options options = method("two-step");
  options.threshold = threshold;
  options.threshold_tokens = 0;
  options.dense_last_rows = 0;
  options.two_step_queries = queries;
  options.two_step_exact = exact;
  options.two_step_reach = reach;
  options = resolved(options, shape);
  const Geometry g = geometry_of(options, shape);
  ProblemSpec spec = alike(shape);
  spec.grid = 0.125;
  const Problem problem(spec);
  const DeviceProblem device(problem);

  const std::int64_t entries = shape.q_heads * g.causal_blocks_per_head();
  const int part_blocks = cuda::part_blocks_of(options, g, shape.kv_heads);
  const std::size_t scratch_bytes = cuda::score_scratch_size(options, g, shape.kv_heads, 0, part_blocks);
  const DeviceMemory means(shape.kv_heads * g.blocks() * shape.head_dim * 2), sinks(shape.kv_heads * 4),
      scores(entries * sizeof(float)), scratch(scratch_bytes);
  const cuda::Permuted still{.order_heads = shape.kv_heads,
                             .sink_block = reinterpret_cast<std::int32_t*>(sinks.data())};
  const cuda::Pooled pooled{.k = means.data(), .k_blocks = g.blocks(), .own = means.data(), .own_blocks = g.blocks()};
  expect_success(cuda::pool({.geometry = g, .inputs = device.inputs(), .permuted = still, .pooled = pooled}, nullptr));
  expect_success(cuda::score_two_step({.geometry = g,
                                       .options = options,
                                       .inputs = device.inputs(),
                                       .permuted = still,
                                       .pooled = pooled,
                                       .scratch = scratch.data(),
                                       .scratch_bytes = scratch_bytes,
                                       .part_blocks = part_blocks,
                                       .lists = {.block = reinterpret_cast<std::int32_t*>(scores.data())}},
                                      nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(scratch.guards_intact());
  std::vector<float> got(entries);
  scores.download(got.data());

  std::vector<std::int32_t> order(shape.kv_len);
  std::iota(order.begin(), order.end(), 0);
  double farthest = 0;
  std::int64_t read = 0;
  std::int64_t scored = 0;
  std::int64_t at = 0;
  for (std::int64_t h = 0; h < shape.q_heads; ++h) {
    const reference::Head head = reference::load_head(problem.inputs(), g, 0, h);
    const auto scoring = reference::prepare_scores(head, options, g, order);
    for (std::int64_t row = 0; row < g.rows(); at += g.diagonal(row++) + 1) {
      if (g.own_begin(row) == 0) continue;
      const auto wanted = reference::row_scores(head, options, g, row, order, scoring).front();
      for (std::size_t b = 0; b < wanted.size(); ++b) {
        farthest =
            std::max(farthest, std::abs(wanted[b] - static_cast<double>(got[at + static_cast<std::int64_t>(b)])));
        read += static_cast<std::int64_t>(2 * wanted[b] >= static_cast<double>(threshold / static_cast<float>(reach)));
        ++scored;
      }
    }
  }
  std::cout << scored << " scores, of at least " << read << " blocks by their keys, off by " << farthest
            << " at most\n";
  EXPECT_LT(farthest, 2e-5);
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaTwoStepScores,
                         testing::Values(Numbers{"few_read", shape_of(300, 9000, 64), 0.05F, 32, 8, 2},
                                         Numbers{"many_read", shape_of(500, 3000, 64, 4, 1), 0.1F, 32, 8, 8},
                                         Numbers{"none_read", shape_of(300, 5000, 128), 1.0F, 16, 4, 1},
                                         Numbers{"all_read", shape_of(300, 2000, 128, 3, 1), 1e-6F, 20, 3, 8},
                                         Numbers{"two_tiles", shape_of(150, 36'000, 64), 0.02F, 128, 16, 2},
                                         Numbers{"short_rows", shape_of(40, 3000, 64), 0.03F, 32, 8, 2}),
                         [](const auto& test) { return test.param.name; });

// A chunk's few rows are worked in so many parts that they fill the device.
TEST(CudaTwoStep, PartsFillTheDevice) {
  const auto blocks = [](Shape shape) {
    const Options options = resolved(method("two-step"), shape);
    return cuda::part_blocks_of(options, geometry_of(options, shape), shape.kv_heads);
  };
  EXPECT_EQ(blocks(shape_of(131'072, 131'072, 128, 12, 2)), 256);
  EXPECT_EQ(blocks(shape_of(8192, 131'072, 128, 32, 8)), 256);
  EXPECT_EQ(blocks(shape_of(8192, 131'072, 128, 12, 2)), 112);
  EXPECT_EQ(blocks(shape_of(8192, 32'768, 128, 12, 2)), 32);
  EXPECT_EQ(blocks(shape_of(512, 32'768, 128, 12, 2)), 16) << "the least";
}

// By the whole call's heads, not by those of a pass, which alone would be cut finer.
TEST(CudaTwoStep, CapsGiveTheSameBitsOfChunks) {
  const Shape chunk = shape_of(8192, 32'768, 64, 12, 2);
  const Options options = method("two-step");
  const detail::PlanSpec spec{.options = resolved(options, chunk),
                              .geometry = geometry_of(resolved(options, chunk), chunk)};
  const auto part_blocks = [&](const cuda::Extent& pass) {
    return cuda::Layout(spec, true, pass, nullptr).part_blocks;
  };
  EXPECT_EQ(part_blocks({1, 1, 6}), part_blocks({1, 2, 6}));
  Problem problem(alike(chunk));
  const RunResult all = run_on_device(options, problem);
  Problem again(alike(chunk));
  const RunResult capped = run_on_device(options, again, {.cap = all.workspace_size * 3 / 4});
  EXPECT_LT(capped.workspace_size, all.workspace_size);
  EXPECT_EQ(capped.trace.block, all.trace.block);
  EXPECT_EQ(again.out.bytes(), problem.out.bytes());
  EXPECT_EQ(again.lse, problem.lse);
}

}  // namespace
}  // namespace pbsattn::test
