#pragma once

#include <cstdint>

#include "report.h"

namespace bench {

struct SuiteOptions {
  int runs = 5;
  int threads = 1;
  bool quick = false;  // the smallest length only
};

// The CPU backend: dense against ggml by path; sparse against dense by density; threads; share of the
// stages before attention.
void run_cpu_suite(const SuiteOptions& options, Report& report);

}  // namespace bench
