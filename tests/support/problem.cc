#include "support/problem.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace pbsattn::test {
namespace {

constexpr std::int64_t topic_length = 48;  // tokens that share a topic; deliberately no multiple of a block

// Draws a direction, of unit length: every topic has one, and every KV head one that all queries share.
std::vector<double> direction(Normal& normal, std::int64_t head_dim) {
  std::vector<double> row(head_dim);
  double norm = 0;
  for (double& x : row) norm += std::pow(x = normal(), 2);
  for (double& x : row) x /= std::sqrt(norm);
  return row;
}

}  // namespace

Problem::Problem(const ProblemSpec& spec)
    : shape(spec.shape),
      q(spec.q, spec.layout, shape.batch, shape.q_heads, shape.q_len, shape.head_dim),
      k(spec.k, spec.layout, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim),
      v(spec.v, spec.layout, shape.batch, shape.kv_heads, shape.kv_len, value_dim(shape)),
      out(spec.out, spec.layout, shape.batch, shape.q_heads, shape.q_len, value_dim(shape)),
      lse(static_cast<std::size_t>(shape.batch * shape.q_heads * shape.q_len)),
      pairs(spec.pairs),
      known(spec.known) {
  Normal normal(spec.seed);
  const auto on_grid = [&](double x) { return spec.grid == 0 ? x : std::round(x / spec.grid) * spec.grid; };
  const double width = std::sqrt(static_cast<double>(shape.head_dim));
  const std::int64_t group = shape.q_heads / shape.kv_heads;
  std::vector<std::vector<double>> topics;
  for (std::int64_t t = 0; t <= shape.kv_len / topic_length; ++t) topics.push_back(direction(normal, shape.head_dim));

  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.kv_heads; ++h) {
      const auto shared = direction(normal, shape.head_dim);
      for (std::int64_t n = 0; n < shape.kv_len; ++n) {
        const double pull = 0.5 * std::exp(normal());
        const auto& topic = topics[n / topic_length];
        for (std::int64_t d = 0; d < std::max(shape.head_dim, value_dim(shape)); ++d) {
          if (d < shape.head_dim)
            k.set(b, h, n, d, on_grid(normal() + (pull * shared[d] + 2.0 * topic[d]) * width / 2));
          if (d < value_dim(shape)) v.set(b, h, n, d, normal());
        }
      }
      for (std::int64_t i = 0; i < group * shape.q_len; ++i) {
        const std::int64_t query = i % shape.q_len;
        // Each row of queries is about some earlier topic.
        const std::int64_t token = shape.kv_len - shape.q_len + query;
        const auto& topic = topics[(token / 128 * 7919) % (token / topic_length + 1)];
        for (std::int64_t d = 0; d < shape.head_dim; ++d)
          q.set(b, h * group + i / shape.q_len, query, d, on_grid(normal() + (shared[d] + topic[d]) * width / 2));
      }
    }
  }
  for (std::int64_t h = 0; spec.sinks && h < shape.q_heads; ++h) sinks.push_back(static_cast<float>(2 * normal()));
  const std::int64_t features = shape.head_dim / 2 + shape.head_dim;
  for (std::int64_t i = 0; spec.order_weights && i < shape.kv_heads * features; ++i)
    order_weights.push_back(static_cast<float>(normal()));
  if (spec.kept_segment == 0) return;
  const std::int64_t segment = spec.kept_segment;
  const std::int64_t tokens = shape.kv_len / segment * segment;
  // Known segments stand backwards, from another token on in each head; what a run writes begins as nonsense.
  for (std::int64_t head = 0; head < shape.batch * shape.kv_heads; ++head)
    for (std::int64_t slot = 0; slot < tokens; ++slot)
      order.push_back(slot >= known
                          ? -1
                          : static_cast<std::int32_t>(slot / segment * segment +
                                                      (2 * segment - 1 - slot % segment + 7 * head) % segment));
}

