// RowGrid, which kernels read, against core/geometry.h, and the natural order of attend's tiles. Needs no GPU.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/attend/tile_order.h"
#include "cuda/geometry.cuh"
#include "cuda/memory/kv_rows.cuh"

namespace pbsattn::cuda {
namespace {

std::vector<Geometry> geometries() {
  std::vector<Geometry> all;
  for (const int segment : {128, 256, 384, 1024})
    for (const std::int64_t kv_len : {1, 127, 128, 129, 256, 700, 1024, 3333, 6'291'456})
      for (const std::int64_t q_len : {std::int64_t{1}, std::int64_t{100}, std::int64_t{129}, kv_len / 2 + 1, kv_len})
        if (q_len <= kv_len)
          all.push_back({.shape = {.batch = 2, .q_heads = 12, .kv_heads = 4, .q_len = q_len, .kv_len = kv_len},
                         .block = 128,
                         .segment = segment});
  return all;
}

std::string name_of(const Geometry& g) {
  return std::to_string(g.shape.q_len) + " queries of " + std::to_string(g.shape.kv_len) + " tokens, segment " +
         std::to_string(g.segment);
}

// All of few rows; of many the first, the last and some between.
std::vector<int> some_rows(const Geometry& g) {
  std::vector<int> rows;
  const auto count = static_cast<int>(g.rows());
  for (int row = 0; row < count; row += row < count - 3 && row > 2 ? std::max(count / 50, 1) : 1) rows.push_back(row);
  if (rows.back() != count - 1) rows.push_back(count - 1);
  return rows;
}

TEST(RowGrid, IsTheGeometry) {
  for (const Geometry& g : geometries()) {
    SCOPED_TRACE(name_of(g));
    const RowGrid grid(g, g.shape.q_heads);
    EXPECT_EQ(grid.rows, g.rows());
    EXPECT_EQ(grid.blocks, g.blocks());
    EXPECT_EQ(grid.heads, 24);
    std::int64_t first_sparse_row = 0;
    while (first_sparse_row < g.rows() && g.own_begin(first_sparse_row) == 0) ++first_sparse_row;
    EXPECT_EQ(std::min<std::int64_t>(grid.first_sparse_row(), g.rows()), first_sparse_row);
    for (const int row : some_rows(g)) {
      SCOPED_TRACE(row);
      const int diagonal = grid.diagonal(row);
      EXPECT_EQ(diagonal, g.diagonal(row));
      EXPECT_EQ(grid.own_begin(diagonal), g.own_begin(row));
      const Span queries = grid.queries_of(diagonal);
      EXPECT_EQ(diagonal * std::int64_t{128} + queries.begin, g.row_begin(row));
      EXPECT_EQ(diagonal * std::int64_t{128} + queries.end, g.row_end(row));
      EXPECT_EQ(queries.count(), g.row_end(row) - g.row_begin(row));
      EXPECT_EQ(grid.first_query(diagonal) + queries.begin, g.row_begin(row) - g.q_offset());
    }
  }
}

// A row has room for the blocks up to its diagonal, one row after the other and one head after the other.
TEST(RowGrid, ListsFollowEachOther) {
  for (const Geometry& g : geometries()) {
    SCOPED_TRACE(name_of(g));
    const RowGrid grid(g, g.shape.kv_heads);
    EXPECT_EQ(grid.list_start(0, 0), 0);
    EXPECT_EQ(grid.entries_before(grid.rows), g.causal_blocks_per_head());
    EXPECT_EQ(grid.list_start(23, grid.rows), g.causal_blocks_per_head() * 24);
    for (const int row : some_rows(g))
      EXPECT_EQ(grid.list_start(5, row + 1) - grid.list_start(5, row), grid.diagonal(row) + 1) << "row " << row;
  }
}

TEST(RowGrid, HeadsShareKeysAndOrders) {
  const Geometry g{.shape = {.batch = 2, .q_heads = 12, .kv_heads = 4, .q_len = 300, .kv_len = 300}};
  for (const std::int64_t order_heads : {g.shape.q_heads, g.shape.kv_heads}) {
    const RowGrid grid(g, order_heads);
    for (int batch = 0; batch < g.shape.batch; ++batch)
      for (int head = 0; head < g.shape.q_heads; ++head) {
        const int flat = batch * 12 + head;
        EXPECT_EQ(grid.kv_head(flat), batch * 4 + g.kv_head(head));
        EXPECT_EQ(grid.kv_head(head), g.kv_head(head));
        EXPECT_EQ(grid.order_head(flat), order_heads == g.shape.q_heads ? flat : batch * 4 + g.kv_head(head));
        const int kv_head = static_cast<int>(g.kv_head(head));
        EXPECT_EQ(grid.q_head(batch, kv_head, head % 3), flat);
        EXPECT_EQ(grid.order_head(batch, kv_head, head % 3 % grid.orders), grid.order_head(flat));
      }
  }
}

// Each tile once; sections one after the other, in one the rows from the last to the first, each row's heads side by
// side.
TEST(TileOrder, TakesLongRowsOfASectionFirst) {
  for (const TileOrder order : {TileOrder{7, 12, 4}, TileOrder{7, 12, 12}, TileOrder{1, 5, 2}, TileOrder{9, 7, 3}}) {
    SCOPED_TRACE(order.rows * 1000 + order.heads * 10 + order.section_heads);
    int place = 0;
    for (int section = 0; section < order.heads; section += order.section_heads)
      for (int row = order.rows - 1; row >= 0; --row)
        for (int head = section; head < std::min(section + order.section_heads, order.heads); ++head, ++place)
          ASSERT_EQ(order.tile(place), head * order.rows + row) << "place " << place;
    EXPECT_EQ(place, order.tiles());
  }
}

// Kernels divide by a page's size by a product.
TEST(PageTable, TokensAreInTheirPages) {
  constexpr std::int64_t most = max_blocks * block_tokens;
  constexpr std::int32_t entry = 0;
  for (const std::int64_t size : {16, 32, 48, 80, 112, 128, 240, 256, 272, 1008, 4096, 65'536, 99'984, 1 << 30})
    for (const std::int64_t kv_len : {std::int64_t{1}, size - 1, size, size + 1, std::int64_t{999'983}, most}) {
      const PageTable table({.table = &entry, .size = size, .count = 1}, kv_len);
      SCOPED_TRACE(testing::Message() << kv_len << " tokens in pages of " << size);
      ASSERT_EQ(table.last_slot, (kv_len - 1) / size);
      ASSERT_EQ(table.tokens_of_last(), (kv_len - 1) % size + 1);
      for (std::int64_t token = 0; token < kv_len; token += token % size == size - 1 || kv_len < 5000 ? 1 : size - 1) {
        const int slot = table.slot(static_cast<int>(token));
        ASSERT_EQ(slot, token / size) << token;
        ASSERT_EQ(table.place(static_cast<int>(token), slot), token % size) << token;
      }
      for (const int run : {64, 128, 256}) {
        const int length = table.run(run);
        ASSERT_TRUE(length >= 16 && run % length == 0 && size % length == 0) << run;
        ASSERT_TRUE(length == run || size % (2 * length) != 0) << run;
      }
    }
}

}  // namespace
}  // namespace pbsattn::cuda
