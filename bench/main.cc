#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <map>
#include <string>

#include "pbsattn/pbsattn.hpp"
#include "suites.h"

int main(int argc, char** argv) {
  CLI::App app("Verifies, then measures, then prints a table. Peers run in the same process, in turn with us.");
  std::string suite;
  std::string json;
  bench::SuiteOptions options;
  app.add_option("suite", suite, "What to measure: cpu")->required()->check(CLI::IsMember({"cpu"}));
  app.add_option("--json", json, "Also write the measurements to this file");
  app.add_option("--runs", options.sampling.runs,
                 "Samples on undisturbed cores wanted of each function; their median is reported")
      ->check(CLI::Range(1, 1000));
  app.add_option(
         "--limit", options.sampling.limit,
         "Seconds to wait for them, for each row's functions; then the median is of those there are, if 3, or of all")
      ->check(CLI::Range(0, 3600));
  app.add_option("--threads", options.sampling.threads, "Threads of every function")->check(CLI::Range(1, 1024));
  app.add_option("--clock", options.sampling.clock,
                 "wall, or processor: the process's own time, on a machine shared with others")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, bench::Clock>{{"wall", bench::Clock::wall}, {"processor", bench::Clock::processor}}));
  app.add_option("--tokens", options.tokens, "Prompt lengths")->delimiter(',')->check(CLI::Range(1, 1 << 20));
  app.add_option("--head-dims", options.head_dims, "Head widths")->delimiter(',')->check(CLI::Range(8, 256));
  app.add_option("--paths", options.paths, "Code paths, by name; pbsattn devices lists them")->delimiter(',');
  app.add_option("--cases", options.cases, "Which of peak, dense, sparse, stages, threads")
      ->delimiter(',')
      ->check(CLI::IsMember({"peak", "dense", "sparse", "stages", "threads"}));
  CLI11_PARSE(app, argc, argv);
  try {
    const auto info = pbsattn::describe_cpu();
    fmt::print("{} ({} processors), commit {}, medians of {} undisturbed samples\n", info.processor, info.threads,
               PBSATTN_COMMIT, options.sampling.runs);
    bench::Report report(suite);
    bench::run_cpu_suite(options, report);
    if (!json.empty()) report.write(json);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "pbsattn-bench: {}\n", error.what());
    return 1;
  }
}
