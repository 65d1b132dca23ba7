// pbsattn methods: the table of methods and their options.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "attention.h"
#include "commands.h"
#include "files.h"
#include "flags.h"

namespace app {
namespace {

void print_methods(bool json) {
  if (json) {
    auto list = nlohmann::json::array();
    for (const auto& info : pbsattn::methods()) {
      list.push_back({{"name", info.name}, {"summary", info.summary}, {"options", to_json(info.options)}});
    }
    print(list.dump(2) + "\n");
    return;
  }
  std::string text;
  for (const auto& info : pbsattn::methods()) {
    text += fmt::format("{:15} {}\n{:15} {}\n", info.name, info.summary, "", describe(info.options));
  }
  print(text);
}

}  // namespace

void add_methods(CLI::App& program) {
  add_listing(program, "methods", "list the methods and their options", print_methods);
}

}  // namespace app
