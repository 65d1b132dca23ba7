// What several commands have on their command lines.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace app {

// A model, a prompt for it, and how it is run.
struct PromptFlags {
  std::string model;
  std::string prompt_file;
  int tokens = 0;   // of the prompt to read; 0: all
  int threads = 0;  // 0: one for each processor
  bool verbose = false;

  void add_to(CLI::App& command);
  // Throws UsageError for more threads than ggml takes.
  void check_threads() const;
  // Returns `threads` with 0 resolved.
  int thread_count() const;
};

// Throws UsageError for an option's value outside least .. most.
void require_between(int value, int least, int most, const char* option, const char* way_out);

// Adds a command that prints a table, or with --json the same as JSON, by print_table(json).
void add_listing(CLI::App& program, const char* name, const char* help, void (*print_table)(bool json));

}  // namespace app
