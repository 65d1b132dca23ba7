// Selection over rows far longer than a test can attend to.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cuda/device_run.h"
#include "cuda/stages.h"
#include "reference/stages.h"

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
  const std::int32_t sink = 1;

  DeviceMemory device_k(k.bits.size() * 2), device_q(q.bits.size() * 2), device_sink(sizeof sink);
  device_k.upload(k.bits.data());
  device_q.upload(q.bits.data());
  device_sink.upload(&sink);
  const DeviceMemory start(g.rows() * sizeof(std::int64_t)), count(g.rows() * sizeof(std::int32_t)),
      block(g.causal_blocks_per_head() * sizeof(std::int32_t));
  Options options = method("pbs");
  options.scale = 0.125F;
  options.top_p = test.top_p;
  expect_success(cuda::select({.geometry = g,
                               .order_heads = 1,
                               .dtype = DType::bf16,
                               .options = options,
                               .pooled_k = device_k.data(),
                               .pooled_q = device_q.data(),
                               .sink_block = reinterpret_cast<std::int32_t*>(device_sink.data()),
                               .row_start = reinterpret_cast<std::int64_t*>(start.data()),
                               .row_count = reinterpret_cast<std::int32_t*>(count.data()),
                               .block = reinterpret_cast<std::int32_t*>(block.data())},
                              nullptr));
  expect_success(cudaDeviceSynchronize());
  std::vector<std::int64_t> starts(g.rows());
  std::vector<std::int32_t> counts(g.rows()), blocks(g.causal_blocks_per_head());
  start.download(starts.data());
  count.download(counts.data());
  block.download(blocks.data());

  std::vector<std::int32_t> order(g.shape.kv_len);  // token 0 in block `sink`
  std::iota(order.begin(), order.end(), 0);
  std::swap(order[0], order[128]);
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    const auto scores = reference::block_scores(q.matrix[row], k.matrix, g.own_begin(row), 0.125);
    const auto wanted = reference::select_blocks(options, g, row, {scores}, order);
    const std::vector<std::int32_t> got(blocks.begin() + starts[row], blocks.begin() + starts[row] + counts[row]);
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

// Scores that multiply queries by keys work on as many heads, or rows of a head, as there is scratch for.
TEST(CudaSelectParts, GiveTheSameLists) {
  const Geometry g{.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 5900, .kv_len = 6001, .head_dim = 64}};
  Normal normal(3);
  const Pooled q(g.shape.q_heads * g.shape.q_len, 64, 1, normal);
  const Pooled k(g.shape.kv_len, 64, 1, normal);
  const std::int32_t sink = 0;
  DeviceMemory device_q(q.bits.size() * 2), device_k(k.bits.size() * 2), device_sink(sizeof sink);
  device_q.upload(q.bits.data());
  device_k.upload(k.bits.data());
  device_sink.upload(&sink);
  const std::int64_t tiles = g.shape.q_heads * g.rows();
  for (const BlockScore score : {BlockScore::antidiagonal_causal, BlockScore::exact}) {
    const std::size_t whole = cuda::score_scratch_size(score, g, 0);
    std::vector<std::vector<std::int32_t>> lists;
    for (const std::size_t scratch_bytes : {whole, whole / 2, whole / 3}) {
      const DeviceMemory start(tiles * sizeof(std::int64_t)), count(tiles * sizeof(std::int32_t)),
          block(g.shape.q_heads * g.causal_blocks_per_head() * sizeof(std::int32_t)), scratch(scratch_bytes);
      expect_success(cuda::select({.geometry = g,
                                   .order_heads = 1,
                                   .dtype = DType::bf16,
                                   .options = {.score = score, .keep = KeepRule::top_p, .top_p = 0.6F, .scale = 0.2F},
                                   .q = {device_q.data(), DType::bf16, 0, g.shape.q_len * 64, 64},
                                   .k = {device_k.data(), DType::bf16, 0, 0, 64},
                                   .scratch = scratch.data(),
                                   .scratch_bytes = scratch_bytes,
                                   .sink_block = reinterpret_cast<std::int32_t*>(device_sink.data()),
                                   .row_start = reinterpret_cast<std::int64_t*>(start.data()),
                                   .row_count = reinterpret_cast<std::int32_t*>(count.data()),
                                   .block = reinterpret_cast<std::int32_t*>(block.data())},
                                  nullptr));
      expect_success(cudaDeviceSynchronize());
      EXPECT_TRUE(scratch.guards_intact());
      std::vector<std::int32_t> counts(tiles), blocks(block.size() / sizeof(std::int32_t));
      count.download(counts.data());
      block.download(blocks.data());
      EXPECT_GT(std::ranges::min(counts), 0);
      lists.push_back(counts);
      lists.push_back(blocks);
      EXPECT_EQ(lists.end()[-2], lists[0]) << scratch_bytes;
      EXPECT_EQ(lists.end()[-1], lists[1]) << scratch_bytes;
    }
  }
}

}  // namespace
}  // namespace pbsattn::test
