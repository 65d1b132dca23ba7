#include "core/threads.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <limits>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>

#include <cerrno>
#include <memory>
#endif

namespace pbsattn {
namespace {

std::string contents_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Takes what comes before the separator off the text, and the separator.
std::string_view take(std::string_view& text, char separator) {
  const std::size_t end = std::min(text.find(separator), text.size());
  const std::string_view taken = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return taken;
}

bool lists(std::string_view comma_separated, std::string_view name) {
  while (!comma_separated.empty())
    if (take(comma_separated, ',') == name) return true;
  return false;
}

// mountinfo writes space, tab, newline and backslash as three octal digits.
std::string unescaped(std::string_view text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    int code = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '\\' && i + 3 < text.size() && std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3) {
      plain += static_cast<char>(code);
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// Where a hierarchy of control groups is mounted, and from which group on.
struct Mount {
  std::string root, point;
};

// The mounts that have CPU quotas: of version 2, or those of version 1 with the cpu controller.
std::vector<Mount> find_mounts(std::string_view mountinfo, int version) {
  std::vector<Mount> mounts;
  while (!mountinfo.empty()) {
    std::string_view line = take(mountinfo, '\n');
    // id parent device root point options [optional ...] - type source super_options
    for (int i = 0; i < 3; ++i) take(line, ' ');
    const std::string_view root = take(line, ' ');
    const std::string_view point = take(line, ' ');
    while (!line.empty() && take(line, ' ') != "-") {
    }
    const std::string_view type = take(line, ' ');
    take(line, ' ');
    if (version == 2 ? type == "cgroup2" : type == "cgroup" && lists(line, "cpu"))
      mounts.push_back({unescaped(root), unescaped(point)});
  }
  return mounts;
}

// The process's group in the hierarchy of this version; "" where it is in none.
std::string_view find_group(std::string_view cgroup, int version) {
  while (!cgroup.empty()) {
    std::string_view line = take(cgroup, '\n');
    const std::string_view hierarchy = take(line, ':');
    const std::string_view controllers = take(line, ':');
    if (version == 2 ? hierarchy == "0" && controllers.empty() : lists(controllers, "cpu")) return line;
  }
  return {};
}

std::optional<std::int64_t> number(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.remove_suffix(1);
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value <= 0) return {};
  return value;
}

// The quota of one group, in processors.
std::optional<int> quota_of(const std::string& folder, int version) {
  std::optional<std::int64_t> quota;
  std::optional<std::int64_t> period;
  if (version == 2) {
    const std::string both = contents_of(folder + "/cpu.max");  // "max 100000" where there is none
    std::string_view left = both;
    quota = number(take(left, ' '));
    period = number(left);
  } else {
    quota = number(contents_of(folder + "/cpu.cfs_quota_us"));  // -1 where there is none
    period = number(contents_of(folder + "/cpu.cfs_period_us"));
  }
  if (!quota || !period) return {};
  const std::int64_t processors = *quota / *period + (*quota % *period != 0 ? 1 : 0);
  return static_cast<int>(std::min<std::int64_t>(processors, std::numeric_limits<int>::max()));
}

int affinity_processors() {
#if defined(__linux__)
  // The kernel refuses a mask smaller than its own, whose size nothing tells.
  constexpr int most = 1 << 20;
  for (int processors = 1024; processors <= most; processors *= 2) {
    const auto release = [](cpu_set_t* set) { CPU_FREE(set); };
    const std::unique_ptr<cpu_set_t, decltype(release)> set(CPU_ALLOC(processors), release);
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(processors);
    CPU_ZERO_S(bytes, set.get());
    if (sched_getaffinity(0, bytes, set.get()) == 0) return std::max(CPU_COUNT_S(bytes, set.get()), 1);
    if (errno != EINVAL) break;
  }
#endif
  return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
}

}  // namespace

std::optional<int> quota_processors(std::string_view cgroup, std::string_view mountinfo, const std::string& root) {
  std::optional<int> least;
  for (const int version : {1, 2}) {
    const std::string group(find_group(cgroup, version));
    if (group.empty()) continue;
    for (const Mount& mount : find_mounts(mountinfo, version)) {
      // The group's path below the mounted one. A process outside of what is mounted here, as seen from another
      // namespace, has at most what the mounted group has.
      const bool whole = mount.root == "/";
      const bool inside = group.find("/..") == std::string::npos &&
                          (whole || group == mount.root || group.starts_with(mount.root + "/"));
      std::string below = !inside ? "" : whole ? group : group.substr(mount.root.size());
      while (below.ends_with('/')) below.pop_back();
      for (;;) {
        if (const auto quota = quota_of(std::string(root).append(mount.point).append(below), version))
          least = std::min(*quota, least.value_or(*quota));
        if (below.empty()) break;
        below.erase(below.rfind('/'));
      }
    }
  }
  return least;
}

int available_processors() {
  const int allowed = affinity_processors();
#if defined(__linux__)
  if (const auto quota = quota_processors(contents_of("/proc/self/cgroup"), contents_of("/proc/self/mountinfo")))
    return std::min(allowed, *quota);
#endif
  return allowed;
}

}  // namespace pbsattn
