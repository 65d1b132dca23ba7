// The subcommands. Each add_* puts one on the command line, with the function that runs it.
#pragma once

namespace CLI {
class App;
}

namespace app {

void add_prefill(CLI::App& program);
void add_mask(CLI::App& program);
void add_methods(CLI::App& program);
void add_devices(CLI::App& program);
void add_learned(CLI::App& program);

}  // namespace app
