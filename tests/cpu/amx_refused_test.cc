// The kernel lets a process use AMX's tiles only if every thread's alternate signal stack has room for them. A
// program of its own, because what it once allows, it allows for good.
#include <gtest/gtest.h>

#include <csignal>
#include <vector>

#include "support/judge.h"

namespace pbsattn::test {
namespace {

TEST(AmxRefused, AnotherPathTakesItsPlace) {
  std::vector<char> small(8192);  // tiles alone are as large
  const stack_t stack{.ss_sp = small.data(), .ss_flags = 0, .ss_size = small.size()};
  ASSERT_EQ(sigaltstack(&stack, nullptr), 0);
  for (const std::string& path : describe_cpu().paths) EXPECT_NE(path, "amx_bf16");
  Problem problem({.shape = {.q_heads = 2, .kv_heads = 1, .q_len = 300, .kv_len = 300, .head_dim = 64}});
  Options options = method("pbs");
  options.precision = Precision::bf16;
  const RunResult result = run(options, problem);
  expect_right(problem, result, result.path.find("bf16") == std::string::npos ? Precision::f32 : Precision::bf16);
  const stack_t none{.ss_sp = nullptr, .ss_flags = SS_DISABLE, .ss_size = 0};
  EXPECT_EQ(sigaltstack(&none, nullptr), 0);
}

}  // namespace
}  // namespace pbsattn::test
