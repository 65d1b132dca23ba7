#include "core/geometry.h"

#include <gtest/gtest.h>

#include <vector>

namespace pbsattn {
namespace {

Geometry geometry(std::int64_t q_len, std::int64_t kv_len) {
  return {.shape = {.q_heads = 6, .kv_heads = 2, .q_len = q_len, .kv_len = kv_len, .head_dim = 8},
          .block = 4,
          .segment = 8};
}

TEST(Geometry, HeadsOfAGroupShareAKvHead) {
  const Geometry g = geometry(1, 1);
  EXPECT_EQ(g.group(), 3);
  EXPECT_EQ(g.kv_head(2), 0);
  EXPECT_EQ(g.kv_head(3), 1);
}

// What a row has: [begin, end) of its tokens, the block on its diagonal, and its own segment's first block.
struct Row {
  std::int64_t begin, end, diagonal, own_begin;
  bool operator==(const Row&) const = default;
};

std::vector<Row> rows_of(const Geometry& g) {
  std::vector<Row> rows;
  for (std::int64_t r = 0; r < g.rows(); ++r)
    rows.push_back({g.row_begin(r), g.row_end(r), g.diagonal(r), g.own_begin(r)});
  return rows;
}

TEST(Geometry, WholePrefill) {
  const Geometry g = geometry(18, 18);  // blocks 0..3, 4..7 | 8..11, 12..15 | 16, 17
  EXPECT_EQ(rows_of(g), (std::vector<Row>{{0, 4, 0, 0}, {4, 8, 1, 0}, {8, 12, 2, 2}, {12, 16, 3, 2}, {16, 18, 4, 4}}));
  EXPECT_EQ(g.blocks(), 5);
  EXPECT_EQ(g.permuted_len(), 16);
  EXPECT_EQ(g.causal_blocks_per_head(), 1 + 2 + 3 + 4 + 5);
  EXPECT_EQ(g.scoring_queries(), 4);
}

TEST(Geometry, AChunkMayStartInsideABlock) {
  const Geometry g = geometry(7, 17);  // tokens 10 .. 16: rows of blocks 2 (10, 11), 3 (12 .. 15) and 4 (16)
  EXPECT_EQ(rows_of(g), (std::vector<Row>{{10, 12, 2, 2}, {12, 16, 3, 2}, {16, 17, 4, 4}}));
  EXPECT_EQ(g.q_offset(), 10);
  EXPECT_EQ(g.first_row(), 2);
  EXPECT_EQ(g.causal_blocks_per_head(), 3 + 4 + 5);
}

TEST(Geometry, OneQueryOfALongCache) {
  const Geometry g = geometry(1, 16);
  EXPECT_EQ(g.rows(), 1);
  EXPECT_EQ(g.diagonal(0), 3);
  EXPECT_EQ(g.scoring_queries(), 1);
}

}  // namespace
}  // namespace pbsattn
