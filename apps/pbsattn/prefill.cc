// pbsattn prefill: one prompt under several attentions, in one process: how long, how dense, how faithful.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "attention.h"
#include "commands.h"
#include "errors.h"
#include "files.h"
#include "flags.h"
#include "prefill_report.h"
#include "progress.h"
#include "session.h"

namespace app {
namespace {

struct PrefillOptions {
  PromptFlags prompt;
  int context = 0;     // 0: what prompt and continuation need
  int ubatch = 0;      // 0: the whole prompt
  std::string method;  // "": the flags' default
  std::string compare = "ggml,full";
  AttentionFlags attention;
  int generate = 32;
  std::string positions = "256";
  bool token_ids = false;
  bool each = false;
  std::string json;  // a file, or "-" for the standard output
};

int positions_from(const std::string& text) {
  if (text == "all") return -1;
  int count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count < 1) {
    throw UsageError(fmt::format("--positions {}: neither a number above 0 nor \"all\"; 256 is the default", text));
  }
  return count;
}

// The attentions to run, in the order of the table: the ones to compare with, then the method.
std::vector<Attention> attentions(const PrefillOptions& options) {
  std::vector<Attention> list;
  const std::string method(options.method.empty() ? default_method : options.method);
  const auto add = [&](const std::string& name) {
    if (std::ranges::find(list, name, &Attention::name) == list.end()) {
      list.push_back(attention_named(name, options.attention, name == method ? Role::under_test : Role::compared));
    }
  };
  if (options.compare != "none") {
    for (const std::string& name : CLI::detail::split(options.compare, ',')) add(name);
  }
  add(method);
  return list;
}

// Tokens by their numbers, with white space between.
std::vector<llama_token> read_token_ids(const std::string& text, const PrefillOptions& options, int vocabulary) {
  std::vector<llama_token> tokens;
  std::istringstream words(text);
  std::string word;
  while (words >> word) {
    llama_token token = -1;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), token);
    if (error != std::errc() || end != word.data() + word.size() || token < 0 || token >= vocabulary) {
      throw Failure(fmt::format("prompt file {}: \"{}\" is no token; --token-ids takes numbers from 0 to {}",
                                options.prompt.prompt_file, word.substr(0, 32), vocabulary - 1));
    }
    tokens.push_back(token);
  }
  return tokens;
}

// The prompt's tokens, checked against the segment of the method under test and the context.
std::vector<llama_token> prompt_tokens(const Session& session, const std::string& text, const PrefillOptions& options,
                                       int segment) {
  const ModelInfo& model = session.info();
  if (options.context > model.context) {
    throw UsageError(fmt::format("--context {}: the model was trained on {} tokens; pass at most that", options.context,
                                 model.context));
  }
  std::vector<llama_token> tokens =
      options.token_ids ? read_token_ids(text, options, model.vocabulary) : session.tokenize(text);
  const int found = static_cast<int>(tokens.size());
  if (options.prompt.tokens > found) {
    throw Failure(fmt::format("--tokens {}: {} holds {} tokens; pass a longer text or fewer tokens",
                              options.prompt.tokens, options.prompt.prompt_file, found));
  }
  if (options.prompt.tokens != 0) tokens.resize(static_cast<std::size_t>(options.prompt.tokens));
  const int count = static_cast<int>(tokens.size());
  const int least = std::max(segment + 1, GGML_PBSATTN_MIN_TOKENS_FLOOR);
  if (count < least) {
    throw Failure(
        fmt::format("prompt of {} tokens: sparse attention needs more than a segment of {}, at least {} tokens; "
                    "pass a longer text",
                    count, segment, least));
  }
  const int room = options.context != 0 ? options.context : model.context;
  if (count + options.generate > room) {
    throw Failure(
        fmt::format("prompt of {} tokens and {} to generate: over the context of {}; pass --tokens {} to read "
                    "the text's beginning",
                    count, options.generate, room, std::max(room - options.generate, 1)));
  }
  return tokens;
}

