#include "stats.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "core/capi/sized_struct.h"
#include "guard.h"
#include "log.h"

PBSATTN_SIZED_STRUCT(ggml_pbsattn_layer_stats, check_rel_rms, 384);
static_assert(GGML_PBSATTN_REASON_COUNT <= GGML_PBSATTN_REASONS_MAX);

namespace pbsattn::ggml {
namespace {

constexpr std::array<const char*, GGML_PBSATTN_REASON_COUNT> reason_names = {
    "taken", "by mode", "few tokens", "tensor types",    "head_dim",     "layout",     "sinks",         "soft-cap",
    "ALiBi", "top-k",   "no mask",    "mask not causal", "plan refused", "run failed", "unknown inputs"};

static_assert(reason_names.back() != nullptr, "a name for each reason");

struct Table {
  std::mutex mutex;
  std::map<std::int32_t, ggml_pbsattn_layer_stats> layers;
  std::atomic<std::uint32_t> refusals{0};
  bool unreported = false;
};

Table& table() noexcept {
  return immortal<Table>();
}

std::string line(const ggml_pbsattn_layer_stats& s) {
  std::string text =
      fmt::format("layer {:>3}: {} calls, {} queries, last {} x {}", s.layer, s.calls, s.queries, s.q_len, s.kv_len);
  if (s.causal_blocks > 0) {
    text +=
        fmt::format(", blocks {}/{} (density {:.3f}), permute {:.1f} select {:.1f} attend {:.1f} ms", s.visited_blocks,
                    s.causal_blocks, static_cast<double>(s.visited_blocks) / static_cast<double>(s.causal_blocks),
                    s.permute_seconds * 1e3, s.select_seconds * 1e3, s.attend_seconds * 1e3);
  }
  text += fmt::format(", total {:.1f} ms", s.total_seconds * 1e3);
  for (int r = 0; r < GGML_PBSATTN_REASON_COUNT; ++r)
    if (s.reasons[r] > 0) text += fmt::format(", {} {}", s.reasons[r], reason_names[r]);
  if (s.checks > 0)
    text +=
        fmt::format(", checked {}: max abs {:.2e}, relative RMS {:.2e}", s.checks, s.check_max_abs, s.check_rel_rms);
  return text;
}

}  // namespace

void record(const ggml_pbsattn_layer_stats& op) {
  Table& shared = table();
  const std::lock_guard lock(shared.mutex);
  ggml_pbsattn_layer_stats& sum = shared.layers[op.layer];
  sum.struct_size = sizeof sum;
  sum.layer = op.layer;
  sum.calls += op.calls;
  sum.q_len = op.q_len;
  sum.kv_len = op.kv_len;
  sum.queries += op.queries;
  sum.visited_blocks += op.visited_blocks;
  sum.causal_blocks += op.causal_blocks;
  sum.permute_seconds += op.permute_seconds;
  sum.select_seconds += op.select_seconds;
  sum.attend_seconds += op.attend_seconds;
  sum.mask_seconds += op.mask_seconds;
  sum.total_seconds += op.total_seconds;
  for (int r = 0; r < GGML_PBSATTN_REASON_COUNT; ++r) sum.reasons[r] += op.reasons[r];
  sum.checks += op.checks;
  sum.check_max_abs = std::max(sum.check_max_abs, op.check_max_abs);
  sum.check_rel_rms = std::max(sum.check_rel_rms, op.check_rel_rms);
  shared.unreported = true;
}

void record_refusal(ggml_pbsattn_reason reason) {
  table().refusals.fetch_or(std::uint32_t{1} << reason, std::memory_order_relaxed);
}

void report(const Settings& settings, bool at_exit) {
  const bool to_log = settings.stats_target == "1";
  if (settings.stats_target.empty() || (to_log && at_exit)) return;

  Table& shared = table();
  std::vector<std::string> lines;
  {
    const std::lock_guard lock(shared.mutex);
    if (!shared.unreported) return;
    shared.unreported = false;
    for (const auto& [layer, stats] : shared.layers) lines.push_back(line(stats));
  }
  if (to_log) {
    for (const std::string& text : lines) log(asked_for, text);
    return;
  }
  std::FILE* file = std::fopen(settings.stats_target.c_str(), "w");
  bool written = file != nullptr;
  for (const std::string& text : lines) written = written && std::fputs((text + "\n").c_str(), file) >= 0;
  if (file != nullptr) written = std::fclose(file) == 0 && written;
  if (!written && !at_exit)
    log(GGML_LOG_LEVEL_ERROR, fmt::format("PBSATTN_STATS \"{}\": can't be written; name a file in a folder that "
                                          "exists and is yours, or set 1 for the log",
                                          settings.stats_target));
}

}  // namespace pbsattn::ggml

using pbsattn::ggml::table;

extern "C" {

const char* ggml_backend_pbsattn_reason_name(ggml_pbsattn_reason reason) {
  const auto index = static_cast<std::size_t>(reason);
  return index < pbsattn::ggml::reason_names.size() ? pbsattn::ggml::reason_names[index] : "unknown";
}

void ggml_backend_pbsattn_stats_reset(void) {
  auto& shared = table();
  const std::lock_guard lock(shared.mutex);
  shared.layers.clear();
  shared.refusals = 0;
  shared.unreported = false;
}

size_t ggml_backend_pbsattn_stats_get(ggml_pbsattn_layer_stats* layers, size_t capacity) {
  size_t count = SIZE_MAX;
  pbsattn::ggml::explained([&] {
    const pbsattn::StructArray<ggml_pbsattn_layer_stats> entries(layers, capacity, "layers");
    auto& shared = table();
    const std::lock_guard lock(shared.mutex);
    size_t index = 0;
    for (const auto& [layer, stats] : shared.layers) {
      if (index == capacity) break;
      pbsattn::write_struct(entries[index], entries.name(index), stats);
      ++index;
    }
    count = shared.layers.size();
  });
  return count;
}

uint32_t ggml_backend_pbsattn_refusals(void) {
  return table().refusals.load(std::memory_order_relaxed);
}
}
