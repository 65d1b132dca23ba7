// Selection over rows far longer than a test can attend to.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <optional>

#include "cuda/device_run.h"
#include "cuda/limits.h"
#include "cuda/select/select.h"
#include "pbsattn/options.hpp"
#include "reference/definition.h"

namespace pbsattn::test {
namespace {

// Pooled tensors of one head; elements exact in bf16.
struct Pooled {
  Pooled(std::int64_t row_count, std::int64_t head_dim, double spread, Normal& normal) : matrix(row_count, head_dim) {
    for (double& x : matrix.values) {
      x = std::round(normal() * 64 * spread) / 64;
      const auto f = static_cast<float>(x);
      bits.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(f) >> 16));
      x = std::bit_cast<float>(std::uint32_t{bits.back()} << 16);
    }
  }
  reference::Matrix matrix;
  std::vector<std::uint16_t> bits;
};

// Every tile's list, as select() leaves it.
struct Lists {
  std::vector<std::int64_t> start;
  std::vector<std::int32_t> count, block;
};

// Runs select() for keys of one order, whose token 0 is in block `sink`.
Lists run_select(cuda::SelectArgs args, std::int32_t sink) {
  const Geometry& g = args.geometry;
  const std::int64_t tiles = g.shape.q_heads * g.rows();
  Lists lists{.start = std::vector<std::int64_t>(tiles),
              .count = std::vector<std::int32_t>(tiles),
              .block = std::vector<std::int32_t>(g.shape.q_heads * g.causal_blocks_per_head())};
  const auto bytes = [](const auto& values) { return values.size() * sizeof(values[0]); };
  const DeviceMemory start(bytes(lists.start)), count(bytes(lists.count)), block(bytes(lists.block));
  DeviceMemory device_sink(sizeof sink);
  device_sink.upload(&sink);
  args.permuted.order_heads = 1;
  args.permuted.sink_block = reinterpret_cast<std::int32_t*>(device_sink.data());
  args.lists = {.row_start = reinterpret_cast<std::int64_t*>(start.data()),
                .row_count = reinterpret_cast<std::int32_t*>(count.data()),
                .block = reinterpret_cast<std::int32_t*>(block.data())};
  expect_success(cuda::select(args, nullptr));
  expect_success(cudaDeviceSynchronize());
  for (const DeviceMemory* memory : {&start, &count, &block}) EXPECT_TRUE(memory->guards_intact());
  start.download(lists.start.data());
  count.download(lists.count.data());
  block.download(lists.block.data());
  return lists;
}

struct LongRows {
  std::string name;
  std::int64_t kv_len, q_len;
  double spread;
  float top_p;
};

class CudaSelect : public testing::TestWithParam<LongRows> {};

