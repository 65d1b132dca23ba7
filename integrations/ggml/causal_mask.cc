#include "causal_mask.h"

#include <algorithm>
#include <atomic>

#include "parts.h"

namespace pbsattn::ggml {
namespace {

constexpr std::uint16_t seen = 0x0000;    // +0.0
constexpr std::uint16_t hidden = 0xFC00;  // -inf

// A thread is worth starting for about a million entries.
constexpr std::int64_t entries_per_thread = std::int64_t{1} << 20;

bool all_equal(const std::uint16_t* entries, std::int64_t count, std::uint16_t value) {
  constexpr std::int64_t chunk = 64;  // a fixed length, so that the inner loop becomes vector code
  std::int64_t i = 0;
  for (; i + chunk <= count; i += chunk) {
    std::uint16_t difference = 0;
    for (std::int64_t j = 0; j < chunk; ++j) difference |= static_cast<std::uint16_t>(entries[i + j] ^ value);
    if (difference != 0) return false;
  }
  return std::all_of(entries + i, entries + count, [value](std::uint16_t entry) { return entry == value; });
}

bool holds(const CausalRows& rows, const Mask& mask, std::int64_t begin, std::int64_t end,
           const std::atomic<bool>& refuted) {
  for (std::int64_t row = begin; row < end && !refuted.load(std::memory_order_relaxed); ++row) {
    const std::uint16_t* entries = mask.data + row * mask.row_stride;
    const std::int64_t behind = rows.offset + row + 1;
    const std::int64_t first = std::max<std::int64_t>(behind - rows.window, 0);
    if (!all_equal(entries, first, hidden) || !all_equal(entries + first, behind - first, seen) ||
        !all_equal(entries + behind, mask.keys - behind, hidden))
      return false;
  }
  return true;
}

}  // namespace

std::optional<CausalRows> causal_rows(const Mask& mask, int threads) {
  if (mask.queries < 1 || mask.keys < mask.queries) return std::nullopt;
  // No row has more behind it than the last.
  const std::uint16_t* const last = mask.data + (mask.queries - 1) * mask.row_stride;
  const std::uint16_t* const first_seen = std::find(last, last + mask.keys, seen);
  const std::uint16_t* const behind = std::find(first_seen, last + mask.keys, hidden);
  const CausalRows rows{.offset = behind - last - mask.queries,
                        .window = first_seen == last ? CausalRows::no_window : behind - first_seen};
  if (rows.offset < 0 || rows.window < 1) return std::nullopt;

  const std::int64_t wanted = mask.queries * mask.keys / entries_per_thread;
  const std::int64_t parts = std::clamp<std::int64_t>(wanted, 1, std::max(threads, 1));
  std::atomic<bool> refuted{false};
  const auto check = [&](std::int64_t part) {
    if (!holds(rows, mask, mask.queries * part / parts, mask.queries * (part + 1) / parts, refuted)) refuted = true;
  };
  in_parts(parts, check);
  return refuted ? std::nullopt : std::optional(rows);
}

std::optional<CausalRows> CausalMasks::rows(const Mask& mask, std::int32_t layer, int threads) {
  const auto known = std::ranges::find_if(verdicts_, [&](const Verdict& verdict) {
    return verdict.mask.data == mask.data && verdict.mask.queries == mask.queries && verdict.mask.keys == mask.keys &&
           verdict.mask.row_stride == mask.row_stride;
  });
  if (known == verdicts_.end()) {
    verdicts_.push_back({mask, layer, causal_rows(mask, threads)});
    return verdicts_.back().rows;
  }
  if (layer < 0 || layer <= known->layer) known->rows = causal_rows(mask, threads);
  known->layer = layer;
  return known->rows;
}

}  // namespace pbsattn::ggml
