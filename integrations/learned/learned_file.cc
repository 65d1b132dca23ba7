#include "learned_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/options/shown.h"

namespace pbsattn::learned {
namespace {

using nlohmann::json;

constexpr const char* weights_name = "order_weights";
constexpr const char* metadata_name = "__metadata__";
constexpr const char* other_file = "pass a file that pbsattn's learn wrote, whole";

// A file's contents while they are read: refusals begin with its name.
class Reader {
 public:
  Reader(std::string_view contents, const std::string& name) : contents_(contents), name_(name) {}

  File read() {
    const json header = parse_header();
    File file;
    file.name = name_;
    read_metadata(header, &file);
    read_weights(header, &file);
    return file;
  }

 private:
  static constexpr std::size_t prefix = 8;  // bytes of the header's length

  template <class... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) const {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: {}", name_, fmt::format(text, std::forward<Args>(args)...)));
  }
  template <class... Args>
  void require(bool holds, fmt::format_string<Args...> text, Args&&... args) const {
    if (!holds) refuse(text, std::forward<Args>(args)...);
  }

  // Refuses JSON that nests deeper than any file's: copies and texts of it are made by recursion.
  void require_flat(int depth, const char* what) const {
    constexpr int deepest = 16;
    require(depth <= deepest, "{}: JSON nested over {} deep, which no learned order's is; {}", what, deepest,
            other_file);
  }

  json parse_header() {
    require(contents_.size() <= largest_file, "over {} MiB, which no learned order has; {}", largest_file >> 20,
            other_file);
    require(contents_.size() >= prefix, "{} bytes: shorter than the {} of a header's length; {}", contents_.size(),
            prefix, other_file);
    std::uint64_t length = 0;
    for (std::size_t i = prefix; i-- > 0;) length = length << 8 | static_cast<unsigned char>(contents_[i]);
    require(length <= contents_.size() - prefix,
            "a header of {} bytes in a file of {}: truncated, or no safetensors; {}", length, contents_.size(),
            other_file);
    data_ = contents_.substr(prefix + length);

    // Of two members of one name only one would count, so there is one of each.
    std::set<std::pair<int, std::string>> keys;
    std::string twice;
    const auto remember = [&](int depth, json::parse_event_t event, const json& value) {
      require_flat(depth, "header");
      if (event == json::parse_event_t::object_end) keys.erase(keys.lower_bound({depth + 1, ""}), keys.end());
      if (event == json::parse_event_t::key && !keys.emplace(depth, value.get<std::string>()).second)
        twice = value.get<std::string>();
      return true;
    };
    try {
      json header = json::parse(contents_.substr(prefix, length), remember);
      require(twice.empty(), "header: \"{}\" stands in it twice; {}", shown(twice), other_file);
      require(header.is_object(), "header: no JSON object; {}", other_file);
      for (const auto& [key, value] : header.items())
        require(key == metadata_name || key == weights_name, "tensor \"{}\": {} has no such tensor, only \"{}\"; {}",
                shown(key), format, weights_name, other_file);
      return header;
    } catch (const json::exception& error) {
      std::string_view said = error.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
      said.remove_prefix(std::min(said.find("] ") + 2, said.size()));
      refuse("header: not JSON: {}; {}", said, other_file);
    }
  }

  void read_metadata(const json& header, File* file) {
    require(header.contains(metadata_name) && header[metadata_name].is_object(),
            "header: has no \"{}\", which names the format; {}", metadata_name, other_file);
    metadata_ = &header[metadata_name];
    const std::string given = text("format");
    require(
        given == format,
        "format \"{}\": this pbsattn reads \"{}\" alone; fit the model anew, or take the pbsattn that wrote the file",
        shown(given), format);
    const std::string pairs = text("pairs");
    require(pairs == name_of(RopePairs::halves) || pairs == name_of(RopePairs::neighbours),
            "pairs \"{}\": RoPE turns \"halves\" or \"neighbours\" of columns together; {}", shown(pairs), other_file);
    file->pairs = pairs == name_of(RopePairs::halves) ? RopePairs::halves : RopePairs::neighbours;
    file->sizes = {.layers = number("layers"),
                   .query_heads = number("query_heads"),
                   .kv_heads = number("kv_heads"),
                   .head_dim = number("head_dim")};
    require(file->sizes.query_heads % file->sizes.kv_heads == 0,
            "query_heads {}: no multiple of kv_heads {}, of which each serves as many; {}", file->sizes.query_heads,
            file->sizes.kv_heads, other_file);
    require(file->sizes.head_dim % 2 == 0, "head_dim {}: odd, but RoPE turns pairs; {}", file->sizes.head_dim,
            other_file);
    file->model = text("model");
    file->fitted_on = text("fitted_on");
    file->settings = text("settings");
    const auto flat = [&](int depth, json::parse_event_t /*event*/, const json& /*value*/) {
      require_flat(depth, "settings");
      return true;
    };
    const json settings = json::parse(file->settings, flat, /*allow_exceptions=*/false);
    require(settings.is_object(), "settings \"{}\": no JSON object of settings by layer and head; {}",
            shown(file->settings), other_file);
  }

