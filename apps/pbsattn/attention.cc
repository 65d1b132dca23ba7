#include "attention.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <utility>

#include "errors.h"
#include "files.h"
#include "learned_file.h"
#include "pbsattn/options.hpp"

namespace app {
namespace {

using pbsattn::KeepRule;
using pbsattn::name_of;

// The library's own check of options, on a shape that nothing else can be wrong with.
void check(const pbsattn::Options& options) {
  const pbsattn::Shape shape{.q_len = 1, .kv_len = 1, .head_dim = 8};
  static_cast<void>(pbsattn::Plan::create(options, shape, pbsattn::Device::reference()));
}

// Tells whether an option is a part that makes a method what it is.
bool is_part(std::string_view option) {
  constexpr std::array<std::string_view, 5> parts{"permutation", "score", "keep", "correction", "fallback"};
  return std::ranges::find(parts, option) != parts.end();
}

}  // namespace

void AttentionFlags::add_to(CLI::App& command) {
  command.add_option(
      "--learned", learned_,
      "the file of a learned order (pbsattn learned shows it): the weights of permutation learned, and what "
      "the methods \"learned\" and \"auto\" are");
  const pbsattn::Options defaults;
  pbsattn::visit_option_rows(
      [&](const pbsattn::OptionInfo& info, auto field) {
        using Field = decltype(field);
        std::string flag = "--" + std::string(info.name);
        std::ranges::replace(flag, '_', '-');
        if (info.name.find('_') != std::string_view::npos) flag += ",--" + std::string(info.name);
        CLI::Option* option = nullptr;
        if constexpr (std::is_enum_v<Field>) {
          const auto help = fmt::format("{}: {}", info.meaning, fmt::join(pbsattn::Names<Field>::values, ", "));
          option = command.add_option_function<std::string>(
              flag, [this, name = info.name.data()](const std::string& value) { given_.emplace_back(name, value); },
              help);
        } else {
          option = command.add_option_function<Field>(
              flag,
              [this, name = info.name.data()](Field value) { given_.emplace_back(name, fmt::format("{}", value)); },
              std::string(info.meaning));
        }
        option->group(is_part(info.name) ? "Parts of the method under test"
                                         : "Options of methods, each of which has its own where none is given");
        if (info.name == "precision") option->default_str("bf16");
      },
      defaults);
}

Given AttentionFlags::given(Role role) const {
  Given result = given_;
  if (role == Role::compared) std::erase_if(result, [](const auto& option) { return is_part(option.first); });
  return result;
}

void AttentionFlags::apply(Role role, pbsattn::Options* options) const {
  for (const auto& [name, value] : given(role)) pbsattn::set_option(*options, name, value);
}

Attention attention_named(const std::string& spec, const AttentionFlags& flags, Role role) {
  Attention attention;
  attention.name = spec;
  attention.by_ggml = spec == "ggml";
  if (attention.by_ggml) return attention;
  if (spec.starts_with("ggml:")) throw UsageError(fmt::format("{}: ggml's kernel has no options; name it alone", spec));
  const pbsattn::MethodText parts = pbsattn::split_method(spec);
  attention.by_learned = parts.name == learned_name || (parts.name == default_method && !flags.learned().empty());
  if (attention.by_learned && flags.learned().empty())
    throw UsageError(fmt::format("{}: is what the file of a learned order says; name one with --learned", spec));
  pbsattn::Options& options = attention.options =
      attention.by_learned ? pbsattn::parse_method(pbsattn::learned::method) : pbsattn::method(parts.name);
  options.precision = pbsattn::Precision::bf16;
  flags.apply(role, &options);
  Given given = flags.given(role);
  for (const auto& [name, value] : parts.options) {
    if (name == "settings") {
      attention.settings = read_settings(std::string(value));
    } else {
      pbsattn::set_option(options, name, value);
      given.emplace_back(name, value);
    }
  }
  check(options);
  if (attention.by_learned) attention.over = std::move(given);
  if (options.permutation == pbsattn::Permutation::learned && flags.learned().empty())
    throw UsageError(
        fmt::format("{}: permutation learned goes by weights, which a file has; name one with --learned", spec));
  return attention;
}

nlohmann::json to_json(const pbsattn::Options& options) {
  nlohmann::json json;
  pbsattn::visit_options(
      options, [&](std::string_view name, auto field) { json[std::string(name)] = pbsattn::plain_value(field); });
  return json;
}

std::string describe(const pbsattn::Options& options) {
  if (options.keep == KeepRule::all) return "keeps every block";
  const auto rule = [&] {
    switch (options.keep) {
      case KeepRule::all: break;
      case KeepRule::top_p: return fmt::format("top_p {}", options.top_p);
      case KeepRule::threshold:
        return fmt::format("threshold {}", options.threshold) +
               (options.threshold_tokens == 0.0F ? "" : fmt::format(" or {} / tokens", options.threshold_tokens)) +
               (options.floor_top_p == 0.0F ? "" : fmt::format(" or top_p {}", options.floor_top_p));
      case KeepRule::relative: return fmt::format("relative {}", options.threshold);
      case KeepRule::top_k: return fmt::format("top_k {}", options.top_k);
      case KeepRule::density: return fmt::format("density {}", options.density);
      case KeepRule::none: return std::string("none");
      case KeepRule::vertical_slash: return fmt::format("columns {}, diagonals {}", options.vertical, options.slash);
      case KeepRule::coverage:
        return fmt::format("coverage {}, tau {}, budget {}", options.top_p, options.tau, options.min_budget);
    }
    return std::string("all");
  };
  return fmt::format("permutation {}, score {}, keep rule {}, blocks of {}, segments of {}, dense last rows {}{}{}{}{}",
                     name_of(options.permutation), name_of(options.score), rule(), options.block, options.segment,
                     options.dense_last_rows,
                     options.sink_blocks == 0 ? "" : fmt::format(", sink blocks {}", options.sink_blocks),
                     options.local_blocks == 0 ? "" : fmt::format(", local blocks {}", options.local_blocks),
                     options.correction == pbsattn::Correction::none ? "" : ", mean correction",
                     options.fallback == pbsattn::Fallback::when_faster ? "; full when that is faster" : "");
}

}  // namespace app
