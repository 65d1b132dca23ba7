#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace bench {

struct SuiteOptions {
  Sampling sampling;
  std::vector<std::int64_t> tokens{4096, 8192};
  std::vector<std::int64_t> head_dims{64, 128};
  std::vector<std::string> paths;  // empty: all that are there to be fast
  std::vector<std::string> cases{"peak", "dense", "sparse", "stages", "threads"};
};

// The CPU backend, path by path: its roof; dense attention against ggml's kernel; sparse against dense by density,
// whole and by pair; the stages before attention as a share of dense; two threads against one.
void run_cpu_suite(const SuiteOptions& options, Report& report);

}  // namespace bench