// Room for the sampled distributions: llama.cpp's copy of one run's, and ours of the reference's.
void check_logits_fit(std::size_t positions, const ModelInfo& model) {
  constexpr std::size_t most = std::size_t{4} << 30;
  const std::size_t bytes = positions * static_cast<std::size_t>(model.vocabulary) * sizeof(float);
  if (bytes > most) {
    throw UsageError(
        fmt::format("--positions: {} positions of {} logits are {:.1f} GiB a run, over {} GiB; pass at most {}",
                    positions, model.vocabulary, static_cast<double>(bytes) / (1U << 30U), most >> 30,
                    most / sizeof(float) / static_cast<std::size_t>(model.vocabulary)));
  }
}

// How long the prompt takes to its first token.
double time_prefill(Session& session, const std::vector<llama_token>& prompt, const std::vector<int>& positions,
                    const Attention& attention) {
  using clock = std::chrono::steady_clock;
  const Progress progress(attention.name, [layers = session.info().layers, length = std::ssize(prompt)] {
    const auto stats = layer_stats();
    const auto queries = std::transform_reduce(stats.begin(), stats.end(), std::int64_t{0}, std::plus(),
                                               [](const auto& layer) { return layer.queries; });
    return static_cast<double>(queries) / static_cast<double>(layers * length);
  });
  const auto start = clock::now();
  session.prefill(prompt, positions, attention);
  static_cast<void>(session.most_likely(static_cast<int>(prompt.size()) - 1));
  return std::chrono::duration<double>(clock::now() - start).count();
}

Run measure(Session& session, const std::vector<llama_token>& prompt, const std::vector<int>& positions,
            const Attention& attention, FidelityJudge& judge, int generate) {
  Run run{.attention = attention};
  run.first_token_seconds = time_prefill(session, prompt, positions, attention);
  run.layers = layer_stats();
  run.fidelity = judge.judge([&](int position) { return session.logits(position); });
  run.continuation = session.generate(static_cast<int>(prompt.size()), generate);
  run.continuation_text = session.text_of(run.continuation);
  return run;
}

// Touches all weights with a short prompt and all buffers with two layers of the long one, so that the first
// run measured doesn't pay for it, and learns whether pbsattn can take this model's attention. Returns why
// it can't take some of it, or "".
std::string warm_up(Session& session, const std::vector<llama_token>& prompt, const std::vector<int>& positions,
                    const Attention& attention) {
  session.prefill(prompt, positions, attention, 2);
  const std::size_t count = std::min<std::size_t>(prompt.size(), 512);
  const auto outputs = sample_positions(static_cast<int>(count), static_cast<int>(positions.size()) - 1);
  session.prefill({prompt.data(), count}, outputs, attention);
  const auto layers = layer_stats();
  std::string reason = why_not_taken(layers, session.info().layers);
  const bool took_some =
      std::ranges::any_of(layers, [](const auto& layer) { return layer.reasons[GGML_PBSATTN_TAKEN] > 0; });
  if (!took_some && !attention.by_ggml) {
    throw Failure(
        fmt::format("model {}: pbsattn can't take its attention ({}); run it with ggml's kernel: --method ggml "
                    "--compare none",
                    session.info().path, reason));
  }
  return reason;
}

