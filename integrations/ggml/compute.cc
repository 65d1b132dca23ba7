#include "compute.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "log.h"
#include "stats.h"

namespace pbsattn::ggml {
namespace {

class Timer {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

Mask mask_of(const AttentionOp& op) {
  const ggml_tensor* mask = op.mask();
  return {.data = static_cast<const std::uint16_t*>(mask->data),
          .queries = op.queries(),
          .keys = mask->ne[0],
          .row_stride = static_cast<std::int64_t>(mask->nb[1] / sizeof(std::uint16_t))};
}

void observe(const AttentionOp& op, const Observer& observer, const ggml_pbsattn_layer_stats& stats) {
  const pbsattn_shape shape = op.shape(stats.kv_len);
  const pbsattn_view q = AttentionOp::view(op.q()), k = AttentionOp::view(op.k()), v = AttentionOp::view(op.v());
  observer.call(observer.user, stats.layer, &shape, &q, &k, &v);
}

}  // namespace

bool PlanCache::Key::operator==(const Key& other) const {
  // Byte by byte: the structs have no padding, and floats of equal value and other bits only get a plan of their own.
  // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
  return heads.size() == other.heads.size() &&
         std::memcmp(heads.data(), other.heads.data(), heads.size() * sizeof heads.front()) == 0 &&
         std::memcmp(&shape, &other.shape, sizeof shape) == 0 &&
         std::memcmp(&device, &other.device, sizeof device) == 0 && workspace_cap == other.workspace_cap;
}

const pbsattn_plan* PlanCache::find(const Key& key, std::string* error) {
  // Models mix at most a few head shapes, and a chunk's shape won't come again; but settings may give each layer its
  // own.
  constexpr std::size_t kept = 128;
  auto entry = std::ranges::find(entries_, key, &Entry::key);
  if (entry == entries_.end()) {
    pbsattn_plan* plan = nullptr;
    const auto create = key.heads.size() == 1 ? pbsattn_plan_create : pbsattn_plan_create_by_head;
    const pbsattn_status status = create(key.heads.data(), &key.shape, &key.device, key.workspace_cap, &plan);
    Entry made{key, {}, ""};
    made.plan.reset(plan);  // owned before anything else can fail
    if (status != PBSATTN_OK) made.error = pbsattn_last_error();
    entries_.push_front(std::move(made));
    if (entries_.size() > kept) entries_.pop_back();
  } else {
    entries_.splice(entries_.begin(), entries_, entry);
  }
  *error = entries_.front().error;
  return entries_.front().plan.get();
}

void Computer::set_abort_callback(ggml_abort_callback callback, void* data) {
  abort_ = callback;
  abort_data_ = data;
  kernel_.set_abort_callback(callback, data);
}

ggml_status Computer::compute(ggml_cgraph* graph) {
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* node = ggml_graph_node(graph, i);
    if (computes_nothing(node) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
    const ggml_status status = is_attention(node) ? compute(AttentionOp{node}) : kernel_.compute(node, threads_);
    if (status != GGML_STATUS_SUCCESS) return status;
    if (abort_ != nullptr && abort_(abort_data_)) return GGML_STATUS_ABORTED;
  }
  return GGML_STATUS_SUCCESS;
}

ggml_status Computer::compute(const AttentionOp& op) {
  const Settings settings = current_settings();
  const Observer observer = current_observer();
  const bool ours = settings.config.mode == GGML_PBSATTN_MODE_PBSATTN;

  ggml_pbsattn_layer_stats stats{};
  stats.layer = op.layer();
  stats.calls = 1;
  stats.q_len = stats.queries = op.queries();
  stats.kv_len = op.k()->ne[1];

  const Timer total;
  ggml_pbsattn_reason reason = examine(op.tensor, settings.config.min_tokens);
  std::optional<CausalRows> rows;
  try {
    if (reason == GGML_PBSATTN_TAKEN && (ours || observer.call != nullptr)) {
      const Timer reading;
      rows = masks_.rows(mask_of(op), stats.layer, threads_);
      stats.mask_seconds = reading.seconds();
      if (rows) {
        stats.kv_len = rows->offset + op.queries();
        const bool plain = op.sinks() == nullptr && op.soft_cap() == 0.0F && rows->window == CausalRows::no_window;
        if (observer.call != nullptr && plain) observe(op, observer, stats);
      } else {
        reason = GGML_PBSATTN_MASK_NOT_CAUSAL;
      }
    }
    if (reason == GGML_PBSATTN_TAKEN) reason = ours && rows ? run(op, *rows, settings, &stats) : GGML_PBSATTN_BY_MODE;
  } catch (const std::exception& wrong) {  // memory is out
    complain(wrong.what());
    reason = GGML_PBSATTN_RUN_FAILED;
  }

  ggml_status status = GGML_STATUS_SUCCESS;
  if (reason != GGML_PBSATTN_TAKEN) status = kernel_.compute(op.tensor, threads_);
  stats.total_seconds = total.seconds();
  if (reason == GGML_PBSATTN_TAKEN && settings.config.check) {
    status = kernel_.compute(op.tensor, threads_);
    if (status == GGML_STATUS_SUCCESS) compare(op, &stats);
  }

  stats.reasons[reason] = 1;
  if (status == GGML_STATUS_SUCCESS) record(stats);
  if (settings.verbose) {
    log(asked_for, fmt::format("layer {}: {} x {} in {:.1f} ms, {}", stats.layer, stats.q_len, stats.kv_len,
                               stats.total_seconds * 1e3,
                               reason == GGML_PBSATTN_TAKEN
                                   ? fmt::format("blocks {}/{}", stats.visited_blocks, stats.causal_blocks)
                                   : fmt::format("by ggml's kernel: {}", ggml_backend_pbsattn_reason_name(reason))));
  }
  return status;
}

ggml_pbsattn_reason Computer::run(const AttentionOp& op, const CausalRows& rows, const Settings& settings,
                                  ggml_pbsattn_layer_stats* stats) {
  const Config& config = settings.config;
  PlanCache::Key key{.heads = {config.options},
                     .shape = op.shape(stats->kv_len),
                     .device = {.struct_size = sizeof(pbsattn_device),
                                .kind = config.device,
                                .threads = threads_,
                                .index = 0,
                                .reserved = 0},
                     .workspace_cap = config.workspace_cap};
  std::string error;
  std::vector<float> weights;
  try {
    const std::int32_t layer = op.layer();
    if (settings.learned != nullptr) key.heads = settings.learned->heads(layer, key.shape.q_heads, key.heads);
    if (settings.layers != nullptr) key.heads = settings.layers->heads(layer, key.shape.q_heads, key.heads);
    const bool may_be_last = ends_.may_be_last(layer, key.shape.q_len, key.shape.kv_len);
    for (pbsattn_options& options : key.heads) {  // what is the model's to say, and the prompt's
      options.scale = op.scale();
      options.softcap = op.soft_cap();
      options.window = static_cast<std::int32_t>(std::min(rows.window, CausalRows::no_window));
      if (!may_be_last) options.dense_last_rows = std::min(options.dense_last_rows, 0);
    }
    weights = order_weights(op, settings, key.shape, key.heads);
  } catch (const std::exception& wrong) {
    complain(wrong.what());
    return GGML_PBSATTN_PLAN_REFUSED;
  }
  // Blocks of keys that no query's window reaches are as if they weren't there.
  const bool windowed = rows.window != CausalRows::no_window;
  const std::int64_t block = std::max(key.heads.front().block, 1);  // whose rule is the plan's to tell
  const std::int64_t left_blocks = std::max<std::int64_t>(rows.offset - rows.window + 1, 0) / block;
  key.shape.kv_len -= left_blocks * block;
  const pbsattn_plan* plan = plans_.find(key, &error);
  if (plan == nullptr) {
    complain(error);
    return GGML_PBSATTN_PLAN_REFUSED;
  }

  float* out = static_cast<float*>(op.tensor->data);
  const std::size_t needed = pbsattn_plan_workspace_size(plan);
  try {
    if (needed > workspace_size_) {
      workspace_size_ = 0;
      workspace_.reset();  // before the larger one is made, so that both never exist
      workspace_ = std::make_unique_for_overwrite<std::byte[]>(needed);
      workspace_size_ = needed;
    }
    if (config.check) {
      scratch_.resize(static_cast<std::size_t>(ggml_nelements(op.tensor)));
      out = scratch_.data();
    }
  } catch (const std::bad_alloc&) {
    complain(fmt::format("{} MiB of workspace can't be had; set PBSATTN_WORKSPACE_CAP_MIB", needed >> 20));
    return GGML_PBSATTN_RUN_FAILED;
  }

  const pbsattn_view q = AttentionOp::view(op.q()), k = AttentionOp::view(op.k(), left_blocks * block),
                     v = AttentionOp::view(op.v(), left_blocks * block);
  const pbsattn_view output = op.output(out);
  const pbsattn_order_weights order_weights{
      .struct_size = sizeof order_weights,
      .values = weights.data(),
      .count = weights.size(),
      .pairs = rope_ && rope_->pairs == RopePairs::neighbours ? PBSATTN_PAIRS_NEIGHBOURS : PBSATTN_PAIRS_HALVES,
      .reserved = 0};
  const LayerCaches::Call cached{.layer = op.layer(),
                                 .plan = plan,
                                 .shape = key.shape,
                                 .k = &k,
                                 .v = &v,
                                 .most_tokens = op.k()->view_src == nullptr ? 0 : op.k()->view_src->ne[1],
                                 .order_weights = weights,
                                 .pairs = order_weights.pairs,
                                 .threads = threads_};
  if (windowed) caches_.drop(op.layer());  // made while the window held the whole sequence
  const LayerCaches::Use kept = windowed ? LayerCaches::Use{} : caches_.before(cached, settings.cache_cap);
  pbsattn_stats run_stats{.struct_size = sizeof run_stats};
  const pbsattn_run run{.struct_size = sizeof run,
                        .q = &q,
                        .k = &k,
                        .v = &v,
                        .out = &output,
                        .lse = nullptr,
                        .workspace = workspace_.get(),
                        .workspace_size = workspace_size_,
                        .stream = nullptr,
                        .stats = &run_stats,
                        .sinks = op.sinks(),
                        .order_weights = weights.empty() ? nullptr : &order_weights,
                        .cache = kept.cache,
                        .cache_valid = kept.valid};
  if (pbsattn_plan_run(plan, &run) != PBSATTN_OK) {
    complain(pbsattn_last_error());
    return GGML_PBSATTN_RUN_FAILED;
  }
  caches_.after(cached, kept);
  stats->visited_blocks = run_stats.visited_blocks;
  const std::int64_t block_rows = (stats->kv_len + block - 1) / block - rows.offset / block;
  stats->causal_blocks = run_stats.causal_blocks + key.shape.q_heads * block_rows * left_blocks;
  stats->permute_seconds = run_stats.permute_seconds;
  stats->select_seconds = run_stats.select_seconds;
  stats->attend_seconds = run_stats.attend_seconds;
  return GGML_PBSATTN_TAKEN;
}

std::vector<float> Computer::order_weights(const AttentionOp& op, const Settings& settings, const pbsattn_shape& shape,
                                           const std::vector<pbsattn_options>& heads) {
  if (const auto rope = op.rope()) rope_ = rope;
  const bool wanted = std::ranges::any_of(heads, [](const pbsattn_options& options) {
    return options.permutation == PBSATTN_PERMUTATION_LEARNED && options.window == CausalRows::no_window;
  });
  if (settings.learned == nullptr) {
    if (wanted) throw std::runtime_error("permutation learned: its weights are in a file; name it in PBSATTN_LEARNED");
    return {};
  }
  if (wanted || settings.learned->with_settings()) settings.learned->require_model(op.layer(), shape);
  return wanted ? settings.learned->weights(op.layer(), rope_) : std::vector<float>();
}

void Computer::compare(const AttentionOp& op, ggml_pbsattn_layer_stats* stats) const {
  const auto* theirs = static_cast<const float*>(op.tensor->data);
  double max_abs = 0, error = 0, norm = 0;
  for (std::size_t i = 0; i < scratch_.size(); ++i) {
    const double difference = static_cast<double>(scratch_[i]) - theirs[i];
    // A NaN on one side only must show; it would vanish in std::max.
    max_abs = std::isnan(difference) && std::isnan(scratch_[i]) != std::isnan(theirs[i])
                  ? std::numeric_limits<double>::infinity()
                  : std::max(max_abs, std::abs(difference));
    error += difference * difference;
    norm += static_cast<double>(theirs[i]) * theirs[i];
  }
  stats->checks = 1;
  stats->check_max_abs = max_abs;
  stats->check_rel_rms = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

void Computer::complain(const std::string& message) noexcept {
  try {
    if (complaints_.insert(message).second)
      log(GGML_LOG_LEVEL_WARN, message + " (this attention is left to ggml's own kernel)");
  } catch (const std::exception&) {  // memory is out: what is left to ggml is left to it without a word
  }
}

}  // namespace pbsattn::ggml
