// How many threads a plan takes by itself: affinity, and quotas of made-up control groups and of a real one where this
// process may make one.
#include "core/threads.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

// A machine of as many processors as a test says, in place of libc's function: the kernel refuses smaller masks.
static int pretended_processors = 0;
extern "C" int sched_getaffinity(pid_t pid, std::size_t size, cpu_set_t* set) noexcept {
  if (pretended_processors == 0) {
    const long written = syscall(SYS_sched_getaffinity, pid, size, set);
    if (written < 0) return -1;
    std::memset(reinterpret_cast<char*>(set) + written, 0, size - static_cast<std::size_t>(written));
    return 0;
  }
  if (size * 8 < static_cast<std::size_t>(pretended_processors)) {
    errno = EINVAL;
    return -1;
  }
  std::memset(set, 0, size);
  for (int i = 0; i < pretended_processors; ++i) CPU_SET_S(i, size, set);
  return 0;
}

namespace pbsattn {
namespace {

namespace fs = std::filesystem;

std::string contents_of(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What a child process returns.
int in_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

class Quota : public testing::Test {
 protected:
  Quota() { fs::create_directories(root_); }
  ~Quota() override { fs::remove_all(root_); }

  void write(const std::string& file, const std::string& text) {
    fs::create_directories((root_ + file).substr(0, (root_ + file).rfind('/')));
    std::ofstream(root_ + file) << text;
  }
  void version1(const std::string& group, const std::string& quota, const std::string& period = "100000\n") {
    write(group + "/cpu.cfs_quota_us", quota);
    write(group + "/cpu.cfs_period_us", period);
  }
  // 0 where there is no quota.
  int count(const std::string& cgroup, const std::string& mountinfo) {
    return quota_processors(cgroup, mountinfo, root_).value_or(0);
  }

  std::string root_ = fs::temp_directory_path() / ("pbsattn-quota-" + std::to_string(getpid()));
  const std::string mount1_ = "33 32 0:30 / /cg/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n";
  const std::string mount2_ = "25 24 0:23 / /cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
};

TEST_F(Quota, Version2) {
  write("/cg/pod/box/cpu.max", "200000 100000\n");
  EXPECT_EQ(count("0::/pod/box\n", mount2_), 2);
  write("/cg/pod/box/cpu.max", "max 100000\n");
  EXPECT_EQ(count("0::/pod/box\n", mount2_), 0);
}

TEST_F(Quota, Version1) {
  version1("/cg/cpu,cpuacct/docker/ab", "400000\n");
  const std::string cgroup = "5:memory:/docker/zz\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n";
  EXPECT_EQ(count(cgroup, mount1_), 4);
  version1("/cg/cpu,cpuacct/docker/ab", "-1\n");
  EXPECT_EQ(count(cgroup, mount1_), 0);
}

TEST_F(Quota, PartsOfAProcessorAreRoundedUp) {
  for (const auto& [quota, processors] : {std::pair{"1000", 1}, {"100000", 1}, {"100001", 2}, {"250000", 3}}) {
    write("/cg/box/cpu.max", std::string(quota) + " 100000\n");
    EXPECT_EQ(count("0::/box\n", mount2_), processors) << quota;
  }
}

TEST_F(Quota, GroupsAboveBindToo) {
  write("/cg/slice/cpu.max", "300000 100000\n");
  write("/cg/slice/pod/cpu.max", "max 100000\n");
  write("/cg/slice/pod/box/cpu.max", "800000 100000\n");
  EXPECT_EQ(count("0::/slice/pod/box\n", mount2_), 3);
  EXPECT_EQ(count("0::/slice/pod\n", mount2_), 3);
  EXPECT_EQ(count("0::/\n", mount2_), 0);
  write("/cg/cpu.max", "100000 100000\n");  // as a namespace's own group has it
  EXPECT_EQ(count("0::/\n", mount2_), 1);
  EXPECT_EQ(count("0::/slice/pod/box\n", mount2_), 1);
}

TEST_F(Quota, TheLeastOfBothVersions) {
  const std::string mounts = mount1_ + "41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n";
  version1("/cg/cpu,cpuacct/box", "500000\n");
  EXPECT_EQ(count("4:cpu,cpuacct:/box\n0::/box\n", mounts), 5);
  write("/cg/unified/box/cpu.max", "200000 100000\n");
  EXPECT_EQ(count("4:cpu,cpuacct:/box\n0::/box\n", mounts), 2);
  EXPECT_EQ(count("4:cpu,cpuacct:/box\n", mounts), 5);
}

TEST_F(Quota, MountsOfAGroup) {
  // Docker without a namespace: the group is named from the host's root and mounted by itself.
  const std::string mounts = "33 32 0:30 /docker/ab /cg/cpu ro - cgroup cgroup rw,cpu\n";
  version1("/cg/cpu", "200000\n");
  for (const char* folder : {"/cg/cpu/inner", "/cg/cpu/c/inner"}) version1(folder, "100000\n");
  // Of groups elsewhere nothing is known but that what is mounted binds.
  for (const auto& [group, processors] :
       {std::pair{"/docker/ab", 2}, {"/docker/ab/inner", 1}, {"/docker/abc/inner", 2}, {"/../../inner", 2}})
    EXPECT_EQ(count(std::string("4:cpu:") + group + "\n", mounts), processors) << group;
}

TEST_F(Quota, NamesWithSpaces) {
  version1("/my cg/cpu/box", "100000\n");
  EXPECT_EQ(count("4:cpu:/box\n", "33 32 0:30 / /my\\040cg/cpu rw - cgroup cgroup rw,cpu\n"), 1);
}

TEST_F(Quota, NonsenseSetsNone) {
  for (const char* text : {"", "\n", "max", "100000", "x 100000", "100000 x", "0 100000", "100000 0", "-5 100000",
                           "100000 -5", "99999999999999999999 100000", "100000 100000 7"}) {
    write("/cg/box/cpu.max", text);
    EXPECT_EQ(count("0::/box\n", mount2_), 0) << text;
  }
  for (const char* text : {"", "0", "-1", "x", "1e5", "99999999999999999999"}) {
    version1("/cg/cpu,cpuacct/box", text);
    EXPECT_EQ(count("4:cpu,cpuacct:/box\n", mount1_), 0) << text;
  }
  version1("/cg/cpu,cpuacct/box", "100000", "0");
  EXPECT_EQ(count("4:cpu,cpuacct:/box\n", mount1_), 0);
  write("/cg/box/cpu.max", "100000 100000");
  for (const char* cgroup : {"", "0", "0:", "0::", "::", "\n\n", "1::/box", "x:y:/box", "4:cpuset:/box"})
    EXPECT_EQ(count(cgroup, mount2_), 0) << cgroup;
  for (const char* mounts : {"", "1", "1 2 3 / /cg", "1 2 3 / /cg rw -", "1 2 3 / /cg rw - cgroup2x a b", "- cgroup2"})
    EXPECT_EQ(count("0::/box\n", mounts), 0) << mounts;
  EXPECT_EQ(count("0::/gone\n", mount2_), 0);
  write("/cg/box/cpu.max", "9000000000000000000 1\n");
  EXPECT_GT(count("0::/box\n", mount2_), 1 << 30);
}

TEST(Threads, AffinityBinds) {
  EXPECT_EQ(in_child([] {
              cpu_set_t all;
              CPU_ZERO(&all);
              sched_getaffinity(0, sizeof all, &all);
              cpu_set_t one;
              CPU_ZERO(&one);
              for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
                if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
              return sched_setaffinity(0, sizeof one, &one) == 0 ? available_processors() : 0;
            }),
            1);
}

TEST(Threads, MachinesOfMoreThan1024Processors) {
  const auto quota = quota_processors(contents_of("/proc/self/cgroup"), contents_of("/proc/self/mountinfo"));
  for (const int processors : {1024, 1025, 3000, 8192, 100'000}) {
    pretended_processors = processors;
    EXPECT_EQ(available_processors(), std::min(processors, quota.value_or(processors)));
  }
  pretended_processors = 0;
}

// Where this process may make a control group with a quota, one binds it. Elsewhere the made-up ones have to do.
TEST(Threads, AQuotaOfARealGroupBinds) {
  pretended_processors = 64;
  const std::string name = "pbsattn_threads_test_" + std::to_string(getpid());
  for (const bool second : {false, true}) {
    const fs::path group = fs::path(second ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") / name;
    std::error_code error;
    if (!fs::create_directory(group, error)) continue;
    const fs::path file = group / (second ? "cpu.max" : "cpu.cfs_quota_us");
    std::ofstream quota;
    if (fs::exists(file, error)) quota.open(file);
    if (quota && quota << (second ? "250000 100000" : "250000") << std::flush) {
      // The child leaves its group in this hierarchy, whose quota binds it no more; that of the other one still does.
      const int least = std::min(3, available_processors());
      const int count = in_child([&] {
        std::ofstream members(group / "cgroup.procs");
        const bool joined = static_cast<bool>(members << getpid() << std::flush);
        return joined ? available_processors() : least;
      });
      EXPECT_GE(count, least);
      EXPECT_LE(count, 3);
    }
    fs::remove(group, error);
  }
  pretended_processors = 0;
}

}  // namespace
}  // namespace pbsattn
