// Where memory is out, plans and runs throw Error. A program of its own, because it replaces operator new.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <new>
#include <optional>

#include "support/judge.h"

#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // these two belong together

// How many more allocations of this thread succeed; negative: all.
static thread_local int allowed = -1;
// Whether those after the first that fails do too, or only that one.
static thread_local bool for_good = true;
static thread_local bool failed = false;
// Bytes that all threads have asked for.
static std::atomic<std::size_t> requested = 0;

void* operator new(std::size_t size) {
  if (allowed == 0) {
    failed = true;
    if (!for_good) allowed = -1;
    throw std::bad_alloc();
  }
  if (allowed > 0) --allowed;
  requested += size;
  void* const memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
// The others by name, since sanitizers have theirs, which don't call these.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* operator new[](std::size_t size) {
  return operator new(size);
}
void* operator new[](std::size_t size, const std::nothrow_t& nothrow) noexcept {
  return operator new(size, nothrow);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}

namespace pbsattn::test {
namespace {

// Calls body again and again, each time with one more allocation that succeeds, until none fails. Returns how many
// failed.
template <class Body>
int starve(Body&& body) {
  for (int count = 0;; ++count) {
    std::optional<ErrorCode> code;
    bool other = false;
    failed = false;
    allowed = count;
    try {
      body();
    } catch (const Error& error) {
      code = error.code();
    } catch (...) {
      other = true;
    }
    allowed = -1;
    if (!failed) return count;
    EXPECT_FALSE(other) << "not an Error, after " << count << " allocations";
    EXPECT_EQ(code.value_or(ErrorCode::out_of_memory), ErrorCode::out_of_memory) << "after " << count << " allocations";
    if (other) return count;
  }
}

class Starved : public testing::TestWithParam<std::tuple<Device::Kind, bool>> {
 protected:
  void SetUp() override { for_good = std::get<bool>(GetParam()); }
  Device device_{std::get<Device::Kind>(GetParam()), 2};
  Shape shape_{.q_heads = 2, .kv_heads = 1, .q_len = 10, .kv_len = 100, .head_dim = 16};
};
INSTANTIATE_TEST_SUITE_P(Devices, Starved,
                         testing::Combine(testing::Values(Device::Kind::cpu, Device::Kind::reference),
                                          testing::Bool()));

TEST_P(Starved, PlansThrowError) {
  Options options = method("pbs");
  options.block = 32;
  options.segment = 64;
  EXPECT_GT(starve([&] { Plan::create(options, shape_, device_); }), 0);
  const std::vector<Options> heads(2, options);
  EXPECT_GT(starve([&] { Plan::create(heads, shape_, device_); }), 0);
  options.block = 33;  // not even for the message of what is wrong
  starve([&] { Plan::create(options, shape_, {Device::Kind::reference}); });
}

TEST_P(Starved, RunsThrowError) {
  Options options = method("pbs");
  options.block = 32;
  options.segment = 64;
  Problem problem({.shape = shape_});
  const Plan plan = Plan::create(options, shape_, device_);
  std::vector<std::byte> workspace(plan.workspace_size());
  EXPECT_GT(starve([&] {
              Stats stats;
              Trace trace;
              plan.run(problem.inputs(), problem.outputs(), workspace, &stats, &trace);
            }),
            0);
  starve([&] { plan.run(problem.inputs(), problem.outputs(), workspace, Stream{}); });
  EXPECT_GT(starve([&] { plan.run({}, {}, workspace); }), 0);  // a message needs memory
}

// What a run needs is in its workspace.
TEST(OutOfMemory, RunsAllocateNextToNothing) {
  for (const MethodInfo& info : methods()) {
    Options options = info.options;
    options.tau = 1;  // every head by pooling, where it is a method's
    options.min_budget = 0;
    Problem problem({.shape = {.q_heads = 4, .kv_heads = 2, .q_len = 3000, .kv_len = 3000, .head_dim = 8}});
    const Plan plan = Plan::create(options, problem.shape, Device::cpu(2));
    std::vector<std::byte> workspace(plan.workspace_size());
    plan.run(problem.inputs(), problem.outputs(), workspace);  // starts the threads
    const std::size_t before = requested;
    plan.run(problem.inputs(), problem.outputs(), workspace);
    EXPECT_LT(requested - before, 4096U) << info.name;
  }
}

// Sanitizers reserve address space of their own, which a limit would take from them.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(OutOfMemory, UnderALimitOfAddressSpace) {
  // A reference run of 2^20 keys, all of which lie in one place, takes 2 GiB of doubles.
  const pid_t child = fork();
  if (child == 0) {
    const Shape shape{.q_len = 1, .kv_len = 1 << 20, .head_dim = 256};
    std::vector<float> row(256, 0.5F);
    std::vector<float> out(256);
    const ConstView one{row.data(), DType::f32, 0, 0, 0};
    const Plan plan = Plan::create(method("full"), shape, Device::reference());
    std::int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const auto limit = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (256 << 20));
    const rlimit tight{limit, limit};
    if (setrlimit(RLIMIT_AS, &tight) != 0) _exit(2);
    try {
      plan.run({.q = one, .k = one, .v = one}, {.out = {out.data(), DType::f32, 0, 0, 256}}, {});
    } catch (const Error& error) {
      _exit(error.code() == ErrorCode::out_of_memory ? 0 : 3);
    } catch (...) {
      _exit(4);
    }
    _exit(5);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}
#endif

}  // namespace
}  // namespace pbsattn::test