KeyOrder Problem::kept_order() const {
  if (order.empty()) return {};
  const std::int64_t tokens = std::ssize(order) / (shape.batch * shape.kv_heads);
  return {.data = order.data(), .batch_stride = shape.kv_heads * tokens, .head_stride = tokens, .known = known};
}

Problem first_tokens(const Problem& whole, std::int64_t q_len, std::int64_t kv_len, int kept_segment) {
  Shape part = whole.shape;
  part.q_len = q_len;
  part.kv_len = kv_len;
  Problem problem({.shape = part,
                   .q = whole.q.dtype,
                   .k = whole.k.dtype,
                   .v = whole.v.dtype,
                   .out = whole.out.dtype,
                   .kept_segment = kept_segment});
  const auto copy = [&](const Tensor& from, Tensor& to, std::int64_t first) {
    for (std::int64_t b = 0; b < to.batch; ++b)
      for (std::int64_t h = 0; h < to.heads; ++h)
        for (std::int64_t t = 0; t < to.tokens; ++t)
          for (std::int64_t d = 0; d < to.head_dim; ++d) to.set(b, h, t, d, from.get(b, h, first + t, d));
  };
  copy(whole.q, problem.q, kv_len - q_len - (whole.shape.kv_len - whole.shape.q_len));
  copy(whole.k, problem.k, 0);
  copy(whole.v, problem.v, 0);
  problem.sinks = whole.sinks;
  problem.order_weights = whole.order_weights;
  problem.pairs = whole.pairs;
  return problem;
}

RunResult result_of(const Plan& plan) {
  return {.stats = {},
          .trace = {},
          .options = plan.options(),
          .path = std::string(plan.path()),
          .workspace_size = plan.workspace_size()};
}

namespace {

RunResult run(const Plan& plan, Problem& problem, const RunOptions& how) {
  RunResult result = result_of(plan);
  EXPECT_LE(plan.workspace_size(), how.cap);

  constexpr std::size_t guard = 64;
  constexpr std::byte nan_pattern{0xFF};  // NaN in all three dtypes
  std::vector<std::byte> memory(how.misalign + plan.workspace_size() + guard, nan_pattern);
  problem.out.fill(std::nan(""));
  plan.run(problem.inputs(), problem.outputs(), std::span(memory).subspan(how.misalign, plan.workspace_size()),
           &result.stats, &result.trace);

  EXPECT_TRUE(problem.out.padding_intact());
  for (std::size_t i = 0; i < how.misalign; ++i) EXPECT_EQ(memory[i], nan_pattern) << "byte before the workspace";
  for (std::size_t i = memory.size() - guard; i < memory.size(); ++i)
    EXPECT_EQ(memory[i], nan_pattern) << "byte after the workspace";
  return result;
}

}  // namespace

RunResult run(const Options& options, Problem& problem, const RunOptions& how) {
  return run(Plan::create(options, problem.shape, how.device, how.cap), problem, how);
}

RunResult run(std::span<const Options> heads, Problem& problem, const RunOptions& how) {
  if (heads.size() == 1) return run(heads.front(), problem, how);
  return run(Plan::create(heads, problem.shape, how.device, how.cap), problem, how);
}

Options resolved(Options options, const Shape& shape) {
  if (options.scale == 0.0F) options.scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
  return options;
}

std::vector<std::int32_t> row_list(const Trace& trace, std::int64_t flat_head, std::int64_t row) {
  const std::int64_t i = flat_head * trace.rows + row;
  return {trace.block.begin() + trace.row_start[i], trace.block.begin() + trace.row_start[i + 1]};
}

std::vector<std::int32_t> head_order(const Trace& trace, std::int64_t flat_head, std::int64_t kv_len) {
  return {trace.order.begin() + flat_head * kv_len, trace.order.begin() + (flat_head + 1) * kv_len};
}

}  // namespace pbsattn::test
