// The attentions a prompt can run under, and how the command line names them.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "learned_file.h"
#include "pbsattn/pbsattn.hpp"

namespace CLI {
class App;
}

namespace app {

using Given = std::vector<std::pair<std::string, std::string>>;  // names of options, and values

// llama.cpp's own kernel, or one of pbsattn's methods.
struct Attention {
  std::string name;  // as asked for, options included
  bool by_ggml = false;
  pbsattn::Options options;  // unused by_ggml
  std::string settings;      // JSON of options by layer and head that change these; "" for none
  bool by_learned = false;   // the settings of a learned order's file change the options before those above do
  Given over;                // by_learned: what goes over the file's settings
  std::shared_ptr<const pbsattn::learned::File> learned;  // the file, for a command that has read it; null for none
};

// Whether a method is under test, or stands beside it to be compared with.
enum class Role { under_test, compared };

// The flags of the command line that set a method's options, --top-p (or --top_p) for top_p; where one isn't given, the
// method's own value stands. Those of the parts that make a method what it is (permutation, score, keep, correction,
// fallback) are for the method under test alone: with them a baseline would be another method.
class AttentionFlags {
 public:
  void add_to(CLI::App& command);
  // Returns what was given for a method in that role.
  Given given(Role role) const;
  // Sets what was given for a method in that role. Throws pbsattn::Error for a name that an option's values don't have.
  void apply(Role role, pbsattn::Options* options) const;
  // Returns the file of a learned order, or "".
  const std::string& learned() const { return learned_; }

 private:
  Given given_;
  std::string learned_;
};

// The method under test where the command line names none. With the file of a learned order it is what the file says.
inline constexpr std::string_view default_method = "auto";
// The name of what the file of a learned order says: its settings by layer and head, under the flags.
inline constexpr std::string_view learned_name = "learned";

// Returns the attention that "ggml" stands for, or a method of the table with the flags for its role applied and then
// options of its own: "pbs:top_p=0.95:segment=512". "settings=FILE" among them names a file of options by layer and
// head. With --learned, "learned" and "auto" are what its file says. Throws for an unknown name (with the nearest) and
// for a value out of its range.
Attention attention_named(const std::string& spec, const AttentionFlags& flags, Role role);

// Returns all options by name.
nlohmann::json to_json(const pbsattn::Options& options);

// Describes options in one line for people.
std::string describe(const pbsattn::Options& options);

}  // namespace app
