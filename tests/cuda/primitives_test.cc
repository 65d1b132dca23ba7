// Device primitives, against what they are defined to do: where a stage is wrong, one of these may say where.
#include "cuda/primitives.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>

namespace pbsattn::test {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Multiples of 1/64 up to `most`, whose sums are exact in float32 while they stay under 2^18: few different ones are
// many ties.
std::vector<float> values(std::size_t count, int most, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> all(count);
  for (float& x : all) x = static_cast<float>(random() % (64 * static_cast<std::uint64_t>(most) + 1)) / 64;
  return all;
}

// Indices of the highest values first, of equal ones the first index.
std::vector<int> descending(const std::vector<float>& all) {
  std::vector<int> order(all.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](int i) { return all[i]; });
  return order;
}

std::vector<std::vector<float>> many_values() {
  std::vector<std::vector<float>> sets{values(1, 5, 1),
                                       values(31, 1, 2),
                                       values(1024, 100, 3),
                                       values(5000, 1, 4),
                                       values(3000, 30, 5),
                                       std::vector<float>(2000, 0.25F),
                                       std::vector<float>(70, 0.0F)};
  sets.push_back(values(1500, 3, 6));
  for (int i = 0; i < 1500; i += 2) sets.back()[i] = 0;
  return sets;
}

// The highest whose sum, or number, stays within a limit.
void expect_cut(const std::vector<float>& all, double limit, bool by_sum) {
  std::vector<bool> kept(all.size());
  int count = 0;
  double measure = 0;
  for (const int i : descending(all)) {
    measure += by_sum ? double{all[i]} : 1.0;
    if (measure > limit) break;
    kept[i] = true;
    ++count;
  }
  const CutResult got = run_cut(all, limit, by_sum);
  EXPECT_EQ(got.count, count);
  EXPECT_EQ(got.kept, kept);
}

TEST(CudaPrimitives, CutsWithinANumber) {
  for (std::vector<float>& all : many_values()) {
    for (const std::size_t part :
         {std::size_t{0}, std::size_t{1}, all.size() / 3, all.size() - 1, all.size(), all.size() + 7}) {
      SCOPED_TRACE(std::to_string(part) + " of " + std::to_string(all.size()));
      expect_cut(all, static_cast<double>(part), false);
    }
    all[0] = all.back() = infinity;  // what comes before all others
    SCOPED_TRACE("with infinite ones, of " + std::to_string(all.size()));
    expect_cut(all, static_cast<double>(all.size() / 2 + 1), false);
  }
}

TEST(CudaPrimitives, CutsWithinASum) {
  for (const std::vector<float>& all : many_values()) {
    const double whole = std::accumulate(all.begin(), all.end(), 0.0);
    for (const double limit : {0.0, 1.0 / 64, whole / 3, whole * 0.9, whole - 1.0 / 64, whole, whole + 1}) {
      SCOPED_TRACE(std::to_string(limit) + " of " + std::to_string(whole) + " in " + std::to_string(all.size()));
      if (limit >= 0) expect_cut(all, limit, true);
    }
  }
}

// The highest up to and including the one that brings their sum, or number, to the target.
void expect_highest(const std::vector<float>& weights, float target, bool by_count) {
  std::vector<std::int32_t> wanted;
  float reached = 0;
  for (const int i : descending(weights)) {
    wanted.push_back(i);
    reached += by_count ? 1.0F : weights[i];
    if (reached >= target) break;
  }
  std::ranges::sort(wanted);
  EXPECT_EQ(run_find_highest(weights, target, by_count), wanted);
}

TEST(CudaPrimitives, FindsTheHighest) {
  for (std::vector<float> weights : many_values()) {
    for (float& x : weights) x += 1.0F / 64;  // weights of a softmax aren't 0
    const float whole = std::accumulate(weights.begin(), weights.end(), 0.0F);
    for (const float share : {0.01F, 0.5F, 0.9F, 1.0F}) {
      SCOPED_TRACE(std::to_string(share) + " of " + std::to_string(weights.size()));
      expect_highest(weights, std::ceil(64 * share * whole) / 64, false);
      expect_highest(weights, std::max(std::floor(share * static_cast<float>(weights.size())), 1.0F), true);
    }
  }
}

