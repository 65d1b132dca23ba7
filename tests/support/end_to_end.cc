#include "support/end_to_end.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "pbsattn/options.hpp"
#include "reference/definition.h"

namespace pbsattn::test {
namespace {

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::int64_t between(std::int64_t first, std::int64_t last) {
    return first + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(last - first + 1));
  }
  bool one_in(int n) { return between(1, n) == 1; }
  float share() { return static_cast<float>(between(1, 19)) / 20; }
  template <class T>
  T of(const std::vector<T>& values) {
    return values[between(0, std::ssize(values) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

std::vector<KeepRule> rules_of(BlockScore score) {
  switch (score) {
    case BlockScore::none: return {KeepRule::all, KeepRule::none};
    case BlockScore::vertical_slash: return {KeepRule::all, KeepRule::none, KeepRule::vertical_slash};
    case BlockScore::flexible: return {KeepRule::all, KeepRule::none, KeepRule::coverage};
    case BlockScore::two_step: return {KeepRule::all, KeepRule::none, KeepRule::threshold};
    default:
      return {KeepRule::all,      KeepRule::none,  KeepRule::top_p,  KeepRule::threshold,
              KeepRule::relative, KeepRule::top_k, KeepRule::density};
  }
}

// Draws what heads may differ in. Little is kept, since sequences are short.
void draw_numbers(Options& options, Random& random) {
  options.top_p = random.share();
  options.threshold = options.keep == KeepRule::relative ? random.share() : random.share() / 4;
  options.floor_top_p = random.one_in(3) ? random.share() : 0;
  options.top_k = static_cast<int>(random.between(0, 3));
  options.density = random.share();
  options.vertical = static_cast<int>(random.between(20, 60));
  options.slash = static_cast<int>(random.between(40, 140));
  options.tau = static_cast<float>(random.between(0, 10)) / 10;
  options.min_budget = static_cast<int>(random.between(0, options.block));
  options.dense_last_rows = random.one_in(6) ? 1 : 0;
  options.sink_blocks = random.one_in(6) ? 1 : 0;
  options.local_blocks = random.one_in(6) ? 2 : 0;
}

// Bits of `variant`: rules, order scope, correction, dtype.
RandomPlan draw(const PlanLimits& limits, BlockScore score, KeepRule keep, int variant, Random& random) {
  Options options{.score = score, .keep = keep};
  options.rules = static_cast<Rules>(variant & 1);
  options.order_scope = static_cast<OrderScope>(variant >> 1 & 1);
  options.correction = static_cast<Correction>(variant >> 2 & 1);
  options.precision = limits.precision;
  const bool pattern = score == BlockScore::vertical_slash || score == BlockScore::flexible;
  if (!pattern && !random.one_in(4)) options.permutation = Permutation::last_queries;
  options.block = random.of(limits.blocks);
  options.segment = options.block * static_cast<int>(random.between(1, 3));
  draw_numbers(options, random);

  RandomPlan plan;
  Shape& shape = plan.problem.shape;
  shape.batch = random.between(1, 2);
  shape.kv_heads = random.between(1, 2);
  shape.q_heads = shape.kv_heads * random.between(1, 3);
  shape.kv_len = random.between(2 * options.block, std::max<std::int64_t>(limits.most_keys, 5 * options.block));
  shape.q_len = random.one_in(2) ? shape.kv_len : random.between(1, shape.kv_len);
  shape.q_len = std::min(shape.q_len, limits.most_queries);
  shape.head_dim = random.of(limits.head_dims);
  if (limits.value_widths && random.one_in(3)) shape.head_dim_v = random.of(limits.head_dims);
  if (random.one_in(4))
    options.scale = static_cast<float>(random.between(1, 8)) / 4 / std::sqrt(static_cast<float>(shape.head_dim));
  if (limits.layers && random.one_in(3)) options.softcap = static_cast<float>(random.between(1, 20)) / 2;
  if (limits.layers && random.one_in(12)) options.window = static_cast<int>(random.between(1, 2 * options.segment));
  plan.problem.sinks = limits.layers && random.one_in(3);
  plan.problem.seed = random.between(1, 1 << 30);
  const DType dtype = limits.dtypes[(variant >> 3 & 1) % limits.dtypes.size()];
  plan.problem.q = plan.problem.k = plan.problem.v = dtype;
  if (dtype != DType::f32) plan.problem.grid = 0.125;

  // What came later draws from the seed, so that earlier scores' plans stay as they were.
  Random later(plan.problem.seed);
  if (keep == KeepRule::threshold && later.one_in(2))
    options.threshold_tokens = static_cast<float>(later.between(options.block / 4, 2 * options.block));
  if (score == BlockScore::two_step) {
    options.two_step_queries = static_cast<int>(later.between(1, 48));
    options.two_step_exact = static_cast<int>(later.one_in(8) ? later.between(9, 48) : later.between(1, 8));
    options.two_step_reach = static_cast<int>(later.between(1, 8));
  }

  if (options.permutation == Permutation::last_queries && later.one_in(2)) {
    options.permutation = later.one_in(2) ? Permutation::learned : Permutation::arrival;
    options.order_scope = OrderScope::kv_head;
    plan.problem.order_weights = options.permutation == Permutation::learned;
    plan.problem.pairs = later.one_in(2) ? RopePairs::halves : RopePairs::neighbours;
    if (options.permutation == Permutation::arrival && !later.one_in(4)) {
      plan.problem.kept_segment = options.segment;
      plan.problem.known = later.between(0, shape.kv_len / options.segment) * options.segment;
    }
  }

  plan.heads = {options};
  if (random.one_in(2)) return plan;
  plan.heads.assign(shape.q_heads, options);
  for (Options& head : plan.heads) {
    draw_numbers(head, random);
    if (random.one_in(6)) head.keep = KeepRule::all;
    if (random.one_in(6)) head.keep = KeepRule::none;
  }
  return plan;
}

}  // namespace

void PrintTo(const RandomPlan& plan, std::ostream* stream) {
  const Shape& s = plan.problem.shape;
  *stream << s.batch << " x " << s.q_heads << "/" << s.kv_heads << " heads, " << s.q_len << " of " << s.kv_len
          << " tokens, head_dim " << s.head_dim << ", of values " << value_dim(s) << ", dtype "
          << static_cast<int>(plan.problem.q) << ", seed " << plan.problem.seed << "; ";
  for (const Options& head : plan.heads) {
    Options copy = head;
    visit_options(copy, [&](std::string_view name, auto& field) {
      *stream << name << "=";
      if constexpr (std::is_enum_v<std::remove_reference_t<decltype(field)>>)
        *stream << name_of(field) << " ";
      else
        *stream << field << " ";
    });
    *stream << "; ";
  }
}

std::ostream& operator<<(std::ostream& stream, const Agreement& a) {
  return stream << a.plans << " plans, " << a.heads << " heads, " << a.rows << " rows, " << a.sparse_rows
                << " of them without some block; other orders of " << a.other_orders << " heads by key scores at most "
                << a.key_tie << " apart, therefore other lists of " << a.lists_of_other_orders
                << " rows; other lists of " << a.other_lists << " more by ties within " << a.block_tie;
}

std::vector<RandomPlan> random_plans(const PlanLimits& limits, int each) {
  constexpr int variants = 16;
  std::vector<RandomPlan> plans;
  Random random(1);
  for (int score = 0; score <= static_cast<int>(BlockScore::two_step); ++score)
    for (const KeepRule keep : rules_of(static_cast<BlockScore>(score)))
      for (int i = 0; i < each; ++i) {
        const int variant = each >= variants ? i % variants : static_cast<int>(random.between(0, variants - 1));
        plans.push_back(draw(limits, static_cast<BlockScore>(score), keep, variant, random));
      }
  return plans;
}

std::vector<RandomPlan> plans_for_cuda() {
  PlanLimits limits{.dtypes = {DType::bf16, DType::f16},
                    .head_dims = {64, 96, 128, 192, 256},
                    .blocks = {128},
                    .most_keys = 800,
                    .most_queries = 200};
  std::vector<RandomPlan> plans = random_plans(limits, 2);
  limits.layers = true;
  for (RandomPlan& plan : random_plans(limits, 2)) plans.push_back(std::move(plan));
  for (RandomPlan& plan : plans) {
    Shape& shape = plan.problem.shape;
    if (shape.head_dim == 192) shape.head_dim_v = 128;
    if (shape.head_dim != 64 && shape.head_dim != 128)
      for (Options& head : plan.heads) head.softcap = 0;
  }
  return plans;
}

void expect_reference_decisions(const RandomPlan& plan, const Backend& backend, const Tolerance& tolerance,
                                double output_error, Agreement& agreement) {
  Problem problem(plan.problem);
  const RunResult ours = backend(plan, problem);
  const std::vector<double> our_out = outputs_of(problem).out;
  const RunResult truth = run(plan.heads, problem, {.device = Device::reference()});
  const std::vector<double> true_out = outputs_of(problem).out;
  const Shape& shape = problem.shape;
  const Geometry geometry = geometry_of(truth.options, shape);
  ASSERT_EQ(ours.trace.order.size(), truth.trace.order.size());
  ASSERT_EQ(ours.trace.row_start.size(), truth.trace.row_start.size());
  ++agreement.plans;
  // Where nothing is left out, a backend may leave keys where they are.
  const bool dense = truth.stats.density() == 1 && ours.stats.density() == 1;
  if (!dense) expect_order(problem, truth.options, ours.trace, tolerance);
  if (testing::Test::HasFailure()) return;
  for (std::int64_t flat = 0; flat < shape.batch * shape.q_heads; ++flat) {
    SCOPED_TRACE("head " + std::to_string(flat));
    const std::int64_t batch = flat / shape.q_heads;
    const std::int64_t h = flat % shape.q_heads;
    Options options = plan.heads[plan.heads.size() == 1 ? 0 : h];
    options.scale = truth.options.scale;
    if (geometry.windowed()) options = truth.options;
    const auto order = head_order(ours.trace, flat, shape.kv_len);
    const bool same_order = dense || order == head_order(truth.trace, flat, shape.kv_len);
    ++agreement.heads;
    if (!same_order) {
      const double swap = farthest_swap(
          geometry, ordering_scores(problem.inputs(), options, geometry, flat, problem.kept_order()), order);
      ++agreement.other_orders;
      agreement.key_tie = std::max(agreement.key_tie, swap);
    }
    std::optional<reference::Head> head;
    std::optional<reference::Scoring> scoring;
    bool same = same_order;
    for (std::int64_t row = 0; row < geometry.rows(); ++row) {
      SCOPED_TRACE("row " + std::to_string(row));
      const auto list = row_list(ours.trace, flat, row);
      const auto true_list = row_list(truth.trace, flat, row);
      ++agreement.rows;
      if (std::ssize(true_list) <= geometry.diagonal(row)) ++agreement.sparse_rows;
      if (list == true_list) continue;
      if (!head) {
        head = reference::load_head(problem.inputs(), geometry, batch, h);
        scoring = reference::prepare_scores(*head, options, geometry, order);
      }
      const auto tie = tie_behind(*head, options, geometry, row, *scoring, order, list, tolerance.block_score);
      ASSERT_TRUE(tie) << testing::PrintToString(list) << " where the reference lists "
                       << testing::PrintToString(true_list);
      ++(*tie == 0 ? agreement.lists_of_other_orders : agreement.other_lists);
      agreement.block_tie = std::max(agreement.block_tie, *tie);
      same = false;
    }
    if (!same) continue;  // other tests judge outputs of whatever was decided
    const std::int64_t elements = shape.q_len * value_dim(shape);
    double largest = 0;
    double error = 0;
    for (std::int64_t i = flat * elements; i < (flat + 1) * elements; ++i) {
      largest = std::max(largest, std::abs(true_out[i]));
      error = std::max(error, std::abs(our_out[i] - true_out[i]));
      ASSERT_FALSE(std::isnan(our_out[i]));
    }
    ASSERT_LE(error, output_error * largest) << "outputs of the same order and lists";
  }
}

}  // namespace pbsattn::test
