#include "session.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ggml-backend.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "core/options/c_options.h"
#include "errors.h"
#include "settings.h"

namespace app {
namespace {

// llama.cpp tells why it failed in its log only, so an operation's first error is kept for our one line.
struct Log {
  bool verbose = false;
  std::string first_error;
};

void on_log(ggml_log_level level, const char* text, void* user) {
  auto& log = *static_cast<Log*>(user);
  if (log.verbose) std::fputs(text, stderr);
  if (level == GGML_LOG_LEVEL_ERROR && log.first_error.empty()) {
    log.first_error = text;
    std::erase(log.first_error, '\n');
  }
}

Log& the_log() {
  static Log log;
  return log;
}

std::string because() {
  const std::string said = std::exchange(the_log().first_error, {});
  return said.empty() ? "" : fmt::format(" (it says \"{}\")", said);
}

// Brings up ggml's CPU backend, which may live in a library of its own beside libllama, and ours.
void start_backends() {
  Dl_info library{};
  if (ggml_backend_reg_by_name("CPU") == nullptr &&
      dladdr(reinterpret_cast<const void*>(&llama_backend_init), &library) != 0) {
    const auto folder = std::filesystem::path(library.dli_fname).parent_path();
    ggml_backend_load_all_from_path(folder.c_str());
  }
  if (ggml_backend_reg_by_name("CPU") == nullptr) {
    throw Failure("llama.cpp: no CPU backend found; build its target ggml-cpu beside libllama");
  }
  ggml_backend_register(ggml_backend_pbsattn_reg());
  llama_backend_init();
}

// What llama.cpp would answer with an error of its own, or with none, told in ours.
void check_model_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) throw Failure(fmt::format("model {}: a directory; name a GGUF file", path));
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(fmt::format("model {}: {}; name a readable GGUF file", path, std::strerror(errno)));
  std::array<char, 4> magic{};
  file.read(magic.data(), magic.size());
  if (file.gcount() != 4 || std::memcmp(magic.data(), "GGUF", 4) != 0) {
    throw Failure(
        fmt::format("model {}: not a GGUF file (its first bytes are not \"GGUF\"); convert it with llama.cpp's "
                    "convert_hf_to_gguf.py, or fetch one with tools/models.py",
                    path));
  }
}

void configure_plugin(const Attention& attention) {
  pbsattn_options options = pbsattn::to_c(attention.options);
  ggml_pbsattn_config config{.struct_size = sizeof config};
  ggml_backend_pbsattn_get_config(&config);
  config.mode = attention.by_ggml ? GGML_PBSATTN_MODE_GGML : GGML_PBSATTN_MODE_PBSATTN;
  if (!attention.by_ggml) config.options = &options;
  config.min_tokens = GGML_PBSATTN_MIN_TOKENS_FLOOR;
  const char* const settings = attention.settings.empty() ? nullptr : attention.settings.c_str();
  if (!ggml_backend_pbsattn_configure(&config) || !ggml_backend_pbsattn_set_layers(settings))
    throw Failure(fmt::format("{}: {}", attention.name, ggml_backend_pbsattn_last_error()));
  pbsattn::ggml::set_learned(learned_layers(attention));
}

}  // namespace

std::shared_ptr<const pbsattn::ggml::LearnedLayers> learned_layers(const Attention& attention) {
  if (attention.learned == nullptr) return nullptr;
  try {
    return std::make_shared<const pbsattn::ggml::LearnedLayers>(attention.learned, attention.by_learned,
                                                                pbsattn::to_c(attention.options), attention.over);
  } catch (const std::runtime_error& error) {
    throw Failure(fmt::format("learned order {}", error.what()));
  }
}