  void read_weights(const json& header, File* file) {
    require(header.contains(weights_name) && header[weights_name].is_object(), "tensor \"{}\": there is none; {}",
            weights_name, other_file);
    const json& tensor = header[weights_name];
    const auto field = [&](const char* name) { return tensor.contains(name) ? tensor[name] : json(); };
    const Sizes& sizes = file->sizes;
    const json shape{sizes.layers, sizes.kv_heads, sizes.features()};
    const std::int64_t bytes = sizes.layers * sizes.kv_heads * sizes.features() * std::int64_t{sizeof(float)};
    require(field("dtype") == "F32", "{}: dtype {}: it is \"F32\"; {}", weights_name, shown(field("dtype").dump()),
            other_file);
    require(field("shape") == shape, "{}: shape {}: layers, KV heads and 3 head_dim / 2 make {}; {}", weights_name,
            shown(field("shape").dump()), shape.dump(), other_file);
    require(field("data_offsets") == json{0, bytes}, "{}: data_offsets {}: the only tensor's are {}; {}", weights_name,
            shown(field("data_offsets").dump()), json{0, bytes}.dump(), other_file);
    require(std::cmp_equal(data_.size(), bytes), "{} bytes after the header: {} has {}, so the file is {}; {}",
            data_.size(), weights_name, bytes, std::cmp_less(data_.size(), bytes) ? "truncated" : "longer than itself",
            other_file);
    static_assert(std::endian::native == std::endian::little, "as safetensors has its numbers");
    file->weights.resize(data_.size() / sizeof(float));
    std::memcpy(file->weights.data(), data_.data(), data_.size());
    const auto wrong = std::ranges::find_if(file->weights, [](float weight) { return !std::isfinite(weight); });
    if (wrong == file->weights.end()) return;
    const std::int64_t at = wrong - file->weights.begin();
    refuse("{}: {} in layer {}, KV head {}, feature {}: all are finite numbers; fit the model anew", weights_name,
           *wrong, at / sizes.features() / sizes.kv_heads, at / sizes.features() % sizes.kv_heads,
           at % sizes.features());
  }

  std::string text(const char* key) const {
    require(metadata_->contains(key) && (*metadata_)[key].is_string(), "{} \"{}\": there is no such text; {}",
            metadata_name, key, other_file);
    return (*metadata_)[key].get<std::string>();
  }

  std::int64_t number(const char* key) const {
    constexpr std::int64_t most = 1 << 16;  // so that their product is an int64
    const std::string digits = text(key);
    std::int64_t value = 0;
    const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    require(code == std::errc() && end == digits.data() + digits.size() && value >= 1 && value <= most,
            "{} \"{}\": no whole number of 1 .. {}; {}", key, shown(digits), most, other_file);
    return value;
  }

  std::string_view contents_, data_;
  const std::string& name_;
  const json* metadata_ = nullptr;
};

}  // namespace

std::span<const float> File::of_layer(std::int64_t layer) const {
  const std::int64_t count = sizes.kv_heads * sizes.features();
  return std::span(weights).subspan(static_cast<std::size_t>(layer * count), static_cast<std::size_t>(count));
}

File parse(std::string_view contents, const std::string& name) {
  return Reader(contents, name).read();
}

File read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string contents;
  std::string chunk(std::size_t{1} << 16, '\0');
  constexpr auto nothing = std::ifstream::traits_type::eof();
  if (file.peek() == nothing && !file.eof())
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: can't be read ({}); name the file of a learned order", path, std::strerror(errno)));
  while (contents.size() <= largest_file &&
         (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())) || file.gcount() > 0))
    contents.append(chunk, 0, static_cast<std::size_t>(file.gcount()));
  return parse(contents, path);
}

std::string_view name_of(RopePairs pairs) {
  return pairs == RopePairs::halves ? "halves" : "neighbours";
}

std::vector<float> in_pairs(std::span<const float> weights, std::int64_t head_dim, RopePairs from, RopePairs to) {
  std::vector<float> result(weights.begin(), weights.end());
  if (from == to) return result;
  const std::size_t half = static_cast<std::size_t>(head_dim) / 2;
  for (std::size_t head = 0; head < weights.size(); head += 3 * half) {
    const auto columns = weights.subspan(head + half, 2 * half);
    float* const out = result.data() + head + half;
    for (std::size_t i = 0; i < half; ++i) {
      for (std::size_t side = 0; side < 2; ++side) {
        const std::size_t in_halves = i + side * half, in_neighbours = 2 * i + side;
        if (from == RopePairs::halves)
          out[in_neighbours] = columns[in_halves];
        else
          out[in_halves] = columns[in_neighbours];
      }
    }
  }
  return result;
}

void require_model(const File& file, const Sizes& model) {
  const std::pair<const char*, std::int64_t Sizes::*> all[] = {{"layers", &Sizes::layers},
                                                               {"query heads", &Sizes::query_heads},
                                                               {"KV heads", &Sizes::kv_heads},
                                                               {"numbers in a head", &Sizes::head_dim}};
  for (const auto& [what, size] : all)
    if (file.sizes.*size != model.*size)
      throw Error(
          ErrorCode::invalid_argument,
          fmt::format("{}: of {} with {} {}, the model has {}; pass the file that was fitted on this model", file.name,
                      file.model.empty() ? "a model" : shown(file.model), file.sizes.*size, what, model.*size));
}

}  // namespace pbsattn::learned
