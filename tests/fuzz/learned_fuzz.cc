// Throws bytes at the reader of learned orders' files, and what it takes at the conversion of pairings.
#include "learned_file.h"

#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "bytes.h"
#include "expect.h"
#include "support/learned.h"

using namespace pbsattn::fuzz;

namespace {

// A file of a small model, with a text or the data changed now and then.
std::string made_file(Bytes bytes) {
  const auto up_to = [&](int most) { return 1 + bytes.take<std::uint8_t>() % most; };
  auto metadata = pbsattn::test::learned_metadata();
  const int layers = up_to(3), kv_heads = up_to(3), head_dim = 2 * up_to(4);
  metadata["layers"] = std::to_string(layers);
  metadata["kv_heads"] = std::to_string(kv_heads);
  metadata["query_heads"] = std::to_string(kv_heads * up_to(3));
  metadata["head_dim"] = std::to_string(head_dim);
  if (bytes.take<std::uint8_t>() % 2 == 0) metadata["pairs"] = "neighbours";
  const bool changed = bytes.take_rarely(4), cut = bytes.take_rarely(8);
  const auto victim = std::next(metadata.begin(), bytes.take<std::uint8_t>() % static_cast<int>(metadata.size()));
  std::vector<float> weights(static_cast<std::size_t>(layers * kv_heads * head_dim * 3 / 2));
  for (float& weight : weights) weight = bytes.take<float>();
  std::string contents = pbsattn::test::learned_file(metadata, weights);
  if (changed) {
    for (char& c : victim->second) c = static_cast<char>(' ' + bytes.take<std::uint8_t>() % 0x5F);
    contents = pbsattn::test::with_length(pbsattn::test::header_of(metadata, ""), "");
  }
  if (cut) contents.resize(contents.size() * bytes.take<std::uint8_t>() / 256);
  return contents;
}

// The input as a file: as it is, as a header whose length is put before it, or as what a made file is drawn from.
std::string contents_of(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  const std::size_t end = text.find('\xff');  // of the header, in which no such byte may stand
  if (text.starts_with('{') && end != std::string::npos)
    return pbsattn::test::with_length(text.substr(0, end), text.substr(end + 1));
  if (size == 0 || data[0] % 4 == 0) return text;
  return made_file(Bytes(data + 1, size - 1));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Share read("files read", 0.02);
  namespace learned = pbsattn::learned;
  try {
    const learned::File file = learned::parse(contents_of(data, size), "x.pbs");
    read.count(1);
    require(file.sizes.layers >= 1 && file.sizes.kv_heads >= 1 && file.sizes.head_dim >= 2, "sizes of a model");
    for (std::int64_t layer = 0; layer < file.sizes.layers; ++layer) {
      const auto weights = file.of_layer(layer);
      for (const float weight : weights) require(std::isfinite(weight), "weights are finite");
      using enum pbsattn::RopePairs;
      const auto there = learned::in_pairs(weights, file.sizes.head_dim, halves, neighbours);
      const auto back = learned::in_pairs(there, file.sizes.head_dim, neighbours, halves);
      require(back == std::vector(weights.begin(), weights.end()), "a conversion is taken back");
    }
    require_model(file, file.sizes);
  } catch (const pbsattn::Error& error) {
    read.count(0);
    require_line(error.what());
  }
  return 0;
}