Session::Session(const std::string& model_path, bool verbose) {
  the_log().verbose = verbose;
  llama_log_set(on_log, &the_log());
  check_model_file(model_path);
  start_backends();

  llama_model_params params = llama_model_default_params();
  params.n_gpu_layers = 0;
  params.progress_callback = [](float, void*) { return !interrupted(); };
  model_.reset(llama_model_load_from_file(model_path.c_str(), params));
  throw_if_interrupted();
  if (model_ == nullptr) {
    throw Failure(
        fmt::format("model {}: llama.cpp can't load it{}; is it whole, and of a kind that this llama.cpp knows?",
                    model_path, because()));
  }
  if (llama_model_has_encoder(model_.get()) || llama_model_is_recurrent(model_.get()) ||
      llama_model_is_diffusion(model_.get())) {
    throw Failure(
        fmt::format("model {}: no decoder with causal attention, so there is no prefill to make sparse; "
                    "run it with llama.cpp's own tools",
                    model_path));
  }
  vocab_ = llama_model_get_vocab(model_.get());
  std::array<char, 128> description{};
  llama_model_desc(model_.get(), description.data(), description.size());
  info_ = {.path = model_path,
           .description = description.data(),
           .layers = llama_model_n_layer(model_.get()),
           .q_heads = llama_model_n_head(model_.get()),
           .kv_heads = llama_model_n_head_kv(model_.get()),
           .head_dim = number("attention.key_length",
                              llama_model_n_embd(model_.get()) / std::max(llama_model_n_head(model_.get()), 1)),
           .context = llama_model_n_ctx_train(model_.get()),
           .vocabulary = llama_vocab_n_tokens(vocab_)};
}

int Session::number(const std::string& key, int otherwise) const {
  std::array<char, 64> text{};
  const auto value = [&](const std::string& name) {
    return llama_model_meta_val_str(model_.get(), name.c_str(), text.data(), text.size()) >= 0 ? text.data() : "";
  };
  const std::string name = value("general.architecture") + ("." + key);
  const std::string_view digits = value(name);
  int result = otherwise;
  std::from_chars(digits.data(), digits.data() + digits.size(), result);
  return result;
}

void Session::require_own(const pbsattn::learned::File& file) const {
  try {
    pbsattn::learned::require_model(file, {info_.layers, info_.q_heads, info_.kv_heads, info_.head_dim});
  } catch (const pbsattn::Error& error) {
    throw Failure(fmt::format("learned order {}", error.what()));
  }
}

std::pair<std::vector<float>, pbsattn::RopePairs> Session::weights_of(const pbsattn::learned::File& file,
                                                                      int layer) const {
  using pbsattn::RopePairs;
  const llama_rope_type type = llama_model_rope_type(model_.get());
  const RopePairs pairs = type == LLAMA_ROPE_TYPE_NORM ? RopePairs::neighbours : RopePairs::halves;
  const bool whole = number("rope.dimension_count", info_.head_dim) == info_.head_dim;
  if (type == LLAMA_ROPE_TYPE_NONE || (pairs != file.pairs && !whole))
    throw Failure(
        fmt::format("learned order {}: its pairs are {}, and those of model {} can't be told or differ in a part "
                    "of the columns alone; draw it without --learned",
                    file.name, pbsattn::learned::name_of(file.pairs), info_.path));
  return {pbsattn::learned::in_pairs(file.of_layer(layer), file.sizes.head_dim, file.pairs, pairs), pairs};
}

std::vector<llama_token> Session::tokenize(const std::string& text) const {
  std::vector<llama_token> tokens(text.size() + 2);
  const auto length = static_cast<int32_t>(text.size());
  const int count = llama_tokenize(vocab_, text.data(), length, tokens.data(), static_cast<int32_t>(tokens.size()),
                                   /*add_special=*/true, /*parse_special=*/false);
  if (count < 0) throw Failure(fmt::format("prompt: llama.cpp can't tokenise it{}; pass another text", because()));
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

std::string Session::text_of(std::span<const llama_token> tokens) const {
  std::string text;
  for (const llama_token token : tokens) {
    std::array<char, 256> piece{};
    const int length = llama_token_to_piece(vocab_, token, piece.data(), piece.size(), 0, /*special=*/true);
    if (length > 0) text.append(piece.data(), static_cast<std::size_t>(length));
  }
  return text;
}

void Session::open(const ContextSize& size) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(size.context != 0 ? size.context : size.prompt + size.generate);
  params.n_batch = static_cast<uint32_t>(size.prompt);
  params.n_ubatch = static_cast<uint32_t>(size.ubatch != 0 ? size.ubatch : size.prompt);
  params.n_outputs_max = static_cast<uint32_t>(size.outputs);
  params.n_threads = params.n_threads_batch = size.threads;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.abort_callback = [](void* self) { return static_cast<Session*>(self)->layers_done() || interrupted(); };
  params.abort_callback_data = this;
  Attention ggml;  // which ops are routed is decided in here
  ggml.name = "ggml";
  ggml.by_ggml = true;
  configure_plugin(ggml);
  context_.reset(llama_init_from_model(model_.get(), params));
  if (context_ == nullptr) {
    throw Failure(fmt::format("context of {} tokens: llama.cpp can't make it{}; pass a smaller --tokens or --context",
                              params.n_ctx, because()));
  }
}

