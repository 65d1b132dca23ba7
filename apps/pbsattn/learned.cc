// pbsattn learned: what is in the file of a learned order.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "commands.h"
#include "files.h"

namespace app {
namespace {

using pbsattn::learned::File;

struct LearnedOptions {
  std::string file;
  bool json = false;
};

// What one layer's weights say of it.
struct Layer {
  std::int64_t ordered = 0;  // KV heads whose keys move
  float largest = 0;         // of the weights' absolute values
};

Layer layer_of(const File& file, std::int64_t index) {
  const auto largest_of = [](std::span<const float> weights) {
    float largest = 0;
    for (const float weight : weights) largest = std::max(largest, std::abs(weight));
    return largest;
  };
  const auto weights = file.of_layer(index);
  Layer layer{.largest = largest_of(weights)};
  const auto features = static_cast<std::size_t>(file.sizes.features());
  for (std::size_t begin = 0; begin < weights.size(); begin += features)
    layer.ordered += largest_of(weights.subspan(begin, features)) > 0 ? 1 : 0;
  return layer;
}

// A text of the file on one line.
std::string line(std::string text) {
  std::ranges::replace_if(
      text, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }, '?');
  return text;
}

std::string table(const File& file) {
  const auto& sizes = file.sizes;
  std::string text = fmt::format(
      "model      {}\nfitted on  {}\nsizes      {} layers, {} query heads, {} KV heads, head_dim {}\npairs      {}\n"
      "settings   {}\n\n{:>5} {:>10} {:>14}\n",
      line(file.model), line(file.fitted_on), sizes.layers, sizes.query_heads, sizes.kv_heads, sizes.head_dim,
      pbsattn::learned::name_of(file.pairs), nlohmann::json::parse(file.settings).dump(), "layer", "KV heads",
      "largest weight");
  for (std::int64_t i = 0; i < sizes.layers; ++i) {
    const Layer layer = layer_of(file, i);
    text += fmt::format("{:>5} {:>10} {:>14.4g}\n", i, fmt::format("{} of {}", layer.ordered, sizes.kv_heads),
                        layer.largest);
  }
  return text + "\nKV heads: those whose keys move; the others' weights are 0.\n";
}

nlohmann::json to_json(const File& file) {
  nlohmann::json layers = nlohmann::json::array();
  for (std::int64_t i = 0; i < file.sizes.layers; ++i) {
    const Layer layer = layer_of(file, i);
    layers.push_back({{"layer", i}, {"ordered_kv_heads", layer.ordered}, {"largest_weight", layer.largest}});
  }
  return {{"model", file.model},
          {"fitted_on", file.fitted_on},
          {"layers", file.sizes.layers},
          {"query_heads", file.sizes.query_heads},
          {"kv_heads", file.sizes.kv_heads},
          {"head_dim", file.sizes.head_dim},
          {"pairs", pbsattn::learned::name_of(file.pairs)},
          {"settings", nlohmann::json::parse(file.settings)},
          {"weights", layers}};
}

}  // namespace

void add_learned(CLI::App& program) {
  auto* command = program.add_subcommand("learned", "show what is in the file of a learned order");
  auto options = std::make_shared<LearnedOptions>();
  command->add_option("file", options->file, "the file, NAME.pbs")->required();
  command->add_flag("--json", options->json, "print JSON");
  command->callback([options] {
    const auto file = read_learned(options->file);
    print(options->json ? to_json(*file).dump(2) + "\n" : table(*file));
  });
}

}  // namespace app
