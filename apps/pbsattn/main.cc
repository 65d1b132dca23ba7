// pbsattn: what Permuted Block-Sparse Attention does to a real model's prefill, on this machine.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "commands.h"
#include "errors.h"
#include "pbsattn/pbsattn.hpp"

namespace {

// CLI11 would say only that a command is missing.
void check_command(CLI::App& program, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::vector<std::string> names;
  for (const CLI::App* command : program.get_subcommands({})) names.push_back(command->get_name());
  if (std::ranges::find(names, argv[1]) == names.end()) {
    throw app::UsageError(
        fmt::format("command \"{}\": no such command; there are {}", argv[1], fmt::join(names, ", ")));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App program("Permuted Block-Sparse Attention for the prefill of long prompts", "pbsattn");
  program.set_version_flag("--version", std::string(pbsattn::version()));
  program.require_subcommand(1);
  app::add_prefill(program);
  app::add_mask(program);
  app::add_methods(program);
  app::add_devices(program);

  try {
    app::catch_interrupt();
    check_command(program, argc, argv);
    program.parse(argc, argv);
    return app::success;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return program.exit(error);  // --help
    fmt::print(stderr, "pbsattn: {}; pbsattn --help lists the commands, pbsattn COMMAND --help their options\n",
               error.what());
    return app::usage;
  } catch (const app::Failure& failure) {
    fmt::print(stderr, "pbsattn: {}\n", failure.what());
    return failure.status();
  } catch (const pbsattn::Error& error) {
    fmt::print(stderr, "pbsattn: {}\n", error.what());
    return error.code() == pbsattn::ErrorCode::invalid_argument ? app::usage : app::failed;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "pbsattn: out of memory; pass a smaller --tokens or a smaller model\n");
    return app::failed;
  } catch (const std::exception& error) {
    fmt::print(stderr, "pbsattn: {}\n", error.what());
    return app::failed;
  }
}
