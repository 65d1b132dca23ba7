#include <fmt/format.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <stdexcept>

#include "problem.h"
#include "suites.h"
#ifdef PBSATTN_HAS_GGML
#include "ggml_peer.h"
#endif

namespace bench {
namespace {

using pbsattn::Device;
using pbsattn::Options;
using pbsattn::Precision;
using pbsattn::Shape;

// Makes the plans made in its lifetime take one code path.
class ForcedPath {
 public:
  explicit ForcedPath(const std::string& path) { ::setenv("PBSATTN_CPU_PATH", path.c_str(), 1); }
  ~ForcedPath() { ::unsetenv("PBSATTN_CPU_PATH"); }
  ForcedPath(const ForcedPath&) = delete;
  ForcedPath& operator=(const ForcedPath&) = delete;
};

Shape prompt(std::int64_t tokens, std::int64_t head_dim) {
  return {.batch = 1, .q_heads = 4, .kv_heads = 2, .q_len = tokens, .kv_len = tokens, .head_dim = head_dim};
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

void dense(const SuiteOptions& options, Report& report, std::int64_t tokens, std::int64_t head_dim) {
  const Problem problem(prompt(tokens, head_dim), static_cast<unsigned>(tokens + head_dim));
  const double gflop = causal_gflop(problem.shape);
  std::vector<Runner> ours;
  std::vector<std::function<void()>> functions;
  for (const std::string& path : pbsattn::describe_cpu().paths) {
    if (path == "baseline_f32") continue;  // there to be right, not fast: minutes at this length
    verify(path, head_dim);
    const ForcedPath forced(path);
    ours.emplace_back(problem, pbsattn::method("full"), Device::cpu(options.threads));
  }
  for (Runner& runner : ours) functions.emplace_back([&runner] { runner(); });
#ifdef PBSATTN_HAS_GGML
  GgmlAttention ggml(problem, options.threads);
  functions.emplace_back([&ggml] { ggml(); });
#endif
  const auto seconds = interleave(options.runs, functions);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    Measurement m{
        .name = "dense",
        .params = {{"n", tokens}, {"head_dim", head_dim}, {"threads", options.threads}, {"path", ours[i].path()}},
        .metric = "rate",
        .unit = "GFLOP/s",
        .value = gflop / median(seconds[i]),
        .peer = "",
        .runs = options.runs,
        .spread = spread(seconds[i])};
#ifdef PBSATTN_HAS_GGML
    if (const double error = relative_error(ours[i].out(), ggml.out()); !(error < 1e-2))
      throw std::runtime_error(fmt::format("path {}: differs from ggml's result by {:.2g}", ours[i].path(), error));
    m.peer = "ggml";
    m.peer_value = gflop / median(seconds.back());
    m.ratio = m.value / m.peer_value;
#endif
    report.add(m);
  }
}

// Time of sparse attention over dense at the same length: its floor is the density.
void sparse(const SuiteOptions& options, Report& report, std::int64_t tokens, std::int64_t head_dim) {
  const Problem problem(prompt(tokens, head_dim), static_cast<unsigned>(tokens + head_dim + 1));
  Options full = pbsattn::method("full");
  full.precision = Precision::bf16;
  Runner dense_runner(problem, full, Device::cpu(options.threads));
  for (const float top_p : {0.1F, 0.25F, 0.5F, 0.75F}) {
    Options pbs = pbsattn::method("pbs");
    pbs.precision = Precision::bf16;
    pbs.top_p = top_p;
    Runner runner(problem, pbs, Device::cpu(options.threads));
    double before_attend = 0;
    const auto seconds = interleave(options.runs, {[&] {
                                                     runner();
                                                     before_attend =
                                                         runner.stats().permute_seconds + runner.stats().select_seconds;
                                                   },
                                                   [&] { dense_runner(); }});
    const double ours = median(seconds[0]);
    const double theirs = median(seconds[1]);
    report.add({.name = "sparse",
                .params = {{"n", tokens},
                           {"head_dim", head_dim},
                           {"threads", options.threads},
                           {"path", runner.path()},
                           {"density", std::round(runner.stats().density() * 1000) / 1000},
                           {"before_attend", std::round(before_attend / theirs * 1000) / 1000}},
                .metric = "time / dense - density",
                .unit = "of dense",
                .value = ours / theirs - runner.stats().density(),
                .peer = "dense",
                .peer_value = theirs,
                .ratio = theirs / ours,
                .runs = options.runs,
                .spread = spread(seconds[0])});
  }
}

void thread_scaling(const SuiteOptions& options, Report& report, std::int64_t tokens, std::int64_t head_dim) {
  const int most = pbsattn::describe_cpu().threads;
  if (most < 2) return;
  const Problem problem(prompt(tokens, head_dim), 5);
  Options pbs = pbsattn::method("pbs");
  pbs.precision = Precision::bf16;
  Runner one(problem, pbs, Device::cpu(1));
  Runner all(problem, pbs, Device::cpu(most));
  const auto seconds = interleave(options.runs, {[&] { all(); }, [&] { one(); }});
  if (one.out() != all.out()) throw std::runtime_error("the result depends on the number of threads");
  report.add({.name = "threads",
              .params = {{"n", tokens}, {"head_dim", head_dim}, {"threads", most}, {"path", one.path()}},
              .metric = "time",
              .unit = "s",
              .value = median(seconds[0]),
              .peer = "one",
              .peer_value = median(seconds[1]),
              .ratio = median(seconds[1]) / median(seconds[0]),
              .runs = options.runs,
              .spread = spread(seconds[0])});
}

}  // namespace

void run_cpu_suite(const SuiteOptions& options, Report& report) {
  for (const std::int64_t head_dim : {64, 128}) {
    dense(options, report, 4096, head_dim);
    if (!options.quick) dense(options, report, 8192, head_dim);
  }
  for (const std::int64_t head_dim : {64, 128}) sparse(options, report, options.quick ? 4096 : 8192, head_dim);
  thread_scaling(options, report, options.quick ? 4096 : 8192, 128);
}

}  // namespace bench
