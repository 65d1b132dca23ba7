// Options by layer and head, from JSON:
//
//     {"*": {"*": {"method": "pbs"}, "7": {"keep": "all"}}, "0": {"*": {"top_p": 0.8}}}
//
// The first key is a layer as llama.cpp numbers them, the second a query head; "*" is every one. Where several apply,
// those of the layer override those of "*", and among a layer's those of the head. "method" is set_method()'s text. The
// heads of a layer may differ as pbsattn::Plan::create says.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pbsattn/pbsattn.h"

namespace pbsattn::ggml {

// Sets the options of a method as text has it, "pbs:top_p=0.95". It replaces all options, but for a precision that it
// doesn't name. Throws pbsattn::Error.
void set_method(std::string_view text, pbsattn_options* options);

// Says what is wrong where options set what the model says itself, `softcap` or `window`; else nothing.
std::optional<std::string> sets_models_own(const pbsattn_options& options);

class LayerSettings {
 public:
  // Throws std::runtime_error naming what is wrong with the text and where. `base` is what each option starts from.
  static LayerSettings parse(std::string_view json, const pbsattn_options& base);
  // The same of a file's text.
  static LayerSettings read(const std::string& path, const pbsattn_options& base);

  using Changes = std::vector<std::pair<std::string, std::string>>;  // names and values, "method" first

  // Sets options by name. Throws pbsattn::Error.
  static void apply(const Changes& changes, pbsattn_options* options);

  // Options of each query head of a layer over `base`, or one for all where nothing is said of single heads: so are
  // both. Throws std::runtime_error for a head that the layer doesn't have.
  std::vector<pbsattn_options> heads(std::int32_t layer, std::int64_t q_heads,
                                     const std::vector<pbsattn_options>& base) const;

 private:
  static constexpr std::int64_t every = -1;

  std::map<std::int64_t, std::map<std::int64_t, Changes>> layers_;  // `every` comes first
};

}  // namespace pbsattn::ggml