bool Session::layers_done() const {
  return stop_after_ != 0 && ggml_backend_pbsattn_stats_get(nullptr, 0) >= stop_after_;
}

void Session::decode(std::span<const llama_token> tokens, int first_position, std::span<const int> outputs) {
  llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
  batch.n_tokens = static_cast<int32_t>(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = first_position + static_cast<llama_pos>(i);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 0;
  }
  for (const int output : outputs) batch.logits[output] = 1;
  const int status = llama_decode(context_.get(), batch);
  llama_synchronize(context_.get());
  llama_batch_free(batch);
  throw_if_interrupted();
  constexpr int aborted = 2;
  if (status != 0 && !(status == aborted && layers_done())) {
    throw Failure(fmt::format("llama_decode of {} tokens at {}: status {}{}; pass a smaller --tokens", tokens.size(),
                              first_position, status, because()));
  }
}

void Session::prefill(std::span<const llama_token> prompt, std::span<const int> outputs, const Attention& attention,
                      int layers) {
  configure_plugin(attention);
  llama_memory_clear(llama_get_memory(context_.get()), /*data=*/true);
  ggml_backend_pbsattn_stats_reset();
  stop_after_ = static_cast<std::size_t>(layers);
  decode(prompt, 0, outputs);
  stop_after_ = 0;
}

std::span<const float> Session::logits(int position) const {
  const float* row = llama_get_logits_ith(context_.get(), position);
  return {row, static_cast<std::size_t>(info_.vocabulary)};
}

llama_token Session::most_likely(int position) const {
  const auto row = logits(position);
  return static_cast<llama_token>(std::ranges::max_element(row) - row.begin());
}

std::vector<llama_token> Session::generate(int prompt_length, int count) {
  std::vector<llama_token> tokens;
  if (count == 0) return tokens;
  tokens.push_back(most_likely(prompt_length - 1));
  while (static_cast<int>(tokens.size()) < count && !llama_vocab_is_eog(vocab_, tokens.back())) {
    const int position = prompt_length + static_cast<int>(tokens.size()) - 1;
    constexpr int only[] = {0};
    decode({&tokens.back(), 1}, position, only);
    tokens.push_back(most_likely(0));
  }
  return tokens;
}

std::vector<ggml_pbsattn_layer_stats> layer_stats() {
  std::vector<ggml_pbsattn_layer_stats> layers(ggml_backend_pbsattn_stats_get(nullptr, 0),
                                               {.struct_size = sizeof(ggml_pbsattn_layer_stats)});
  layers.resize(std::min(layers.size(), ggml_backend_pbsattn_stats_get(layers.data(), layers.size())));
  return layers;
}

std::string why_not_taken(std::span<const ggml_pbsattn_layer_stats> layers, int model_layers) {
  std::set<std::string> reasons;
  for (int r = GGML_PBSATTN_TAKEN + 1; r < GGML_PBSATTN_REASON_COUNT; ++r) {
    const auto reason = static_cast<ggml_pbsattn_reason>(r);
    if (reason == GGML_PBSATTN_BY_MODE) continue;
    const bool when_planned = (ggml_backend_pbsattn_refusals() >> r & 1U) != 0;
    const bool when_run = std::ranges::any_of(layers, [&](const auto& layer) { return layer.reasons[r] > 0; });
    if (when_planned || when_run) reasons.insert(ggml_backend_pbsattn_reason_name(reason));
  }
  if (reasons.empty() && static_cast<int>(layers.size()) < model_layers) {
    reasons.insert(fmt::format("{} of {} layers have such attention", layers.size(), model_layers));
  }
  return fmt::format("{}", fmt::join(reasons, ", "));
}

}  // namespace app
