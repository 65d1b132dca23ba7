#include "core/fallback.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

namespace pbsattn {
namespace {

struct Point {
  double tokens, density;
};
// arXiv 2510.21270 from 8K on; before it, down to two segments, where nothing can be left out.
constexpr std::array<Point, 6> paper{
    {{512, 1.0}, {8192, .579}, {16'384, .485}, {32'768, .405}, {65'536, .287}, {131'072, .219}}};
// Qwen2.5-Coder-1.5B, two-step at its own setting: results/transformers.md, the last on prose: results/two-step.md.
constexpr std::array<Point, 4> two_step{{{512, 1.0}, {8192, .38}, {32'768, .14}, {131'072, .12}}};

constexpr double tolerated_loss = 0.1;

bool method_is_faster(const Options& options, const Geometry& g, const CostModel& model) {
  // Two-step scores don't read top_p, but who asks for all of it means full attention.
  if (options.score == BlockScore::two_step && options.top_p >= 1.0F) return false;
  const double heads = static_cast<double>(g.shape.batch * g.shape.q_heads);
  const auto full = static_cast<double>(g.causal_blocks_per_head());
  double dense_rows = 0;  // their pairs
  for (std::int64_t row = std::max<std::int64_t>(g.rows() - options.dense_last_rows, 0); row < g.rows(); ++row)
    dense_rows += static_cast<double>(g.diagonal(row) + 1);
  const double extra = model.call / heads + model.key_block * static_cast<double>(g.blocks()) +
                       model.row * static_cast<double>(g.rows()) + model.pair * full;
  const double density = expected_density(options, g.shape.kv_len);
  const bool vouched_for = options.expected_density > 0.0F;
  return dense_rows + density * (full - dense_rows) + extra < full && (vouched_for || extra <= tolerated_loss * full);
}

}  // namespace

double expected_density(const Options& options, std::int64_t kv_len) {
  if (options.expected_density > 0.0F) return options.expected_density;
  const auto tokens = static_cast<double>(kv_len);
  const std::span<const Point> points =
      options.score == BlockScore::two_step ? std::span<const Point>(two_step) : std::span<const Point>(paper);
  if (tokens <= points.front().tokens) return points.front().density;
  const auto next = std::ranges::find_if(points, [&](const Point& point) { return tokens < point.tokens; });
  if (next == points.end()) return points.back().density;
  const Point& before = *(next - 1);
  const double way = std::log2(tokens / before.tokens) / std::log2(next->tokens / before.tokens);
  return before.density + way * (next->density - before.density);
}

detail::PlanSpec with_fallback_resolved(const detail::PlanSpec& spec, const CostModel& model) {
  detail::PlanSpec resolved = spec;
  Options& options = resolved.options;
  if (options.fallback == Fallback::when_faster && !method_is_faster(options, spec.geometry, model)) {
    options.permutation = Permutation::none;
    options.score = BlockScore::none;
    options.keep = KeepRule::all;
    resolved.heads.clear();
  }
  options.fallback = Fallback::never;
  return resolved;
}

}  // namespace pbsattn
