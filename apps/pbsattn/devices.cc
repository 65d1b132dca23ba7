// pbsattn devices: what this machine has, and which code path it will take.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "files.h"
#include "flags.h"
#include "pbsattn/pbsattn.hpp"

namespace app {
namespace {

void print_devices(bool json) {
  const pbsattn::DeviceInfo cpu = pbsattn::describe_cpu();
  if (json) {
    const nlohmann::json list = {{{"name", cpu.name},
                                  {"processor", cpu.processor},
                                  {"threads", cpu.threads},
                                  {"paths", cpu.paths},
                                  {"f32_path", cpu.f32_path},
                                  {"bf16_path", cpu.bf16_path}},
                                 {{"name", "reference"}, {"threads", 1}, {"paths", {"fp64"}}}};
    print(list.dump(2) + "\n");
    return;
  }
  print(fmt::format("{:10} {}, {} thread(s)\n", cpu.name, cpu.processor, cpu.threads) +
        fmt::format("{:10} f32 products take {}, bf16 products take {}; it can run {}\n", "", cpu.f32_path,
                    cpu.bf16_path, fmt::join(cpu.paths, ", ")) +
        fmt::format("{:10} the definition: naive loops in double precision, for tests and for reading\n", "reference"));
}

}  // namespace

void add_devices(CLI::App& program) {
  add_listing(program, "devices", "show what this machine has and which code path it takes", print_devices);
}

}  // namespace app