TEST(CudaPrimitives, RanksKeysByScoreAndPlace) {
  for (const std::size_t segment : {128, 256, 384, 1024, 8192}) {
    for (const int most : {1, 1000}) {
      SCOPED_TRACE(segment);
      std::vector<float> scores = values(segment, most, segment);
      EXPECT_EQ(run_rank_keys(scores), descending(scores));
      scores[5] = scores[segment - 1] = std::nanf("");  // last, in their order
      std::vector<float> with_nan_last = scores;
      with_nan_last[5] = with_nan_last[segment - 1] = -1;
      EXPECT_EQ(run_rank_keys(scores), descending(with_nan_last));
    }
  }
  EXPECT_EQ(run_rank_keys(std::vector<float>(256, 0.5F)), descending(std::vector<float>(256, 0.5F)));
}

class CudaTile : public testing::TestWithParam<int> {};

// Small integers, whose products and sums are exact.
std::vector<float> integers(int head_dim, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> all(std::size_t{128} * static_cast<std::size_t>(head_dim));
  for (float& x : all) x = static_cast<float>(random() % 17) - 8;
  return all;
}

// `rows[i]` is the row of `a` that stands in the tile's row i; -1: zeros.
void expect_product(const std::vector<float>& got, const std::vector<float>& a, const std::vector<float>& b,
                    const std::vector<int>& rows, int head_dim) {
  for (int i = 0; i < 128; ++i)
    for (int j = 0; j < 128; ++j) {
      float sum = 0;
      for (int d = 0; rows[i] >= 0 && d < head_dim; ++d) sum += a[rows[i] * head_dim + d] * b[j * head_dim + d];
      ASSERT_EQ(got[i * 128 + j], sum) << "row " << i << ", column " << j;
    }
}

TEST_P(CudaTile, LoadedRowsMultiply) {
  const int head_dim = GetParam();
  const auto a = integers(head_dim, 1), b = integers(head_dim, 2);
  for (const int present : {128, 77, 1}) {
    SCOPED_TRACE(present);
    std::vector<int> rows(128, -1);
    std::iota(rows.begin(), rows.begin() + present, 0);
    expect_product(run_product(a, b, head_dim, present, nullptr), a, b, rows, head_dim);
  }
}

TEST_P(CudaTile, GatheredRowsMultiply) {
  const int head_dim = GetParam();
  const auto a = integers(head_dim, 3), b = integers(head_dim, 4);
  std::vector<int> rows(128);
  for (int i = 0; i < 128; ++i) rows[i] = i % 5 == 3 ? -1 : i * 37 % 128;
  expect_product(run_product(a, b, head_dim, 128, &rows), a, b, rows, head_dim);
}

INSTANTIATE_TEST_SUITE_P(HeadDim, CudaTile, testing::Values(64, 96, 128, 192, 256));

class CudaWidthsOfTiles : public testing::TestWithParam<cuda::Widths> {};

// What the copy engine brings of rows that are `stride` apart, from a token before the first on.
TEST_P(CudaWidthsOfTiles, CopiesLieWhereProductsReadThem) {
  const cuda::Widths widths = GetParam();
  for (const bool values : {false, true}) {
    const int width = values ? widths.values : widths.keys;
    const int stride = width + 24;
    const int tokens = 200;
    std::vector<float> rows(static_cast<std::size_t>(tokens * stride));
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i * 37 % 2039);
    for (const int first : {0, 64, 150}) {
      SCOPED_TRACE(std::to_string(width) + " columns from token " + std::to_string(first));
      const std::vector<float> got = run_step_copy(rows, widths, values, stride, tokens, first);
      ASSERT_EQ(got.size() % width, 0);
      for (std::size_t i = 0; i < got.size(); ++i) {
        const int token = first + static_cast<int>(i) / width;
        ASSERT_EQ(got[i], token < tokens ? rows[token * stride + static_cast<int>(i) % width] : 0) << "element " << i;
      }
    }
  }
}

// Weights of 64 queries times the values of as many keys as attend takes at a time, and the weights' sums.
TEST_P(CudaWidthsOfTiles, WeightsMultiplyValuesAndOnes) {
  const cuda::Widths widths = GetParam();
  const auto weights = integers(128, 5), v = integers(widths.values, 6);
  const WeightedSums got = run_weighted_sums(weights, v, widths);
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < widths.values + 8; ++column) {
      float sum = 0;
      for (int key = 0; key < got.keys; ++key)
        sum += weights[row * 128 + key] * (column < widths.values ? v[key * widths.values + column] : 1);
      ASSERT_EQ(got.sums[row * (widths.values + 8) + column], sum) << "row " << row << ", column " << column;
    }
}

INSTANTIATE_TEST_SUITE_P(Widths, CudaWidthsOfTiles, testing::ValuesIn(cuda::widths), [](const auto& test) {
  return std::to_string(test.param.keys) + "v" + std::to_string(test.param.values);
});

