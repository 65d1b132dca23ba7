#include "causal_mask.h"

#include <gtest/gtest.h>

#include <optional>
#include <vector>

namespace pbsattn::ggml {
namespace {

constexpr std::uint16_t hidden = 0xFC00;

// A causal mask and its storage.
struct Causal {
  Causal(std::int64_t queries, std::int64_t keys, std::int64_t offset) : entries(queries * keys, hidden) {
    for (std::int64_t i = 0; i < queries; ++i)
      for (std::int64_t j = 0; j <= offset + i; ++j) entries[i * keys + j] = 0;
    mask = {.data = entries.data(), .queries = queries, .keys = keys, .row_stride = keys};
  }
  std::vector<std::uint16_t> entries;
  Mask mask;
};

TEST(CausalOffset, IsTheFirstRowsLastKey) {
  EXPECT_EQ(causal_offset(Causal(512, 512, 0).mask, 1), 0);
  EXPECT_EQ(causal_offset(Causal(300, 768, 401).mask, 1), 401);
  EXPECT_EQ(causal_offset(Causal(1, 1, 0).mask, 1), 0);
}

TEST(CausalOffset, RowsThatDontCountAreNotRead) {
  Causal causal(300, 512, 0);
  causal.mask.queries = 200;
  causal.entries[250 * 512] = hidden;
  EXPECT_EQ(causal_offset(causal.mask, 1), 0);
}

TEST(CausalOffset, AnyEntryCanRefuteIt) {
  Causal causal(130, 256, 70);
  for (std::size_t at = 0; at < causal.entries.size(); ++at) {
    for (const std::uint16_t other : {std::uint16_t{0x0000}, hidden, std::uint16_t{0xBC00}, std::uint16_t{0x7E00}}) {
      const std::uint16_t was = causal.entries[at];
      if (other == was) continue;
      causal.entries[at] = other;
      ASSERT_EQ(causal_offset(causal.mask, 1), std::nullopt) << "entry " << at << " as " << other;
      causal.entries[at] = was;
    }
  }
}

TEST(CausalOffset, ThreadsDivideTheRows) {
  Causal causal(2048, 2304, 256);
  EXPECT_EQ(causal_offset(causal.mask, 4), 256);
  for (const std::int64_t row : {0, 511, 512, 1535, 2047}) {
    std::uint16_t& entry = causal.entries[row * 2304 + 10];
    entry = hidden;
    EXPECT_EQ(causal_offset(causal.mask, 4), std::nullopt) << "row " << row;
    entry = 0;
  }
}

TEST(CausalOffset, MoreQueriesThanKeysIsNotCausal) {
  EXPECT_EQ(causal_offset({.data = nullptr, .queries = 5, .keys = 4, .row_stride = 4}, 1), std::nullopt);
}

TEST(CausalMasks, OneVerdictServesTheLayersOfAGraph) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  EXPECT_EQ(masks.offset(causal.mask, 0, 1), 0);
  causal.entries[5] = 0;                          // nobody may change a mask between the layers of a graph;
  EXPECT_EQ(masks.offset(causal.mask, 1, 1), 0);  // here it shows that layer 1 doesn't read it
}

TEST(CausalMasks, ANewGraphReadsAgain) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  masks.offset(causal.mask, 0, 1);
  causal.entries[5] = 0;
  masks.next_graph();
  EXPECT_EQ(masks.offset(causal.mask, 1, 1), std::nullopt);
}

TEST(CausalMasks, ALayerThatDoesntAscendReadsAgain) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  masks.offset(causal.mask, 4, 1);
  causal.entries[5] = 0;
  EXPECT_EQ(masks.offset(causal.mask, 4, 1), std::nullopt);
  EXPECT_EQ(masks.offset(causal.mask, 5, 1), std::nullopt);
  causal.entries[5] = hidden;
  EXPECT_EQ(masks.offset(causal.mask, -1, 1), 0);
}

TEST(CausalMasks, TwoMasksOfOneGraphAreToldApart) {
  Causal full(512, 512, 0), window(512, 512, 0);
  window.entries[400 * 512] = hidden;
  CausalMasks masks;
  for (int layer = 0; layer < 4; layer += 2) {
    EXPECT_EQ(masks.offset(full.mask, layer, 1), 0);
    EXPECT_EQ(masks.offset(window.mask, layer + 1, 1), std::nullopt);
  }
}

}  // namespace
}  // namespace pbsattn::ggml
