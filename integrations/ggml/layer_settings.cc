#include "layer_settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

#include "core/options/c_options.h"
#include "core/options/shown.h"

namespace pbsattn::ggml {
namespace {

using nlohmann::json;

std::int64_t index_of(std::string_view key, std::string_view what, std::int64_t every) {
  if (key == "*") return every;
  std::int64_t index = 0;
  const auto [end, code] = std::from_chars(key.data(), key.data() + key.size(), index);
  if (code != std::errc() || end != key.data() + key.size() || index < 0)
    throw std::runtime_error(
        fmt::format("{} \"{}\": not a number from 0 up, nor \"*\" for every one", what, shown(key)));
  return index;
}

// The text as JSON. What is wrong is told with the keys that led there.
json parsed(std::string_view text) {
  std::vector<std::string> keys;
  const auto remember = [&keys](int depth, json::parse_event_t event, const json& value) {
    if (event != json::parse_event_t::key) return true;
    keys.resize(static_cast<std::size_t>(depth) - 1);
    keys.push_back(value.get<std::string>());
    return true;
  };
  try {
    return json::parse(text, remember);
  } catch (const json::exception& error) {
    constexpr std::array names{"layer ", ", head ", ", "};
    std::string where;
    for (std::size_t i = 0; i < keys.size(); ++i) where += (i < names.size() ? names[i] : ", ") + shown(keys[i]);
    if (!keys.empty()) where += ": ";
    std::string_view said = error.what();  // "[json.exception.out_of_range.406] number overflow parsing '1e999'"
    said.remove_prefix(std::min(said.find("] ") + 2, said.size()));
    constexpr int overflow = 406;
    throw std::runtime_error(error.id == overflow ? fmt::format("{}{}; write one that a double holds", where, said)
                                                  : fmt::format("{}not JSON: {}", where, said));
  }
}

// Says so, since names are shown with "?" for it.
void refuse_nul(std::string_view text, const std::string& where) {
  if (text.find('\0') != std::string_view::npos)
    throw std::runtime_error(
        fmt::format("{}: \"{}\" contains a NUL character, which no option has; take it out", where, shown(text)));
}

// The value as an object's members, to go through.
auto members(const json& value, const std::string& what) {
  if (!value.is_object()) throw std::runtime_error(fmt::format("{}: not an object in braces", what));
  return value.items();
}

}  // namespace

void set_method(std::string_view text, pbsattn_options* options) {
  const MethodText parts = split_method(text);
  Options changed = method(parts.name);
  changed.precision = to_cpp(*options).precision;
  for (const auto& [name, value] : parts.options) set_option(changed, name, value);
  *options = to_c(changed);
}

std::optional<std::string> sets_models_own(const pbsattn_options& options) {
  constexpr std::string_view rule = "the model's own counts; leave it out";
  if (options.softcap != default_options.softcap) return fmt::format("softcap {}: {}", options.softcap, rule);
  if (options.window != default_options.window) return fmt::format("window {}: {}", options.window, rule);
  return std::nullopt;
}

LayerSettings LayerSettings::parse(std::string_view text, const pbsattn_options& base) {
  const json document = parsed(text);
  LayerSettings settings;
  for (const auto& [layer, heads] : members(document, "settings")) {
    const std::string where = fmt::format("layer {}", shown(layer));
    auto& of_layer = settings.layers_[index_of(layer, "layer", every)];
    for (const auto& [head, options] : members(heads, where)) {
      Changes& changes = of_layer[index_of(head, where + ", head", every)];
      const std::string of_head = fmt::format("{}, head {}", where, shown(head));
      for (const auto& [name, value] : members(options, of_head)) {
        refuse_nul(name, of_head);
        if (!value.is_string() && !value.is_number())
          throw std::runtime_error(fmt::format("{}, {}: neither a number nor a name", of_head, shown(name)));
        changes.emplace_back(name, value.is_string() ? value.get<std::string>() : value.dump());
        refuse_nul(changes.back().second, of_head);
      }
      // (The form with iterators: Clang 14 can't read that with ranges in GCC 12's library.)
      std::stable_partition(changes.begin(), changes.end(),
                            [](const auto& change) { return change.first == "method"; });
      try {
        pbsattn_options tried = base;
        apply(changes, &tried);
        if (const auto wrong = sets_models_own(tried); wrong && !sets_models_own(base))
          throw std::runtime_error(*wrong);
      } catch (const std::runtime_error& error) {
        throw std::runtime_error(fmt::format("{}: {}", of_head, error.what()));
      }
    }
  }
  return settings;
}

LayerSettings LayerSettings::read(const std::string& path, const pbsattn_options& base) {
  std::ifstream file(path);
  std::stringstream text;
  constexpr auto nothing = std::ifstream::traits_type::eof();
  if (file.peek() == nothing ? !file.eof() : !(text << file.rdbuf()))
    throw std::runtime_error(fmt::format("{}: can't be read ({})", path, std::strerror(errno)));
  try {
    return parse(text.str(), base);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(fmt::format("{}: {}", path, error.what()));
  }
}

void LayerSettings::apply(const Changes& changes, pbsattn_options* options) {
  for (const auto& [name, value] : changes) {
    if (name == "method") {
      set_method(value, options);
    } else {
      Options changed = to_cpp(*options);
      set_option(changed, name, value);
      *options = to_c(changed);
    }
  }
}

std::vector<pbsattn_options> LayerSettings::heads(std::int32_t layer, std::int64_t q_heads,
                                                  const std::vector<pbsattn_options>& base) const {
  std::vector<pbsattn_options> result = base;
  std::vector<std::int64_t> applying{every};
  if (layer >= 0) applying.push_back(layer);
  for (const std::int64_t index : applying) {
    const auto found = layers_.find(index);
    if (found == layers_.end()) continue;
    for (const auto& [head, changes] : found->second) {
      if (head >= q_heads)
        throw std::runtime_error(
            fmt::format("settings of layer {}, head {}: it has {} query heads", layer, head, q_heads));
      if (head != every && result.size() == 1) result.resize(static_cast<std::size_t>(q_heads), result.front());
      if (head == every)
        for (pbsattn_options& options : result) apply(changes, &options);
      else
        apply(changes, &result[static_cast<std::size_t>(head)]);
    }
  }
  return result;
}

}  // namespace pbsattn::ggml
