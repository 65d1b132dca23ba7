#include "causal_mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace pbsattn::ggml {
namespace {

constexpr std::uint16_t hidden = 0xFC00;

constexpr std::int64_t no_window = CausalRows::no_window;

// A causal mask and its storage.
struct Causal {
  Causal(std::int64_t queries, std::int64_t keys, std::int64_t offset, std::int64_t window = no_window)
      : entries(queries * keys, hidden) {
    for (std::int64_t i = 0; i < queries; ++i)
      for (std::int64_t j = std::max<std::int64_t>(offset + i - window + 1, 0); j <= offset + i; ++j)
        entries[i * keys + j] = 0;
    mask = {.data = entries.data(), .queries = queries, .keys = keys, .row_stride = keys};
  }
  std::vector<std::uint16_t> entries;
  Mask mask;
};

TEST(CausalRows, BeginAtTheFirstRowsLastKey) {
  EXPECT_EQ(causal_rows(Causal(512, 512, 0).mask, 1), (CausalRows{.offset = 0}));
  EXPECT_EQ(causal_rows(Causal(300, 768, 401).mask, 1), (CausalRows{.offset = 401}));
  EXPECT_EQ(causal_rows(Causal(1, 1, 0).mask, 1), (CausalRows{.offset = 0}));
}

TEST(CausalRows, RowsThatDontCountAreNotRead) {
  Causal causal(300, 512, 0);
  causal.mask.queries = 200;
  causal.entries[250 * 512] = hidden;
  EXPECT_EQ(causal_rows(causal.mask, 1), (CausalRows{.offset = 0}));
}

TEST(CausalRows, HaveAWindow) {
  // From every row on that it hides a key of: all, some, the last one, none.
  for (const std::int64_t window : {1, 2, 20, 70, 71, 72, 128, 199})
    EXPECT_EQ(causal_rows(Causal(130, 256, 70, window).mask, 1), (CausalRows{.offset = 70, .window = window}))
        << window;
  for (const std::int64_t window : {200, 201, 256, 5000})
    EXPECT_EQ(causal_rows(Causal(130, 256, 70, window).mask, 1), CausalRows{.offset = 70}) << window;
  EXPECT_EQ(causal_rows(Causal(130, 130, 0, 40).mask, 1), (CausalRows{.offset = 0, .window = 40}));
  EXPECT_EQ(causal_rows(Causal(1, 8, 4, 3).mask, 1), (CausalRows{.offset = 4, .window = 3}));
}

TEST(CausalRows, SeeSomething) {
  EXPECT_EQ(causal_rows(Causal(130, 256, 70, 0).mask, 1), std::nullopt);
}

TEST(CausalRows, HaveOneWindow) {
  Causal mask(130, 256, 70, 40);
  for (const std::int64_t row : {0, 64, 129}) {
    Causal other(130, 256, 70, row == 0 ? 41 : 39);
    std::copy_n(&other.entries[row * 256], 256, &mask.entries[row * 256]);
    EXPECT_EQ(causal_rows(mask.mask, 1), std::nullopt) << row;
  }
}

TEST(CausalRows, AnyEntryCanRefuteThem) {
  for (const std::int64_t window : {no_window, std::int64_t{20}, std::int64_t{100}}) {
    Causal causal(130, 256, 70, window);
    for (std::size_t at = 0; at < causal.entries.size(); ++at) {
      for (const std::uint16_t other : {std::uint16_t{0x0000}, hidden, std::uint16_t{0xBC00}, std::uint16_t{0x7E00}}) {
        const std::uint16_t was = causal.entries[at];
        if (other == was) continue;
        causal.entries[at] = other;
        std::optional<CausalRows> left;
        if (window == no_window && at == 129 * 256 && other == hidden) left = {.offset = 70, .window = 199};
        ASSERT_EQ(causal_rows(causal.mask, 1), left) << "entry " << at << " as " << other;
        causal.entries[at] = was;
      }
    }
  }
}

TEST(CausalRows, ThreadsDivideTheRows) {
  Causal causal(2048, 2304, 256);
  EXPECT_EQ(causal_rows(causal.mask, 4), (CausalRows{.offset = 256}));
  for (const std::int64_t row : {0, 511, 512, 1535, 2047}) {
    std::uint16_t& entry = causal.entries[row * 2304 + 10];
    entry = hidden;
    EXPECT_EQ(causal_rows(causal.mask, 4), std::nullopt) << "row " << row;
    entry = 0;
  }
}

TEST(CausalRows, AreNoMoreThanKeys) {
  EXPECT_EQ(causal_rows({.data = nullptr, .queries = 5, .keys = 4, .row_stride = 4}, 1), std::nullopt);
}

TEST(CausalMasks, OneVerdictServesTheLayersOfAGraph) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  EXPECT_EQ(masks.rows(causal.mask, 0, 1), CausalRows{});
  causal.entries[5] = 0;                                   // nobody may change a mask between the layers of a graph;
  EXPECT_EQ(masks.rows(causal.mask, 1, 1), CausalRows{});  // here it shows that layer 1 doesn't read it
}

TEST(CausalMasks, ANewGraphReadsAgain) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  masks.rows(causal.mask, 0, 1);
  causal.entries[5] = 0;
  masks.next_graph();
  EXPECT_EQ(masks.rows(causal.mask, 1, 1), std::nullopt);
}

TEST(CausalMasks, ALayerThatDoesntAscendReadsAgain) {
  Causal causal(512, 512, 0);
  CausalMasks masks;
  masks.rows(causal.mask, 4, 1);
  causal.entries[5] = 0;
  EXPECT_EQ(masks.rows(causal.mask, 4, 1), std::nullopt);
  EXPECT_EQ(masks.rows(causal.mask, 5, 1), std::nullopt);
  causal.entries[5] = hidden;
  EXPECT_EQ(masks.rows(causal.mask, -1, 1), CausalRows{});
}

TEST(CausalMasks, TwoMasksOfOneGraphAreToldApart) {
  Causal full(512, 512, 0), window(512, 512, 0, 100);
  CausalMasks masks;
  for (int layer = 0; layer < 4; layer += 2) {
    EXPECT_EQ(masks.rows(full.mask, layer, 1), CausalRows{});
    EXPECT_EQ(masks.rows(window.mask, layer + 1, 1), (CausalRows{.offset = 0, .window = 100}));
  }
}

}  // namespace
}  // namespace pbsattn::ggml
