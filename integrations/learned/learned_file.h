// The file of a learned order, NAME.pbs: weights of Permutation::learned for each layer of a model, and settings by
// layer and head that they go with. docs/learned.md has the format. The reader knows no engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace pbsattn::learned {

inline constexpr std::string_view format = "pbsattn-learned-1";
// The largest file, in bytes. One of 128 layers with 128 KV heads of head_dim 256 has 24 MiB.
inline constexpr std::size_t largest_file = std::size_t{64} << 20;
// What a file's settings change where the caller names no method, or "auto": that method with the file's order.
inline constexpr std::string_view method = "auto:permutation=learned:order_scope=kv_head";

// What a file must have in common with a model.
struct Sizes {
  std::int64_t layers = 0;
  std::int64_t query_heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;

  // Returns the weights of a KV head: head_dim / 2 for the lengths of its key's pairs, head_dim for its numbers.
  std::int64_t features() const { return head_dim / 2 + head_dim; }
};

struct File {
  std::string name;  // of the file, as messages have it
  Sizes sizes;
  RopePairs pairs = RopePairs::halves;
  std::string model;      // the model that it was fitted on, for people
  std::string fitted_on;  // the texts, for people
  std::string settings;   // a JSON object of settings by layer and head (docs/llama.cpp.md), as it stands in the file
  std::vector<float> weights;  // [layers][kv_heads][features]

  // Returns one layer's [kv_heads][features], as OrderWeights takes them. `layer` is one of the file's.
  std::span<const float> of_layer(std::int64_t layer) const;
};

// Reads a file's contents; `name` is what messages call it. Throws Error (invalid_argument) for what isn't such a file,
// with the value, the rule and the way out.
File parse(std::string_view contents, const std::string& name);
// Reads a file. Throws as parse() does, and for a file that can't be read.
File read(const std::string& path);

// Returns "halves" or "neighbours", as files have them.
std::string_view name_of(RopePairs pairs);

// Writes weights, KV head after KV head, as those of keys whose columns are stored in the other pairing: i and
// i + head_dim / 2 of halves are 2i and 2i + 1 of neighbours.
std::vector<float> in_pairs(std::span<const float> weights, std::int64_t head_dim, RopePairs from, RopePairs to);

// Throws Error (invalid_argument) where the model's sizes aren't the file's, naming both.
void require_model(const File& file, const Sizes& model);

}  // namespace pbsattn::learned