void prefill(const PrefillOptions& options) {
  std::vector<Attention> list = attentions(options);
  const int wanted_positions = positions_from(options.positions);
  constexpr int most_tokens = 1 << 24;
  require_between(options.generate, 0, most_tokens, "--generate", "0 generates nothing");
  require_between(options.prompt.tokens, 0, most_tokens, "--tokens", "0 reads the whole text");
  if (options.ubatch != 0)
    require_between(options.ubatch, GGML_PBSATTN_MIN_TOKENS_FLOOR, most_tokens, "--ubatch", "0 takes the whole prompt");
  require_between(options.context, 0, most_tokens, "--context", "0 takes what the prompt needs");
  options.prompt.check_threads();
  const std::string text = read_prompt(options.prompt.prompt_file);
  std::shared_ptr<const pbsattn::learned::File> learned;
  if (!options.attention.learned().empty()) learned = read_learned(options.attention.learned());
  for (Attention& attention : list) attention.learned = learned;
  std::optional<OutputFile> json_file;
  if (!options.json.empty() && options.json != "-") json_file.emplace(options.json);

  Session session(options.prompt.model, options.prompt.verbose);
  if (learned != nullptr) session.require_own(*learned);
  const std::vector<llama_token> prompt = prompt_tokens(session, text, options, list.back().options.segment);
  const int length = static_cast<int>(prompt.size());
  const std::vector<int> positions = sample_positions(length, wanted_positions);
  check_logits_fit(positions.size(), session.info());

  PrefillReport report{.model = session.info(),
                       .prompt_file = options.prompt.prompt_file,
                       .prompt_tokens = length,
                       .context = options.context != 0 ? options.context : length + options.generate,
                       .ubatch = options.ubatch != 0 ? std::min(options.ubatch, length) : length,
                       .threads = options.prompt.thread_count(),
                       .positions = static_cast<int>(positions.size()),
                       .each_position = options.each};
  session.open({.prompt = length,
                .generate = options.generate,
                .context = report.context,
                .ubatch = report.ubatch,
                .outputs = static_cast<int>(positions.size()),
                .threads = report.threads});
  report.left_to_ggml = warm_up(session, prompt, positions, list.back());

  // Fidelity is measured against full attention, so that runs first; the table keeps the order asked for.
  std::vector<const Attention*> order;
  order.reserve(list.size());
  for (const Attention& attention : list) order.push_back(&attention);
  std::stable_partition(order.begin(), order.end(),
                        [](const Attention* attention) { return attention->name == "full"; });
  report.reference = order.front()->name;
  FidelityJudge judge(prompt, positions);
  report.runs.resize(list.size());
  for (const Attention* attention : order) {
    report.runs[static_cast<std::size_t>(attention - list.data())] =
        measure(session, prompt, positions, *attention, judge, options.generate);
  }

  constexpr int most_repeats = 3;
  for (int i = 0; i < most_repeats; ++i) {
    Run* const run = report.disturbed();
    if (run == nullptr) break;
    const double seconds = time_prefill(session, prompt, positions, run->attention);
    run->time_again(seconds, layer_stats());
  }

  const std::string json = to_json(report).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  if (json_file) json_file->commit(json);
  print(options.json == "-" ? json : table(report));
}

}  // namespace

void add_prefill(CLI::App& program) {
  auto* command = program.add_subcommand("prefill", "run a long prompt under several attentions and compare them");
  auto options = std::make_shared<PrefillOptions>();
  options->prompt.add_to(*command);
  command->add_flag("--token-ids", options->token_ids,
                    "the prompt file holds the numbers of tokens, as a tokenizer gave them, instead of a text");
  command->add_option("--context", options->context, "tokens the KV cache holds; 0: as many as needed")
      ->capture_default_str();
  command
      ->add_option("--ubatch", options->ubatch,
                   "tokens of a micro-batch, of which each chooses its blocks by itself; 0: the whole prompt")
      ->capture_default_str();
  command->add_option("--method", options->method, "the method under test; `pbsattn methods` lists them")
      ->default_str("auto, with --learned as its file says");
  command
      ->add_option(
          "--compare", options->compare,
          "run these too, by commas: ggml (llama.cpp's own kernel) and methods, with options of their own as in "
          "pbs:top_p=0.95:segment=512; or none. The first is the baseline of speed-ups")
      ->capture_default_str();
  options->attention.add_to(*command);
  command->add_option("--generate", options->generate, "tokens to continue the prompt with, greedily")
      ->capture_default_str();
  command->add_option("--positions", options->positions, "positions at which fidelity is measured: a number, or all")
      ->capture_default_str();
  command->add_flag("--each", options->each, "write the likelihood at every one of these positions into the JSON");
  command->add_option("--json", options->json, "write JSON to a file; without a file, print it instead of the table")
      ->expected(0, 1)
      ->default_str("-");
  command->callback([options] { prefill(*options); });
}

}  // namespace app
