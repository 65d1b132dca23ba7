// The stages in their order, head by head.
#include "core/executor.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/stopwatch.h"
#include "core/validation/validate.h"
#include "reference/definition.h"
#include "reference/numbers.h"

namespace pbsattn::reference {
namespace {

std::vector<double> mean_group_scores(const Inputs& inputs, const Geometry& geometry, std::int64_t batch,
                                      std::int64_t kv_head, const Logits& logits) {
  std::vector<double> mean(geometry.permuted_len(), 0.0);
  for (std::int64_t h = kv_head * geometry.group(); h < (kv_head + 1) * geometry.group(); ++h) {
    const auto scores = key_scores(load_head(inputs, geometry, batch, h), geometry, logits);
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] += scores[n] / static_cast<double>(geometry.group());
  }
  return mean;
}

std::vector<double> ordering_scores(const Inputs& inputs, const Head& head, const Options& options,
                                    const Geometry& geometry, std::int64_t batch, std::int64_t kv_head) {
  const Logits logits(options);
  switch (options.permutation) {
    case Permutation::none: break;
    case Permutation::last_queries:
      if (options.order_scope == OrderScope::query_head) return key_scores(head, geometry, logits);
      [[fallthrough]];
    case Permutation::arrival: return mean_group_scores(inputs, geometry, batch, kv_head, logits);
    case Permutation::learned: {
      const auto& [weights, pairs] = inputs.order_weights;
      const std::size_t count = weights.size() / static_cast<std::size_t>(geometry.shape.kv_heads);
      return learned_scores(head, geometry, weights.subspan(static_cast<std::size_t>(kv_head) * count, count), pairs);
    }
  }
  return std::vector<double>(geometry.permuted_len(), 0.0);
}

std::vector<std::int32_t> permute(const Inputs& inputs, const Head& head, const Options& options,
                                  const Geometry& geometry, std::int64_t batch, std::int64_t kv_head,
                                  const KeyOrder& kept) {
  auto order = order_keys(geometry, ordering_scores(inputs, head, options, geometry, batch, kv_head));
  if (options.permutation != Permutation::arrival || kept.data == nullptr) return order;
  std::int32_t* const memory = kept.data + batch * kept.batch_stride + kv_head * kept.head_stride;
  std::copy_n(memory, kept.known, order.begin());
  std::copy_n(order.begin(), geometry.permuted_len(), memory);
  return order;
}

// Decides orders and lists of all heads. `heads` are the options of all heads, or of each.
void decide_timed(const Inputs& inputs, std::span<const Options> heads, const Geometry& geometry,
                  const KeyOrder& kept_order, Trace& trace, Stats& stats) {
  trace = detail::start_trace(geometry);
  Stopwatch watch;
  for (std::int64_t batch = 0; batch < geometry.shape.batch; ++batch) {
    for (std::int64_t h = 0; h < geometry.shape.q_heads; ++h) {
      const Options& options = heads[heads.size() == 1 ? 0 : h];
      const Head head = load_head(inputs, geometry, batch, h);
      const auto order = permute(inputs, head, options, geometry, batch, geometry.kv_head(h), kept_order);
      stats.permute_seconds += watch.lap();

      const Scoring scoring = prepare_scores(head, options, geometry, order);
      for (std::int64_t row = 0; row < geometry.rows(); ++row) {
        const auto list =
            select_blocks(options, geometry, row, row_scores(head, options, geometry, row, order, scoring), order);
        trace.block.insert(trace.block.end(), list.begin(), list.end());
        trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
      }
      trace.order.insert(trace.order.end(), order.begin(), order.end());
      stats.select_seconds += watch.lap();
    }
  }
  stats.visited_blocks = static_cast<std::int64_t>(trace.block.size());
  stats.causal_blocks = geometry.shape.batch * geometry.shape.q_heads * geometry.causal_blocks_per_head();
}

// Allocates for itself and takes no workspace, so no cap binds it.
class ReferenceExecutor final : public detail::Executor {
 public:
  using Executor::Executor;

  std::size_t workspace_size() const noexcept override { return 0; }
  std::string_view path() const noexcept override { return "reference"; }

  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> /*workspace*/, Stats* stats,
           Trace* trace) const override {
    Stats own_stats;
    Trace own_trace;
    validate_contents(inputs, outputs, spec.geometry);
    decide_timed(inputs, spec.option_sets(), spec.geometry, outputs.order, own_trace, own_stats);
    Stopwatch watch;
    attend(inputs, spec.options, spec.geometry, own_trace, outputs);
    own_stats.attend_seconds = watch.lap();
    if (stats != nullptr) *stats = own_stats;
    if (trace != nullptr) *trace = std::move(own_trace);
  }
};

}  // namespace

Trace decide(const Inputs& inputs, const Options& options, const Geometry& geometry, const KeyOrder& order) {
  Trace trace;
  Stats stats;
  decide_timed(inputs, std::span(&options, 1), geometry, order, trace, stats);
  return trace;
}

void attend(const Inputs& inputs, const Options& options, const Geometry& geometry, const Trace& trace,
            const Outputs& outputs) {
  const Shape& shape = geometry.shape;
  const Logits logits(options);
  const View& out = outputs.out;
  for (std::int64_t flat = 0; flat < shape.batch * shape.q_heads; ++flat) {
    const std::int64_t batch = flat / shape.q_heads;
    const std::int64_t h = flat % shape.q_heads;
    const Head head = load_head(inputs, geometry, batch, h);
    const auto order = std::span(trace.order).subspan(flat * shape.kv_len, shape.kv_len);
    std::optional<PooledBlocks> pooled;
    if (options.correction == Correction::mean)
      pooled = {pool_keys(head, geometry, order), pool_values(head, geometry, order)};
    for (std::int64_t query = 0; query < shape.q_len; ++query) {
      const std::int64_t row = (geometry.q_offset() + query) / geometry.block - geometry.first_row();
      const std::int64_t begin = trace.row_start[flat * geometry.rows() + row];
      const std::int64_t end = trace.row_start[flat * geometry.rows() + row + 1];
      const auto list = std::span(trace.block).subspan(begin, end - begin);
      const QueryResult result = attend_query(head, geometry, logits, query, order, list, pooled ? &*pooled : nullptr);
      for (std::int64_t d = 0; d < value_dim(shape); ++d)
        store(out.dtype, out.data, batch * out.batch_stride + h * out.head_stride + query * out.token_stride + d,
              result.out[d]);
      if (outputs.lse != nullptr) outputs.lse[flat * shape.q_len + query] = static_cast<float>(result.lse);
    }
  }
}

std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec) {
  detail::PlanSpec resolved = spec;
  resolved.options.fallback = Fallback::never;  // nobody runs it for speed
  return std::make_unique<ReferenceExecutor>(resolved);
}

}  // namespace pbsattn::reference
