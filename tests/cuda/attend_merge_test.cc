// Merging two parts of an attention.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cuda/attend/attend.h"
#include "cuda/device_run.h"
#include "reference/numbers.h"

namespace pbsattn::test {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t batch = 2, heads = 3, tokens = 41;
constexpr std::int64_t rows = batch * heads * tokens;

// A part's outputs, contiguous [batch][heads][tokens][head_dim], here (as so many rows) and on the device.
struct Part {
  Part(DType dtype, std::int64_t head_dim, std::uint64_t seed)
      : out(dtype, Layout::bhsd, 1, 1, rows, head_dim),
        device_out(out.bytes().size()),
        device_lse(rows * sizeof(float)) {
    Normal normal(seed);
    for (std::int64_t row = 0; row < rows; ++row) {
      lse.push_back(static_cast<float>(normal() * 3));
      for (std::int64_t d = 0; d < head_dim; ++d) out.set(0, 0, row, d, normal());
    }
  }
  void upload() {
    device_out.upload(out.bytes().data());
    device_lse.upload(lse.data());
  }
  View view() const {
    const std::int64_t head = tokens * out.head_dim;
    return {device_out.data(), out.dtype, heads * head, head, out.head_dim};
  }
  cuda::Partial partial() const { return {view(), device_sums()}; }
  float* device_sums() const { return reinterpret_cast<float*>(device_lse.data()); }

  Tensor out;
  std::vector<float> lse;
  DeviceMemory device_out, device_lse;
};

double value(const Part& part, std::int64_t row, std::int64_t d) {
  return part.out.get(0, 0, row, d);
}

void expect_merged(const Part& a, const Part& b, const Part& merged) {
  std::vector<std::byte> bytes(merged.out.bytes().size());
  std::vector<float> lse(rows);
  merged.device_out.download(bytes.data());
  merged.device_lse.download(lse.data());
  const double rounding = merged.out.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  for (std::int64_t row = 0; row < rows; ++row) {
    const double weight_a = std::exp(double{a.lse[row]});
    const double weight_b = std::exp(double{b.lse[row]});
    const double sum = weight_a + weight_b;
    if (sum == 0) {
      EXPECT_EQ(lse[row], -infinity);
    } else {
      EXPECT_NEAR(lse[row], std::log(sum), 1e-5) << "row " << row;
    }
    for (std::int64_t d = 0; d < merged.out.head_dim; ++d) {
      const double part_a = weight_a == 0 ? 0 : weight_a / sum * value(a, row, d);
      const double part_b = weight_b == 0 ? 0 : weight_b / sum * value(b, row, d);
      const double out = reference::load(merged.out.dtype, bytes.data(), row * merged.out.head_dim + d);
      ASSERT_NEAR(out, part_a + part_b, rounding * std::abs(part_a + part_b) + 1e-6) << "row " << row << " d " << d;
    }
  }
}

cudaError_t merge(const Part& a, const Part& b, const Part& into) {
  return cuda::merge(a.partial(), b.partial(), into.view(), into.device_sums(), batch, heads, tokens, a.out.head_dim,
                     nullptr);
}

class CudaMerge : public testing::TestWithParam<std::tuple<DType, std::int64_t>> {};

TEST_P(CudaMerge, IsTheAttentionOverBoth) {
  const auto [dtype, head_dim] = GetParam();
  Part a(dtype, head_dim, 1), b(dtype, head_dim, 2), into(dtype, head_dim, 3);
  a.lse[5] = 80, b.lse[5] = -80;
  a.lse[6] = -infinity;  // nothing was summed, so what stands in out doesn't count
  for (std::int64_t d = 0; d < head_dim; ++d) a.out.set(0, 0, 6, d, NAN);
  a.lse[7] = b.lse[7] = -infinity;
  a.upload(), b.upload();
  expect_success(merge(a, b, into));
  expect_merged(a, b, into);
  EXPECT_TRUE(into.device_out.guards_intact() && into.device_lse.guards_intact());

  expect_success(merge(a, b, b));
  expect_merged(a, b, b);
  b.upload();
  expect_success(merge(a, b, a));
  expect_merged(a, b, a);
}

INSTANTIATE_TEST_SUITE_P(Parts, CudaMerge,
                         testing::Combine(testing::Values(DType::bf16, DType::f16), testing::Values(64, 128, 136)));

}  // namespace
}  // namespace pbsattn::test