TEST(CudaPrimitives, ReducesLanes) {
  std::vector<float> lanes = values(32, 100, 9);
  for (int i = 0; i < 32; i += 3) lanes[i] = -lanes[i];
  const Reduced got = run_reductions(lanes);
  for (int lane = 0; lane < 32; ++lane) {
    const auto quad = lanes.begin() + lane / 4 * 4;
    EXPECT_EQ(got.warp_sum[lane], std::accumulate(lanes.begin(), lanes.end(), 0.0F));
    EXPECT_EQ(got.warp_max[lane], std::ranges::max(lanes));
    EXPECT_EQ(got.quad_sum[lane], std::accumulate(quad, quad + 4, 0.0F));
    EXPECT_EQ(got.quad_max[lane], *std::max_element(quad, quad + 4));
  }
}

TEST(CudaPrimitives, SumsExponentialsOnline) {
  for (const float size : {0.1F, 20.0F, 1e5F}) {
    std::vector<float> products = values(203, 64, 10);
    for (float& x : products) x = (x - 32) * size;
    products[7] = -infinity;  // adds nothing
    constexpr float scale_log2 = 0.25F;
    double sum = 0;
    const double top = std::ranges::max(products);
    for (const float x : products) sum += std::exp2((x - top) * scale_log2);
    const double wanted = top * scale_log2 + std::log2(sum);
    EXPECT_NEAR(run_log_sum(products, scale_log2), wanted, 3e-5 + std::abs(wanted) * 0x1p-22) << size;
  }
  EXPECT_EQ(run_log_sum({-infinity, -infinity}, 1), -infinity);
}

TEST(CudaPrimitives, MergesPartsByTheirLogSumExps) {
  for (const auto& [a, b] :
       {std::pair{0.0F, 0.0F}, {1.5F, -2.0F}, {-80.0F, -85.0F}, {1000.0F, 999.5F}, {3.0F, 1e30F}}) {
    SCOPED_TRACE(std::to_string(a) + " and " + std::to_string(b));
    const double top = std::max(a, b);
    const double sum = std::exp(a - top) + std::exp(b - top);
    const Merged got = run_merger(a, b);
    EXPECT_NEAR(got.a, std::exp(a - top) / sum, 1e-6);
    EXPECT_NEAR(got.b, std::exp(b - top) / sum, 1e-6);
    EXPECT_NEAR(got.lse, top + std::log(sum), 1e-6 + std::abs(top) * 0x1p-22);
  }
}

TEST(CudaPrimitives, MergesPartsWithoutWeightOrValue) {
  for (const float lse : {-1000.0F, 0.0F, 3.5F}) {
    SCOPED_TRACE(lse);
    const Merged first = run_merger(lse, -infinity), second = run_merger(-infinity, lse);
    EXPECT_EQ(std::tie(first.a, first.b, first.lse), std::make_tuple(1.0F, 0.0F, lse));
    EXPECT_EQ(std::tie(second.a, second.b, second.lse), std::make_tuple(0.0F, 1.0F, lse));
  }
  const Merged none = run_merger(-infinity, -infinity);
  EXPECT_EQ(std::tie(none.a, none.b, none.lse), std::make_tuple(0.0F, 0.0F, -infinity));
  const float nan = std::nanf("");
  for (const auto& [a, b] : {std::pair{nan, 2.0F}, {2.0F, nan}, {nan, -infinity}, {-infinity, nan}, {nan, nan}}) {
    const Merged got = run_merger(a, b);
    EXPECT_TRUE(std::isnan(got.a) && std::isnan(got.b) && std::isnan(got.lse)) << a << " and " << b;
  }
}

TEST(CudaPrimitives, PlacesRowsAsOnTheHost) {
  for (const int segment : {128, 256, 384, 8192})
    for (const auto& [q_len, kv_len] : {std::pair<std::int64_t, std::int64_t>{900, 900},
                                        {1, 777},
                                        {301, 1111},
                                        {40'000, 100'000},
                                        {6'291'456, 6'291'456}}) {
      SCOPED_TRACE(kv_len);
      const cuda::RowGrid grid(
          {.shape = {.q_heads = 8, .kv_heads = 2, .q_len = q_len, .kv_len = kv_len}, .block = 128, .segment = segment},
          2);
      EXPECT_EQ(run_row_grid(grid), row_places(grid));
    }
}

}  // namespace
}  // namespace pbsattn::test
