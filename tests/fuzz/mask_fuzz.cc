// Throws masks, most of them causal but for a few entries, at the mask reader, and compares with the definition.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "bytes.h"
#include "causal_mask.h"
#include "expect.h"

namespace {

using pbsattn::fuzz::Bytes;
using pbsattn::fuzz::require;
using pbsattn::ggml::CausalRows;
using pbsattn::ggml::Mask;

constexpr std::uint16_t seen = 0x0000, hidden = 0xFC00;

// Row by row and entry by entry what causal_rows() promises.
std::optional<CausalRows> by_definition(const Mask& mask) {
  if (mask.queries < 1) return std::nullopt;
  for (std::int64_t offset = 0; offset + mask.queries <= mask.keys; ++offset) {
    // The last row sees a window's keys, or all up to its own.
    const std::int64_t window = std::count(mask.data + (mask.queries - 1) * mask.row_stride,
                                           mask.data + (mask.queries - 1) * mask.row_stride + mask.keys, seen);
    bool causal = window > 0;
    for (std::int64_t row = 0; row < mask.queries && causal; ++row)
      for (std::int64_t key = 0; key < mask.keys && causal; ++key)
        causal = mask.data[row * mask.row_stride + key] ==
                 (key <= offset + row && key > offset + row - window ? seen : hidden);
    if (causal)
      return CausalRows{.offset = offset, .window = window < offset + mask.queries ? window : CausalRows::no_window};
  }
  return std::nullopt;
}

void change(std::vector<std::uint16_t>& entries, Bytes& bytes) {
  constexpr std::uint16_t values[] = {seen, hidden, 0x8000, 0x7C00, 0x7E00, 0x3C00, 0xFBFF, 0x0001};
  for (int left = bytes.take<std::uint8_t>() % 4; left > 0; --left)
    entries[bytes.take<std::uint32_t>() % entries.size()] = values[bytes.take<std::uint8_t>() % std::size(values)];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  // Large masks are read by several threads.
  const bool large = bytes.take<std::uint8_t>() == 0x4C;
  Mask mask;
  mask.queries = bytes.take_near(large ? 1400 : 0, large ? 1500 : 40);
  mask.keys = bytes.take_near(large ? 1500 : 0, large ? 1700 : 140);
  mask.row_stride = mask.keys + bytes.take_near(0, 3);
  // Nothing lies behind the last row's last key.
  std::vector<std::uint16_t> entries(
      static_cast<std::size_t>(std::max<std::int64_t>((mask.queries - 1) * mask.row_stride + mask.keys, 1)));
  const std::int64_t offset = bytes.take_near(0, std::max<std::int64_t>(mask.keys - mask.queries, 0) + 1);
  const std::int64_t window = bytes.take_rarely(2) ? bytes.take_near(0, mask.keys + 1) : CausalRows::no_window;
  for (std::size_t i = 0; mask.row_stride > 0 && i < entries.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / mask.row_stride,
               key = static_cast<std::int64_t>(i) % mask.row_stride;
    entries[i] = key < mask.keys && key <= offset + row && key > offset + row - window ? seen : hidden;
  }
  change(entries, bytes);
  entries.shrink_to_fit();
  mask.data = entries.data();
  const int threads = static_cast<int>(bytes.take_near(0, 3));

  const auto expected = by_definition(mask);
  require(pbsattn::ggml::causal_rows(mask, threads) == expected, "a mask is read as it is defined");
  if (large) return 0;

  // A verdict is kept for the layers above within a graph; before it may have changed, it is read again.
  pbsattn::ggml::CausalMasks masks;
  std::optional<CausalRows> now = expected;
  std::optional<std::int32_t> last;
  for (int step = bytes.take<std::uint8_t>() % 6; step > 0; --step) {
    change(entries, bytes);
    const auto layer = static_cast<std::int32_t>(bytes.take_near(0, 4)) - 1;
    if (bytes.take_rarely(3)) {
      masks.next_graph();
      last.reset();
    }
    if (!last || layer < 0 || layer <= *last) now = by_definition(mask);
    require(masks.rows(mask, layer, threads) == now, "a kept verdict is that of its mask");
    last = layer;
  }
  return 0;
}