TEST_P(CudaSelect, ListsAreTheReferences) {
  const LongRows& test = GetParam();
  const Geometry g{.shape = {.q_len = test.q_len, .kv_len = test.kv_len, .head_dim = 64}, .block = 128, .segment = 256};
  Normal normal(7);
  const Pooled k(cuda::permuted_blocks(g), 64, test.spread, normal);
  const Pooled q(g.rows(), 64, test.spread, normal);
  DeviceMemory device_k(k.bits.size() * 2), device_q(q.bits.size() * 2);
  device_k.upload(k.bits.data());
  device_q.upload(q.bits.data());
  Options options = method("pbs");
  options.scale = 0.125F;
  options.top_p = test.top_p;
  const Lists lists =
      run_select({.geometry = g,
                  .options = options,
                  .inputs = {.q = {.data = nullptr, .dtype = DType::bf16}, .k = {}, .v = {}},
                  .pooled = {.q = device_q.data(), .k = device_k.data(), .k_blocks = cuda::permuted_blocks(g)}},
                 1);

  std::vector<std::int32_t> order(g.shape.kv_len);  // token 0 in block 1
  std::iota(order.begin(), order.end(), 0);
  std::swap(order[0], order[128]);
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    const auto scores = reference::block_scores(q.matrix[row], k.matrix, g.own_begin(row), reference::Logits(0.125));
    const auto wanted = reference::select_blocks(options, g, row, {scores}, order);
    const auto first = lists.block.begin() + lists.start[row];
    const std::vector<std::int32_t> got(first, first + lists.count[row]);
    // Rounding may move the last block or two of thousands in or out.
    std::vector<std::int32_t> differing;
    std::ranges::set_symmetric_difference(got, wanted, std::back_inserter(differing));
    double mass = 0;
    for (const std::int32_t b : differing) mass += scores[b];
    EXPECT_LE(mass, 1e-4) << "row " << row << ": " << differing.size() << " of " << wanted.size();
    EXPECT_LE(differing.size(), 2 + wanted.size() / 500);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Lengths, CudaSelect,
    testing::Values(LongRows{"n128k", 131'072, 2000, 1.0, 0.9F}, LongRows{"n128k_peaked", 131'072, 2000, 3.0, 0.9F},
                    LongRows{"n128k_flat", 131'072, 2000, 0.05, 0.5F}, LongRows{"n1m", 1 << 20, 700, 1.0, 0.9F},
                    LongRows{"n1m_all_equal", 1 << 20, 300, 0.0, 0.37F}, LongRows{"n3m", 3 << 20, 100, 1.0, 0.99F}),
    [](const auto& test) { return test.param.name; });

class CudaSelectParts : public testing::TestWithParam<BlockScore> {};

// Scores that multiply queries by keys work on as many heads, or rows of a head, as there is scratch for. A third of
// what all take at once is room for the fewest rows of every score.
TEST_P(CudaSelectParts, GiveTheSameLists) {
  const Geometry g{.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 23'900, .kv_len = 24'001, .head_dim = 64}};
  Normal normal(3);
  const Pooled q(g.shape.q_heads * g.shape.q_len, 64, 1, normal);
  const Pooled k(g.shape.kv_len, 64, 1, normal);
  const Pooled means(g.blocks(), 64, 1, normal);
  DeviceMemory device_q(q.bits.size() * 2), device_k(k.bits.size() * 2), device_means(means.bits.size() * 2);
  device_q.upload(q.bits.data());
  device_k.upload(k.bits.data());
  device_means.upload(means.bits.data());
  Options options{.score = GetParam(), .keep = KeepRule::top_p, .top_p = 0.6F, .scale = 0.2F};
  if (options.score == BlockScore::two_step) {
    options.keep = KeepRule::threshold;
    options.threshold = 0.04F;
  }
  const int part_blocks = cuda::part_blocks_of(options, g, g.shape.kv_heads);
  const std::size_t whole = cuda::score_scratch_size(options, g, g.shape.kv_heads, 0, part_blocks);
  std::optional<Lists> of_whole;
  for (const std::size_t scratch_bytes : {whole, whole / 2, whole / 3}) {
    SCOPED_TRACE(scratch_bytes);
    const DeviceMemory scratch(scratch_bytes);
    const Lists lists = run_select({.geometry = g,
                                    .options = options,
                                    .inputs = {.q = {device_q.data(), DType::bf16, 0, g.shape.q_len * 64, 64},
                                               .k = {device_k.data(), DType::bf16, 0, 0, 64},
                                               .v = {}},
                                    .pooled = {.k = device_means.data(),
                                               .k_blocks = g.blocks(),
                                               .own = device_means.data(),
                                               .own_blocks = g.blocks()},
                                    .scratch = scratch.data(),
                                    .scratch_bytes = scratch_bytes,
                                    .part_blocks = part_blocks},
                                   0);
    EXPECT_TRUE(scratch.guards_intact());
    EXPECT_GT(std::ranges::min(lists.count), 0);
    EXPECT_LT(lists.count.back(), g.blocks()) << "it chooses";
    if (!of_whole) of_whole = lists;
    EXPECT_EQ(lists.count, of_whole->count);
    EXPECT_EQ(lists.block, of_whole->block);
  }
}

INSTANTIATE_TEST_SUITE_P(Scores, CudaSelectParts,
                         testing::Values(BlockScore::antidiagonal_causal, BlockScore::exact, BlockScore::two_step),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace pbsattn::test
