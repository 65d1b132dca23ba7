#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace pbsattn {

// Processors this process may use at once: the least of its affinity mask and of the CPU quotas of its control groups,
// which are how containers are given a share of a machine; at least 1.
int available_processors();

// Processors that a process's control groups and those above them leave it, rounded up; nothing where none has a quota.
// `cgroup` and `mountinfo` are the contents of /proc/self/cgroup and /proc/self/mountinfo; `root` goes before the paths
// that they name. What can't be read or makes no sense sets no quota.
std::optional<int> quota_processors(std::string_view cgroup, std::string_view mountinfo, const std::string& root = "");

}  // namespace pbsattn
