#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "pbsattn/options.hpp"
#include "peak.h"
#include "problem.h"
#include "suites.h"
#ifdef PBSATTN_HAS_GGML
#include "ggml_peer.h"
#endif

namespace bench {
namespace {

using pbsattn::Device;
using pbsattn::Options;
using pbsattn::Shape;

// Makes the plans made in its lifetime take one code path.
class ForcedPath {
 public:
  explicit ForcedPath(const std::string& path) { ::setenv("PBSATTN_CPU_PATH", path.c_str(), 1); }
  ~ForcedPath() { ::unsetenv("PBSATTN_CPU_PATH"); }
  ForcedPath(const ForcedPath&) = delete;
  ForcedPath& operator=(const ForcedPath&) = delete;
};

// Few heads, so that a sample is short: a core seldom stays undisturbed for seconds.
Shape prompt(std::int64_t tokens, std::int64_t head_dim) {
  return {.batch = 1, .q_heads = 2, .kv_heads = 1, .q_len = tokens, .kv_len = tokens, .head_dim = head_dim};
}

// Operations of dense causal attention: two products of 2 * head_dim for each visible pair.
double causal_gflop(const Shape& s) {
  const auto n = static_cast<double>(s.kv_len);
  return 4e-9 * static_cast<double>(s.batch * s.q_heads * s.head_dim) * n * (n + 1) / 2;
}

// Every path is right before it is fast: against the definition, on a short prompt of the same head_dim.
void verify(const std::string& path, std::int64_t head_dim) {
  const Problem problem(prompt(777, head_dim), 1);
  const ForcedPath forced(path);
  Runner ours(problem, pbsattn::method("full"), Device::cpu());
  Runner reference(problem, pbsattn::method("full"), Device::reference());
  ours();
  reference();
  const double error = relative_error(ours.out(), reference.out());
  const double allowed = path.ends_with("bf16") ? 8e-3 : 1e-5;
  if (!(error <= allowed))
    throw std::runtime_error(fmt::format("path {}, head_dim {}: relative error {:.2g} over {:.0g}; not measured", path,
                                         head_dim, error, allowed));
}

// Paths that are there to be right, not fast, would take minutes at these lengths.
std::vector<std::string> measured_paths(const SuiteOptions& options) {
  if (!options.paths.empty()) return options.paths;
  std::vector<std::string> paths = pbsattn::describe_cpu().paths;
  std::erase_if(paths, [](const std::string& path) { return path == "baseline_f32" || path == "sse4_f32"; });
  return paths;
}

Runner runner_on(const std::string& path, const Problem& problem, const Options& method, int threads) {
  const ForcedPath forced(path);
  return Runner(problem, method, Device::cpu(threads));
}

// What counts of values that a function noted each time it ran, the unmeasured first time too.
std::vector<double> after_warm_up(const Samples& samples, const std::vector<double>& noted) {
  return samples.counted(std::span(noted).subspan(1));
}

// Puts a measurement beside what a peer took in the same samples.
Measurement against(const std::string& peer, double seconds, double ratio, const Samples& samples, Measurement ours) {
  ours.peer = peer;
  ours.peer_value = seconds;
  ours.ratio = ratio;
  ours.samples = samples;
  return ours;
}

double rounded(double value) {
  return std::round(value * 1000) / 1000;
}

void peak(const SuiteOptions& options, Report& report) {
  for (const std::string& path : measured_paths(options)) {
    const double rate = peak_rate(path);
    if (rate == 0) continue;
    report.add({.name = "peak",
                .params = {{"path", path}, {"threads", 1}},
                .metric = "rate of multiply-adds in registers",
                .unit = "GFLOP/s",
                .value = rate});
  }
  report.add({.name = "peak",
              .params = {{"path", "memory"}, {"threads", 1}},
              .metric = "rate of reading",
              .unit = "GB/s",
              .value = read_bandwidth()});
}

void dense(const SuiteOptions& options, Report& report, std::int64_t tokens, std::int64_t head_dim) {
  const Problem problem(prompt(tokens, head_dim), static_cast<unsigned>(tokens + head_dim));
  const double gflop = causal_gflop(problem.shape);
  std::vector<Runner> ours;
  std::vector<std::function<void()>> functions;
  for (const std::string& path : measured_paths(options)) {
    verify(path, head_dim);
    ours.push_back(runner_on(path, problem, pbsattn::method("full"), options.sampling.threads));
  }
  for (Runner& runner : ours) functions.emplace_back([&runner] { runner(); });
#ifdef PBSATTN_HAS_GGML
  GgmlAttention ggml(problem, options.sampling.threads);
  functions.emplace_back([&ggml] { ggml(); });
#endif
  const auto samples = sample(options.sampling, functions);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    Measurement m{.name = "dense",
                  .params = {{"n", tokens},
                             {"head_dim", head_dim},
                             {"threads", options.sampling.threads},
                             {"path", ours[i].path()}},
                  .metric = "rate",
                  .unit = "GFLOP/s",
                  .value = gflop / median(samples[i].counted()),
                  .samples = samples[i]};
#ifdef PBSATTN_HAS_GGML
    if (const double error = relative_error(ours[i].out(), ggml.out()); !(error < 1e-2))
      throw std::runtime_error(fmt::format("path {}: differs from ggml's result by {:.2g}", ours[i].path(), error));
    m.peer = "ggml";
    m.peer_value = gflop / median(samples.back().counted());
    m.ratio = m.value / m.peer_value;
#endif
    report.add(m);
  }
}

// Time of sparse attention over dense at the same length: its floor is the density.
void sparse(const SuiteOptions& options, Report& report, const std::string& path, std::int64_t tokens,
            std::int64_t head_dim) {
  const Problem problem(prompt(tokens, head_dim), static_cast<unsigned>(tokens + head_dim + 1));
  Runner dense_runner = runner_on(path, problem, pbsattn::method("full"), options.sampling.threads);
  for (const float top_p : {0.1F, 0.15F, 0.25F, 0.5F, 0.75F}) {
    Options pbs = pbsattn::method("pbs");
    pbs.top_p = top_p;
    Runner runner = runner_on(path, problem, pbs, options.sampling.threads);
    std::vector<double> attending;
    std::vector<double> dense_attending;
    const auto samples = sample(options.sampling, {[&] {
                                                     runner();
                                                     attending.push_back(runner.stats().attend_seconds);
                                                   },
                                                   [&] {
                                                     dense_runner();
                                                     dense_attending.push_back(dense_runner.stats().attend_seconds);
                                                   }});
    const double ours = median(samples[0].counted());
    const double theirs = median(samples[1].counted());
    const double density = runner.stats().density();
    const nlohmann::json params{{"n", tokens},
                                {"head_dim", head_dim},
                                {"threads", options.sampling.threads},
                                {"path", path},
                                {"density", rounded(density)}};
    report.add(against("dense", theirs, theirs / ours, samples[0],
                       {.name = "sparse",
                        .params = params,
                        .metric = "time / dense - density",
                        .unit = "of dense",
                        .value = ours / theirs - density}));
    const double pair = median(after_warm_up(samples[0], attending)) / density;
    const double dense_pair = median(after_warm_up(samples[1], dense_attending));
    report.add(against("dense", dense_pair, dense_pair / pair, samples[0],
                       {.name = "lists",
                        .params = params,
                        .metric = "seconds of attend at density 1 if all pairs took as long",
                        .unit = "s",
                        .value = pair}));
  }
}

// Methods whose stages before attention are measured.
struct Choosing {
  const char* name;  // in records
  const char* text;
};
constexpr Choosing choosing[] = {
    {"pbs", "pbs"},
    {"two-step", "two-step"},
    {"two-step, learned order", "two-step:permutation=learned:order_scope=kv_head"},
    {"pbs-two-step, an order for each KV head", "pbs-two-step:order_scope=kv_head"},
};

// What comes before attention, as a share of dense attention's time: one group of SmolLM2-135M (9 query heads on 3 KV
// heads of 64) or of Qwen2.5-1.5B (12 on 2 of 128). Of such keys two-step scores read about the half exactly, as of
// real prompts of 8K and 32K (docs/dev/cpu-vectors.md).
void stages(const SuiteOptions& options, Report& report, const std::string& path, std::int64_t tokens,
            std::int64_t head_dim) {
  Shape shape = prompt(tokens, head_dim);
  shape.q_heads = head_dim > 64 ? 6 : 3;
  Problem problem(shape, static_cast<unsigned>(tokens));
  problem.concentrate(0.75F * std::sqrt(static_cast<float>(head_dim)), static_cast<unsigned>(head_dim));
  Runner dense_runner = runner_on(path, problem, pbsattn::method("full"), options.sampling.threads);
  for (const Choosing& method : choosing) {
    Runner runner = runner_on(path, problem, pbsattn::parse_method(method.text), options.sampling.threads);
    std::vector<double> permute, select, before, dense;
    const auto samples = sample(options.sampling,
                                {[&] {
                                   runner();
                                   const auto& stats = runner.stats();
                                   permute.push_back(stats.permute_seconds);
                                   select.push_back(stats.select_seconds);
                                   before.push_back(stats.permute_seconds + stats.select_seconds);
                                 },
                                 [&] {
                                   dense_runner();
                                   const auto& stats = dense_runner.stats();
                                   dense.push_back(stats.permute_seconds + stats.select_seconds + stats.attend_seconds);
                                 }});
    const double whole = median(after_warm_up(samples[1], dense));
    const auto share = [&](const std::vector<double>& seconds) {
      return median(after_warm_up(samples[0], seconds)) / whole;
    };
    report.add(against("dense", whole, 1 / share(before), samples[0],
                       {.name = "stages",
                        .params = {{"n", tokens},
                                   {"head_dim", head_dim},
                                   {"q_heads", shape.q_heads},
                                   {"kv_heads", 1},
                                   {"threads", options.sampling.threads},
                                   {"path", path},
                                   {"method", method.name},
                                   {"density", rounded(runner.stats().density())},
                                   {"permute", rounded(share(permute))},
                                   {"select", rounded(share(select))}},
                        .metric = "time before attention, packing included",
                        .unit = "of dense",
                        .value = share(before)}));
  }
}

void two_threads(const SuiteOptions& options, Report& report, const std::string& path, std::int64_t tokens) {
  if (pbsattn::describe_cpu().threads < 2) return;
  const Problem problem(prompt(tokens, 128), 5);
  Runner one = runner_on(path, problem, pbsattn::method("pbs"), 1);
  Runner two = runner_on(path, problem, pbsattn::method("pbs"), 2);
  Sampling sampling = options.sampling;
  sampling.threads = 2;
  sampling.clock = Clock::wall;
  const auto samples = sample(sampling, {[&] { two(); }, [&] { one(); }});
  const double seconds = median(samples[0].counted());
  const double one_seconds = median(samples[1].counted());
  if (one.out() != two.out()) throw std::runtime_error("the result depends on the number of threads");
  report.add(against("one", one_seconds, one_seconds / seconds, samples[0],
                     {.name = "threads",
                      .params = {{"n", tokens}, {"head_dim", 128}, {"threads", 2}, {"path", path}},
                      .metric = "time",
                      .unit = "s",
                      .value = seconds}));
}

}  // namespace

void run_cpu_suite(const SuiteOptions& options, Report& report) {
  const auto wanted = [&](const char* name) { return std::ranges::find(options.cases, name) != options.cases.end(); };
  const std::int64_t longest = std::ranges::max(options.tokens);
  const std::vector<std::string> paths = measured_paths(options);
  if (wanted("peak")) peak(options, report);
  for (const std::int64_t head_dim : options.head_dims)
    for (const std::int64_t tokens : options.tokens)
      if (wanted("dense")) dense(options, report, tokens, head_dim);
  for (const std::string& path : paths) {
    for (const std::int64_t head_dim : options.head_dims)
      if (wanted("sparse")) sparse(options, report, path, longest, head_dim);
    for (const std::int64_t head_dim : options.head_dims)
      for (const std::int64_t tokens : options.tokens)
        if (wanted("stages")) stages(options, report, path, tokens, head_dim);
    if (wanted("threads")) two_threads(options, report, path, longest);
  }
}

}  // namespace bench
