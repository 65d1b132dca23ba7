// Values that break careless softmax, sorting and selection, on the GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/device_run.h"
#include "support/hostile.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

// 600 tokens: segments at 0 and 256, and the rest from 512.
constexpr Shape shape{.q_heads = 2, .kv_heads = 1, .q_len = 600, .kv_len = 600, .head_dim = 64};
constexpr int block = 128;

Problem make(cuda::Widths widths = cuda::widths[0], DType dtype = DType::bf16) {
  return Problem(alike(with_widths(shape, widths), dtype));
}

struct WideCase {
  cuda::Widths widths;
  DType dtype;
  HostileCase hostile;

  std::string name() const { return hostile.name + (dtype == DType::f16 ? "_f16_dim" : "_dim") + name_of(widths); }
};
void PrintTo(const WideCase& c, std::ostream* stream) {
  *stream << c.name();
}
std::vector<WideCase> cases() {
  std::vector<WideCase> all;
  for (const cuda::Widths widths : cuda::widths)
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const HostileCase& hostile : hostile_cases(shape, block)) all.push_back({widths, dtype, hostile});
  return all;
}

class CudaHostileInputs : public testing::TestWithParam<WideCase> {
 protected:
  static Problem changed() {
    Problem problem = make(GetParam().widths, GetParam().dtype);
    GetParam().hostile.change(problem);
    return problem;
  }
};

TEST_P(CudaHostileInputs, DenseAndSparseAgreeWithTheReference) {
  for (const char* name : {"full", "pbs", "pbs-unpermuted", "pbs+", "pbs-threshold", "xattention", "oracle",
                           "pbs-sampled", "mean-pool", "prism", "flashprefill", "two-step", "pbs-two-step"}) {
    SCOPED_TRACE(name);
    Problem problem = changed();
    Options options = method(name);
    options.top_p = 0.7F;
    if (options.score == BlockScore::two_step) options.threshold = 0.3F;
    options.dense_last_rows = std::min(options.dense_last_rows, 1);
    options.local_blocks = std::min(options.local_blocks, 1);
    options.sink_blocks = 0;
    expect_right(problem, run_on_device(options, problem), GetParam().dtype);
  }
}

// A correction by permuted blocks, and by whatever isn't near.
TEST_P(CudaHostileInputs, CorrectionsAgreeWithTheReference) {
  for (const char* name : {"pbs", "streaming"}) {
    SCOPED_TRACE(name);
    Problem problem = changed();
    Options options = method(name);
    options.top_p = 0.4F;
    options.local_blocks = 0;
    options.correction = Correction::mean;
    expect_right(problem, run_on_device(options, problem), GetParam().dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Values, CudaHostileInputs, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name(); });

RunResult run_here(const Options& options, Problem& problem) {
  return run_on_device(options, problem);
}

TEST(CudaHostile, EqualKeysKeepTheirOrder) {
  expect_equal_keys_keep_their_order(make(), method("pbs"), DType::bf16, run_here);
}

TEST(CudaHostile, EverythingNan) {
  expect_nan_goes_by_the_rules(make(), method("pbs"), run_here);
}

}  // namespace
}  // namespace pbsattn::test
