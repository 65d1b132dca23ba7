#include <fstream>
#include <string>

#include "core/threads.h"
#include "cpu/kernels/kernels.h"

namespace pbsattn {
namespace {

std::string processor_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!line.starts_with("model name")) continue;
    const auto colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

}  // namespace

// Asks the system for nothing: a path that it would refuse is found out by the first plan that takes it.
DeviceInfo describe_cpu() {
  DeviceInfo info{.name = "cpu",
                  .processor = processor_name(),
                  .threads = available_processors(),
                  .paths = {},
                  .f32_path = std::string(cpu::candidates(Precision::f32).front()->name),
                  .bf16_path = std::string(cpu::candidates(Precision::bf16).front()->name)};
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) info.paths.emplace_back(kernels->name);
  return info;
}

}  // namespace pbsattn
