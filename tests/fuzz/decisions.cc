#include "decisions.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/keep_rule.h"

namespace pbsattn::fuzz {
namespace {

bool is_bf16(const ConstView& view) {
  return view.dtype == DType::bf16;
}

// The largest sum of |q_d k_d| * scale of a head's last queries and keys, but for keys that -inf hides.
double largest_product(const HeadCall& call, std::int64_t q_head) {
  const Geometry& g = call.geometry;
  const auto head = reference::load_head(call.inputs, g, call.flat / g.shape.q_heads, q_head);
  double largest = 0;
  for (std::int64_t i = g.shape.q_len - g.scoring_queries(); i < g.shape.q_len; ++i)
    for (std::int64_t n = 0; n < g.permuted_len(); ++n) {
      double sum = 0;
      for (std::int64_t d = 0; d < g.shape.head_dim; ++d) sum += std::abs(head.q[i][d] * head.k[n][d]);
      if (std::isfinite(sum)) largest = std::max(largest, sum * std::abs(call.options.scale));
    }
  return largest;
}

// By what share of the higher one two key scores may differ, at most, that rounding puts in the wrong order. With
// u = 2^-24, half a unit of float32, and A the largest_product():
//
//     product     its head_dim terms are off by head_dim u A
//     exponent    the difference to a block's maximum, up to 2 A, is rounded, and multiplied by a rounded factor: 8 u A
//     weight      the exponential is good to 4 u; and from its block's maximum to that of all keys: 8 u A and 5 u more
//     sums        a query's, of all weights: as much again, and u for each addition; the quotient; the sum over queries
//
// so a score is off by 2 (head_dim + 16) u A and (keys + queries + 20) u of itself. Where products are bf16, operands
// that bf16 doesn't hold are off by 2^-8 each, which makes 2^-7 A of a product; and weights, whose exponential is good
// to 7.5e-5, are rounded to bf16 after they are summed.
double key_score_rounding(const HeadCall& call) {
  constexpr double u = 0x1p-24;
  const Geometry& g = call.geometry;
  const std::int64_t h = call.flat % g.shape.q_heads;
  const bool shared = call.options.order_scope == OrderScope::kv_head;
  const std::int64_t first = shared ? g.kv_head(h) * g.group() : h;
  const std::int64_t heads = shared ? g.group() : 1;
  // A learned score's terms, each rounded a few times, are added up; ordering_scores() has its share of a bound of
  // them.
  if (call.options.permutation == Permutation::learned)
    return 2 * static_cast<double>(g.shape.head_dim * 3 / 2 + 8) * u;
  double a = 0;
  for (std::int64_t i = first; i < first + heads; ++i) a = std::max(a, largest_product(call, i));
  double product = static_cast<double>(g.shape.head_dim + 16) * u;
  double weight = static_cast<double>(g.permuted_len() + heads * g.scoring_queries() + 20) * u;
  if (call.bf16_products) {
    if (!is_bf16(call.inputs.q) || !is_bf16(call.inputs.k)) product += 0x1p-7;
    weight += 0x1p-8 + 2 * 7.5e-5;
  }
  return 2 * (std::exp(2 * product * a) * (1 + weight) - 1);
}

void expect_order(const HeadCall& call, const std::vector<std::int32_t>& order, Ties& ties) {
  const Geometry& g = call.geometry;
  std::vector<double> scores(static_cast<std::size_t>(g.permuted_len()), 0.0);
  if (call.options.permutation != Permutation::none)
    scores = test::ordering_scores(call.inputs, call.options, g, call.flat, call.kept);
  const auto definition = reference::order_keys(g, scores);
  if (order == definition) {
    ties.same();
    return;
  }
  require(call.options.permutation != Permutation::none, "keys stay in place without permutation");
  require(std::ranges::none_of(scores, [](double s) { return std::isnan(s); }), "keys without scores stay in place");
  for (std::int64_t begin = 0; begin < g.shape.kv_len; begin += g.segment) {
    const std::int64_t size = begin < g.permuted_len() ? g.segment : g.shape.kv_len - begin;
    std::vector<std::int32_t> tokens(order.begin() + begin, order.begin() + begin + size);
    if (begin < g.permuted_len()) std::ranges::sort(tokens);
    for (std::int64_t i = 0; i < size; ++i)
      require(tokens[static_cast<std::size_t>(i)] == begin + i, "a segment keeps its keys");
  }
  const double swap = test::farthest_swap(g, scores, order);
  const double allowed = key_score_rounding(call);
  ties.other(swap, allowed);
  if (swap <= allowed) return;
  std::fprintf(stderr, "head %d: key scores that stand in the wrong order differ by %.3g, rounding allows %.3g\n",
               static_cast<int>(call.flat), swap, allowed);
  fail("keys stand in the reference's order but for near ties");
}

}  // namespace

void expect_decisions(const HeadCall& call, const Trace& trace, Ties& orders, Ties& lists) {
  const Geometry& g = call.geometry;
  require(trace.first_row == g.first_row() && trace.rows == g.rows() && trace.blocks == g.blocks(),
          "a trace has the reference's form");
  const std::vector<std::int32_t> order(trace.order.begin() + call.flat * g.shape.kv_len,
                                        trace.order.begin() + (call.flat + 1) * g.shape.kv_len);
  expect_order(call, order, orders);

  // Attention mass; pooled values of 16 bits may be rounded the other way.
  const bool wide = call.inputs.q.dtype == DType::f32 && call.inputs.k.dtype == DType::f32;
  const double tolerance = wide ? 1e-4 : 5e-3;
  const auto batch = call.flat / g.shape.q_heads;
  const auto head = reference::load_head(call.inputs, g, batch, call.flat % g.shape.q_heads);
  const auto scoring = reference::prepare_scores(head, call.options, g, order);
  for (std::int64_t row = 0; row < g.rows(); ++row) {
    const auto begin = trace.block.begin() + trace.row_start[static_cast<std::size_t>(call.flat * g.rows() + row)];
    const auto end = trace.block.begin() + trace.row_start[static_cast<std::size_t>(call.flat * g.rows() + row + 1)];
    const std::vector<std::int32_t> list(begin, end);
    const auto tie = test::tie_behind(head, call.options, g, row, scoring, order, list, tolerance);
    if (!tie) {
      std::fprintf(stderr, "head %d, row %d lists", static_cast<int>(call.flat), static_cast<int>(row));
      for (const std::int32_t b : list) std::fprintf(stderr, " %d", b);
      std::fprintf(stderr, ", the reference");
      const auto scores = reference::row_scores(head, call.options, g, row, order, scoring);
      for (const std::int32_t b : reference::select_blocks(call.options, g, row, scores, order))
        std::fprintf(stderr, " %d", b);
      std::fprintf(stderr, "\n");
      fail("rows list the reference's blocks but for near ties");
    }
    if (*tie == 0)
      lists.same();
    else
      lists.other(*tie, tolerance);
  }
}

}  // namespace pbsattn::fuzz
