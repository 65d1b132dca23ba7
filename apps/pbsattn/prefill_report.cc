#include "prefill_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

namespace app {
namespace {

double density_of(const ggml_pbsattn_layer_stats& layer) {
  return layer.causal_blocks == 0
             ? 1.0
             : static_cast<double>(layer.visited_blocks) / static_cast<double>(layer.causal_blocks);
}

std::pair<double, double> density_range(const Run& run) {
  std::pair<double, double> range{1.0, 1.0};
  if (run.attention.by_ggml || run.layers.empty()) return range;
  const auto [low, high] = std::ranges::minmax(run.layers, {}, density_of);
  return {density_of(low), density_of(high)};
}

double stage_seconds(const Run& run, double ggml_pbsattn_layer_stats::*stage) {
  double sum = 0;
  for (const auto& layer : run.layers) sum += layer.*stage;
  return sum;
}

std::string density_text(const Run& run) {
  if (run.density() == 1.0) return "1";
  const auto [low, high] = density_range(run);
  return fmt::format("{:.3f} ({:.2f}-{:.2f})", run.density(), low, high);
}

// A change of mean negative log-likelihood as one of perplexity.
std::string change_text(const Estimate& nll_change) {
  const double ratio = std::exp(nll_change.mean);
  return fmt::format("{:+.2f} ±{:.2f} %", 100 * (ratio - 1), 100 * ratio * nll_change.standard_error);
}

std::string fidelity_text(const Run& run, const std::string& reference) {
  const auto& divergence = run.fidelity.divergence;
  if (run.attention.name == reference)
    return fmt::format("{:10.4f}   (what the others are measured against)", run.fidelity.perplexity);
  if (!divergence) return fmt::format("{:10.4f}", run.fidelity.perplexity);
  return fmt::format("{:10.4f} {:>14} {:8.5f} {:8.5f} {:6.1f} % {:>5}", run.fidelity.perplexity,
                     change_text(divergence->nll_change), divergence->kl_mean, divergence->kl_last,
                     100 * divergence->top1_mean, divergence->top1_last ? "same" : "other");
}

// Text on one line, as a C string would have it.
std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// What the times are worth, where that is in doubt.
std::string disturbance(const PrefillReport& report) {
  std::string text;
  for (const Run& run : report.runs) {
    if (run.repeats > 0)
      text +=
          fmt::format("\n{} was timed {} times, of which the best counts: the machine was busy with something else.",
                      run.attention.name, run.repeats + 1);
  }
  if (const Run* run = report.disturbed()) {
    const auto [least, most] = std::ranges::minmax(report.runs, {}, &Run::other_seconds);
    text += fmt::format(
        "\nDisturbed: all but attention is the same work in every run, but took {:.2f} to {:.2f} s, in {} longer than\n"
        "another run as a whole. Don't rely on the speed-ups; measure again on an idle machine.",
        least.other_seconds(), most.other_seconds(), run->attention.name);
  }
  return text;
}

std::string footer(const PrefillReport& report) {
  const Run& baseline = report.runs.front();
  std::string text = fmt::format(
      "\nIf attention took no time, the first token would come after {:.2f} s instead of {:.2f} s: {:.2f}x.",
      baseline.other_seconds(), baseline.first_token_seconds, report.bound());
  if (report.runs.size() > 1) {
    const double reached = baseline.first_token_seconds / report.runs.back().first_token_seconds;
    const std::string& name = report.runs.back().attention.name;
    if (reached <= report.bound() || report.disturbed() == nullptr)
      text += fmt::format(" {} reaches {:.2f}x, {:.0f} % of that.", name, reached,
                          std::min(100.0, 100 * reached / report.bound()));
    else
      text += fmt::format(" {} reaches {:.2f}x, which is more than can be.", name, reached);
  }
  text += disturbance(report);
  text += fmt::format(
      "\nPerplexity, its change against {} (± standard error, token by token), KL divergence (nats) and agreement of "
      "the\n"
      "most likely token: at {} positions of the prompt, evenly spaced, and at the last. The output layer runs on "
      "these\n"
      "positions in every run alike.\n",
      report.reference, report.positions - 1);
  if (!report.left_to_ggml.empty()) {
    text += fmt::format("Some attention was left to ggml's kernel in every run: {}.\n", report.left_to_ggml);
  }
  const bool generated = std::ranges::any_of(report.runs, [](const Run& run) { return !run.continuation.empty(); });
  if (generated) {
    text += "\nGreedy continuations:\n";
    for (const Run& run : report.runs) {
      text += fmt::format("  {:<14} {}\n", run.attention.name, quoted(run.continuation_text));
    }
  }
  return text;
}

nlohmann::json run_json(const Run& run, const PrefillReport& report) {
  const Run& baseline = report.runs.front();
  const auto [low, high] = density_range(run);
  auto layers = nlohmann::json::array();
  for (const auto& layer : run.layers) {
    layers.push_back({{"layer", layer.layer},
                      {"density", run.attention.by_ggml ? 1.0 : density_of(layer)},
                      {"seconds", layer.total_seconds}});
  }
  nlohmann::json json = {{"name", run.attention.name},
                         {"first_token_seconds", run.first_token_seconds},
                         {"attention_seconds", run.attention_seconds()},
                         {"other_seconds", run.other_seconds()},
                         {"repeats", run.repeats},
                         {"attention_share", run.attention_seconds() / run.first_token_seconds},
                         {"stages",
                          {{"mask_seconds", stage_seconds(run, &ggml_pbsattn_layer_stats::mask_seconds)},
                           {"permute_seconds", stage_seconds(run, &ggml_pbsattn_layer_stats::permute_seconds)},
                           {"select_seconds", stage_seconds(run, &ggml_pbsattn_layer_stats::select_seconds)},
                           {"attend_seconds", stage_seconds(run, &ggml_pbsattn_layer_stats::attend_seconds)}}},
                         {"speedup", baseline.first_token_seconds / run.first_token_seconds},
                         {"density", {{"mean", run.density()}, {"min", low}, {"max", high}}},
                         {"layers", layers},
                         {"perplexity", run.fidelity.perplexity},
                         {"continuation", {{"text", run.continuation_text}, {"tokens", run.continuation}}}};
  if (!run.attention.by_ggml) json["options"] = to_json(run.attention.options);
  if (const auto& divergence = run.fidelity.divergence) {
    json["nll_change"] = {{"mean", divergence->nll_change.mean},
                          {"standard_error", divergence->nll_change.standard_error}};
    json["kl_mean"] = divergence->kl_mean;
    json["kl_last"] = divergence->kl_last;
    json["top1_mean"] = divergence->top1_mean;
    json["top1_last"] = divergence->top1_last;
  }
  if (report.each_position) {
    const Each& each = run.fidelity.each;
    json["each"] = {{"position", each.position}, {"nll", each.nll}, {"kl", each.kl}, {"same_top1", each.same_top1}};
  }
  return json;
}

}  // namespace

double Run::attention_seconds() const {
  return stage_seconds(*this, &ggml_pbsattn_layer_stats::total_seconds);
}

double Run::other_seconds() const {
  return first_token_seconds - attention_seconds();
}

void Run::time_again(double seconds, std::vector<ggml_pbsattn_layer_stats> again) {
  ++repeats;
  if (seconds >= first_token_seconds) return;
  first_token_seconds = seconds;
  layers = std::move(again);
}

double Run::density() const {
  std::int64_t visited = 0;
  std::int64_t causal = 0;
  for (const auto& layer : layers) {
    visited += layer.visited_blocks;
    causal += layer.causal_blocks;
  }
  if (attention.by_ggml || causal == 0) return 1.0;
  return static_cast<double>(visited) / static_cast<double>(causal);
}

double PrefillReport::bound() const {
  const Run& baseline = runs.front();
  return baseline.first_token_seconds / baseline.other_seconds();
}

Run* PrefillReport::disturbed() {
  const auto worst = std::ranges::max_element(runs, {}, &Run::other_seconds);
  const auto quickest = std::ranges::min_element(runs, {}, &Run::first_token_seconds);
  constexpr double noise = 1.02;  // of timings on a machine left alone: what counts where attention is a small share
  return worst->other_seconds() > noise * quickest->first_token_seconds ? &*worst : nullptr;
}

std::string table(const PrefillReport& report) {
  const pbsattn::DeviceInfo cpu = pbsattn::describe_cpu();
  std::string text = fmt::format("{} ({}), {} tokens of {}\n{}, {} thread(s)\n\n",
                                 std::filesystem::path(report.model.path).filename().string(), report.model.description,
                                 report.prompt_tokens, std::filesystem::path(report.prompt_file).filename().string(),
                                 cpu.processor, report.threads);
  std::size_t name_width = 14;
  for (const Run& run : report.runs) name_width = std::max(name_width, run.attention.name.size());
  text += fmt::format("{:<{}} {:>11} {:>8} {:>10} {:>6} {:>19} {:>10} {:>14} {:>8} {:>8} {:>8} {:>5}\n", "attention",
                      name_width, "first token", "speed-up", "attention", "share", "density (layers)", "perplexity",
                      "change", "KL mean", "KL last", "top-1", "last");
  for (const Run& run : report.runs) {
    text += fmt::format("{:<{}} {:>9.2f} s {:>7.2f}x {:>8.2f} s {:>4.0f} % {:>19} {}\n", run.attention.name, name_width,
                        run.first_token_seconds, report.runs.front().first_token_seconds / run.first_token_seconds,
                        run.attention_seconds(), 100 * run.attention_seconds() / run.first_token_seconds,
                        density_text(run), fidelity_text(run, report.reference));
  }
  return text + footer(report);
}

nlohmann::json to_json(const PrefillReport& report) {
  const pbsattn::DeviceInfo cpu = pbsattn::describe_cpu();
  auto runs = nlohmann::json::array();
  for (const Run& run : report.runs) runs.push_back(run_json(run, report));
  return {{"program", "pbsattn prefill"},
          {"version", pbsattn::version()},
          {"device", {{"processor", cpu.processor}, {"f32_path", cpu.f32_path}, {"bf16_path", cpu.bf16_path}}},
          {"threads", report.threads},
          {"model",
           {{"file", std::filesystem::path(report.model.path).filename().string()},
            {"description", report.model.description},
            {"layers", report.model.layers},
            {"q_heads", report.model.q_heads},
            {"kv_heads", report.model.kv_heads},
            {"context", report.model.context}}},
          {"prompt",
           {{"file", std::filesystem::path(report.prompt_file).filename().string()},
            {"tokens", report.prompt_tokens},
            {"context", report.context},
            {"ubatch", report.ubatch}}},
          {"positions", report.positions},
          {"reference", report.reference},
          {"left_to_ggml", report.left_to_ggml},
          {"baseline", report.runs.front().attention.name},
          {"bound_speedup", report.bound()},
          {"disturbed", report.disturbed() != nullptr},
          {"runs", runs}};
}

}  // namespace app
