#include "attention.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string_view>
#include <type_traits>
#include <vector>

#include "errors.h"
#include "files.h"
#include "pbsattn/options.hpp"

namespace app {
namespace {

using pbsattn::KeepRule;
using pbsattn::name_of;

// As the library does, but an error is one of usage.
void set(pbsattn::Options* options, std::string_view name, std::string_view value) {
  try {
    pbsattn::set_option(*options, name, value);
  } catch (const pbsattn::Error& error) {
    throw UsageError(error.what());
  }
}

// The library's own check of options, on a shape that nothing else can be wrong with.
void check(const pbsattn::Options& options) {
  const pbsattn::Shape shape{.q_len = 1, .kv_len = 1, .head_dim = 8};
  static_cast<void>(pbsattn::Plan::create(options, shape, pbsattn::Device::reference()));
}

}  // namespace

void AttentionFlags::add_to(CLI::App& command) {
  command.add_option(
      "--top-p", top_p,
      "attention mass that the kept blocks hold by their scores, in (0, 1]; of methods that keep by top_p");
  command.add_option("--threshold", threshold,
                     "least share of a row's attention of a kept block, in [0, 1]; of methods that keep by threshold");
  command.add_option("--top-k", top_k, "blocks that a row keeps; of methods that keep by top_k");
  command.add_option("--density", density,
                     "share of its causal blocks that a row keeps, in [0, 1]; of methods that keep by density");
  command.add_option("--floor-top-p", floor_top_p,
                     "attention mass that a threshold must leave by the scores, in [0, 1]; 0 turns it off");
  command.add_option("--segment", segment, "tokens inside which keys move; a multiple of the block of 128");
  command.add_option("--dense-last-rows", dense_last_rows,
                     "the prompt's last blocks of queries that attend to everything");
  command.add_option("--precision", precision, "what products are computed in: bf16, f32 or automatic")
      ->capture_default_str();
}

Attention attention_named(const std::string& spec, const AttentionFlags& flags) {
  const std::vector<std::string> parts = CLI::detail::split(spec, ':');
  Attention attention{.name = spec, .by_ggml = parts.front() == "ggml", .options = {}, .settings = {}};
  if (attention.by_ggml && parts.size() > 1) {
    throw UsageError(fmt::format("{}: ggml's kernel has no options; name it alone", spec));
  }
  if (attention.by_ggml) return attention;
  pbsattn::Options& options = attention.options = pbsattn::method(parts.front());
  set(&options, "precision", flags.precision);
  options.segment = flags.segment.value_or(options.segment);
  options.top_p = flags.top_p.value_or(options.top_p);
  options.threshold = flags.threshold.value_or(options.threshold);
  options.floor_top_p = flags.floor_top_p.value_or(options.floor_top_p);
  options.top_k = flags.top_k.value_or(options.top_k);
  options.density = flags.density.value_or(options.density);
  options.dense_last_rows = flags.dense_last_rows.value_or(options.dense_last_rows);
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const std::size_t equals = parts[i].find('=');
    if (equals == std::string::npos) {
      throw UsageError(fmt::format("{}: \"{}\" is no OPTION=VALUE; write, say, pbs:top_p=0.95", spec, parts[i]));
    }
    const std::string_view part = parts[i];
    if (part.substr(0, equals) == "settings")
      attention.settings = read_settings(std::string(part.substr(equals + 1)));
    else
      set(&options, part.substr(0, equals), part.substr(equals + 1));
  }
  check(options);
  return attention;
}

pbsattn_options to_c(const pbsattn::Options& options) {
  pbsattn_options c{.struct_size = sizeof c};
  pbsattn::visit_options(options, [&](std::string_view name, auto field) {
    if constexpr (std::is_enum_v<decltype(field)>)
      pbsattn_set_option(&c, name.data(), name_of(field).data());
    else
      pbsattn_set_option(&c, name.data(), fmt::format("{}", field).c_str());
  });
  return c;
}

nlohmann::json to_json(const pbsattn::Options& options) {
  nlohmann::json json;
  pbsattn::visit_options(options, [&](std::string_view name, auto field) {
    if constexpr (std::is_enum_v<decltype(field)>)
      json[std::string(name)] = name_of(field);
    else
      json[std::string(name)] = field;
  });
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
