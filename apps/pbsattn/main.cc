// pbsattn: what Permuted Block-Sparse Attention does to a real model's prefill, on this machine.
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "commands.h"
#include "errors.h"
#include "files.h"
#include "pbsattn/pbsattn.hpp"

namespace {

// CLI11 would say only that a command is missing.
void check_command(CLI::App& program, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  const std::string_view given = argv[1];
  if (given == "eval" || given == "report") {
    throw app::UsageError(
        fmt::format("{0}: is in the Python package pbsattn_eval: `python -m pbsattn_eval{1}` once it is installed (pip "
                    "install . ./integrations/python/pbsattn_eval), or `./dev {0}` in a checkout; docs/eval.md",
                    given, given == "report" ? " report" : ""));
  }
  std::vector<std::string> names;
  for (const CLI::App* command : program.get_subcommands({})) names.push_back(command->get_name());
  if (std::ranges::find(names, argv[1]) == names.end()) {
    throw app::UsageError(
        fmt::format("command \"{}\": no such command; there are {}", argv[1], fmt::join(names, ", ")));
  }
}

int run(int argc, char** argv) {
  CLI::App program("Permuted Block-Sparse Attention for the prefill of long prompts", "pbsattn");
  program.set_version_flag("--version", std::string(pbsattn::version()));
  program.require_subcommand(1);
  app::add_prefill(program);
  app::add_mask(program);
  app::add_methods(program);
  app::add_devices(program);
  app::add_learned(program);
  check_command(program, argc, argv);
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {  // --help
      std::ostringstream help;
      program.exit(error, help, help);
      app::print(help.str());
      return app::success;
    }
    throw app::UsageError(
        fmt::format("{}; pbsattn --help lists the commands, pbsattn COMMAND --help their options", error.what()));
  }
  return app::success;
}

// Without a standard stream, a file of ours would take its number, and with it what is meant for the stream. What takes
// it here can't be written to, so printing fails as it should.
void fill_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) == -1) static_cast<void>(open("/dev/null", O_RDONLY));
  }
}

int fail(const char* message, int status) noexcept {
  std::fprintf(stderr, "pbsattn: %s\n", message);
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    fill_closed_streams();
    app::catch_signals();
    return run(argc, argv);
  } catch (const app::NobodyReads& failure) {
    return failure.status();
  } catch (const app::Failure& failure) {
    return fail(failure.what(), failure.status());
  } catch (const pbsattn::Error& error) {
    return fail(error.what(), error.code() == pbsattn::ErrorCode::invalid_argument ? app::usage : app::failed);
  } catch (const std::bad_alloc&) {
    return fail("out of memory; pass a smaller --tokens or a smaller model", app::failed);
  } catch (const std::exception& error) {
    return fail(error.what(), app::failed);
  }
}
