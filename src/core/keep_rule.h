// What an options' keep rule comes to, for every backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn {

// Whether the rule keeps every block whatever its score, so that nothing needs to be scored.
inline bool keeps_every_block(const Options& options) {
  switch (options.keep) {
    case KeepRule::all: return true;
    case KeepRule::top_p: return options.top_p == 1.0F;
    case KeepRule::threshold: return options.threshold == 0.0F || options.floor_top_p == 1.0F;
    case KeepRule::relative: return options.threshold == 0.0F;
    case KeepRule::top_k: return false;
    case KeepRule::density: return options.density == 1.0F;
    case KeepRule::none:
    case KeepRule::vertical_slash: return false;
    case KeepRule::coverage: return options.top_p == 1.0F;
  }
  return false;
}

// Whether what the rule keeps depends on scores.
inline bool reads_scores(const Options& options) {
  return options.keep != KeepRule::none && !keeps_every_block(options);
}

// The same of any head.
inline bool reads_scores(std::span<const Options> heads) {
  return std::ranges::any_of(heads, [](const Options& o) { return reads_scores(o); });
}

// The threshold of KeepRule::threshold for the row on this diagonal.
inline double row_threshold(const Options& options, std::int64_t diagonal) {
  const auto threshold = static_cast<double>(options.threshold);
  if (options.threshold_tokens == 0.0F) return threshold;
  const auto tokens = static_cast<double>((diagonal + 1) * options.block);
  return std::min(threshold, static_cast<double>(options.threshold_tokens) / tokens);
}

// Last rows that are dense in every head.
inline int common_dense_rows(std::span<const Options> heads) {
  return std::ranges::min(heads, {}, &Options::dense_last_rows).dense_last_rows;
}

// How many of blocks 0 .. own_begin-1 a rule that counts (top_k, density) keeps of the row on this diagonal.
inline std::int64_t kept_count(const Options& options, std::int64_t own_begin, std::int64_t diagonal) {
  if (options.keep == KeepRule::top_k) return std::min<std::int64_t>(options.top_k, own_begin);
  const auto wanted = static_cast<std::int64_t>(std::ceil(options.density * static_cast<float>(diagonal + 1)));
  return std::clamp<std::int64_t>(wanted - (diagonal + 1 - own_begin), 0, own_begin);
}

}  // namespace pbsattn
