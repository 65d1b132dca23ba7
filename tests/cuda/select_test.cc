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

}  // namespace
}  // namespace pbsattn::test
