// Files of learned orders, made in memory.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

namespace pbsattn::test {

using Metadata = std::map<std::string, std::string>;

// Returns the metadata of a file of two layers with 4 query heads, 2 KV heads and head_dim 8.
inline Metadata learned_metadata() {
  return {{"format", "pbsattn-learned-1"},
          {"pairs", "halves"},
          {"layers", "2"},
          {"query_heads", "4"},
          {"kv_heads", "2"},
          {"head_dim", "8"},
          {"model", "tiny"},
          {"fitted_on", "prose"},
          {"settings", "{}"}};
}

// Returns a file's text: a length, a header, and then data.
inline std::string with_length(const std::string& header, const std::string& data) {
  std::string text;
  for (int i = 0; i < 8; ++i) text += static_cast<char>(header.size() >> 8 * i & 0xFFU);
  return text + header + data;
}

inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result += '"';
}

// Returns the header of a file whose tensor is described by `tensor`, a JSON object's inside.
inline std::string header_of(const Metadata& metadata, const std::string& tensor) {
  std::string text = "{\"__metadata__\":{";
  for (const auto& [key, value] : metadata) {
    if (text.back() != '{') text += ',';
    text += quoted(key) + ":" + quoted(value);
  }
  return text + "},\"order_weights\":{" + tensor + "}}";
}

// Returns a whole file. The metadata says which shape the weights have.
inline std::string learned_file(const Metadata& metadata, std::span<const float> weights) {
  const std::int64_t features = std::stoll(metadata.at("head_dim")) * 3 / 2;
  const std::string tensor = R"("dtype":"F32","shape":[)" + metadata.at("layers") + "," + metadata.at("kv_heads") +
                             "," + std::to_string(features) + R"(],"data_offsets":[0,)" +
                             std::to_string(weights.size_bytes()) + "]";
  return with_length(header_of(metadata, tensor),
                     {reinterpret_cast<const char*>(weights.data()), weights.size_bytes()});
}

}  // namespace pbsattn::test
