// The attentions a prompt can run under, and how the command line names them.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "pbsattn/pbsattn.h"
#include "pbsattn/pbsattn.hpp"

namespace CLI {
class App;
}

namespace app {

// llama.cpp's own kernel, or one of pbsattn's methods.
struct Attention {
  std::string name;  // as asked for, options included
  bool by_ggml = false;
  pbsattn::Options options;  // unused by_ggml
  std::string settings;      // JSON of options by layer and head that change these; "" for none
};

// The options of the command line that shape an attention; the method's own value stands where one isn't given.
struct AttentionFlags {
  std::optional<float> top_p;
  std::optional<float> threshold;
  std::optional<float> floor_top_p;
  std::optional<int> top_k;
  std::optional<float> density;
  std::optional<int> segment;
  std::optional<int> dense_last_rows;
  std::string precision = "bf16";

  void add_to(CLI::App& command);
};

// "ggml" or a method of the table, with the flags applied and then options of its own: "pbs:top_p=0.95:segment=512".
// "settings=FILE" among them names a file of options by layer and head.
// Throws for an unknown name (with the nearest) and for a value out of its range.
Attention attention_named(const std::string& spec, const AttentionFlags& flags);

pbsattn_options to_c(const pbsattn::Options& options);
nlohmann::json to_json(const pbsattn::Options& options);

// One line for people.
std::string describe(const pbsattn::Options& options);

}  // namespace app
