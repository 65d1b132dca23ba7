#include "flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "errors.h"
#include "pbsattn/pbsattn.hpp"
#include "session.h"

namespace app {

void PromptFlags::add_to(CLI::App& command) {
  command.add_option("--model", model, "a model in GGUF format")->required();
  command.add_option("--prompt-file", prompt_file, "a long text in UTF-8")->required();
  command.add_option("--tokens", tokens, "read only the text's first N tokens; 0: all")->capture_default_str();
  command.add_option("--threads", threads, "threads; 0: one for each processor")->capture_default_str();
  command.add_flag("--verbose", verbose, "show llama.cpp's own messages");
}

void PromptFlags::check_threads() const {
  require_between(threads, 0, most_threads, "--threads", "0 takes one for each processor");
}

int PromptFlags::thread_count() const {
  return threads != 0 ? threads : pbsattn::describe_cpu().threads;
}

void require_between(int value, int least, int most, const char* option, const char* way_out) {
  if (value < least || value > most)
    throw UsageError(fmt::format("{} {}: outside {} .. {}; {}", option, value, least, most, way_out));
}

void add_listing(CLI::App& program, const char* name, const char* help, void (*print_table)(bool json)) {
  auto* command = program.add_subcommand(name, help);
  auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "print JSON");
  command->callback([json, print_table] { print_table(*json); });
}

}  // namespace app
