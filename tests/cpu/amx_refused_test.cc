// The kernel lets a process use AMX's tiles only if every thread's alternate signal stack has room for them, and then
// refuses smaller stacks. A program of its own, because what it once allows, it allows for good.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <vector>

#include "support/judge.h"

namespace pbsattn::test {
namespace {

constexpr Shape shape{.q_heads = 2, .kv_heads = 1, .q_len = 300, .kv_len = 300, .head_dim = 64};

// Sets what the kernel does from now on where this thread asks for permission.
bool answer_with(unsigned action) {
  constexpr unsigned request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  sock_filter steps[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                         BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
                         BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)),
                         BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, request_permission, 0, 1),
                         BPF_STMT(BPF_RET | BPF_K, action),
                         BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog program{.len = std::size(steps), .filter = steps};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// Returns how a child process ends that runs the body after the kernel was set to answer so.
template <class Body>
int end_of_child(unsigned action, Body&& body) {
  const pid_t child = fork();
  if (child == 0) {
    if (!answer_with(action)) _exit(2);
    body();
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

void expect_no_amx() {
  for (const std::string& path : describe_cpu().paths) EXPECT_NE(path, "amx_bf16");
}

void run_bf16() {
  Problem problem({.shape = shape});
  Options options = method("pbs");
  options.precision = Precision::bf16;
  const RunResult result = run(options, problem);
  expect_right(problem, result, result.path.find("bf16") == std::string::npos ? DType::f32 : DType::bf16);
}

class AmxRefused : public testing::Test {
 protected:
  AmxRefused() { unsetenv("PBSATTN_CPU_PATH"); }  // a path that is forced is asked for, or isn't the one to look at
};

TEST_F(AmxRefused, NothingIsAskedBeforeABf16PathIsTaken) {
  EXPECT_EQ(end_of_child(SECCOMP_RET_KILL_PROCESS,
                         [] {
                           describe_cpu();
                           for (const Precision precision : {Precision::automatic, Precision::f32})
                             for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
                               if (precision == Precision::automatic && dtype == DType::bf16) continue;
                               Problem problem({.shape = shape, .q = dtype, .k = dtype, .v = dtype});
                               Options options = method("pbs");
                               options.precision = precision;
                               expect_right(problem, run(options, problem), DType::f32);
                             }
                         }),
            0);
}

TEST_F(AmxRefused, AnotherPathTakesItsPlace) {
  EXPECT_EQ(end_of_child(SECCOMP_RET_ERRNO | EPERM,
                         [] {
                           run_bf16();
                           expect_no_amx();
                         }),
            0);
}

TEST_F(AmxRefused, WhereASignalStackIsTooSmall) {
  std::vector<char> small(8192);  // tiles alone are as large
  const stack_t stack{.ss_sp = small.data(), .ss_flags = 0, .ss_size = small.size()};
  ASSERT_EQ(sigaltstack(&stack, nullptr), 0);
  run_bf16();
  expect_no_amx();
  const stack_t none{.ss_sp = nullptr, .ss_flags = SS_DISABLE, .ss_size = 0};
  EXPECT_EQ(sigaltstack(&none, nullptr), 0);
}

}  // namespace
}  // namespace pbsattn::test
