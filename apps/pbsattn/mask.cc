// pbsattn mask: a picture of the blocks that one head of a real model attends to, before and after the
// permutation, at the same settings.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "commands.h"
#include "core/options/c_options.h"
#include "errors.h"
#include "files.h"
#include "flags.h"
#include "mask_svg.h"
#include "progress.h"
#include "session.h"

namespace app {
namespace {

struct MaskOptions {
  PromptFlags prompt;
  std::string out;
  int layer = 0;
  int head = 0;
  AttentionFlags attention;
};

// One head's [token][head_dim] tensor, copied out of the model.
struct HeadTensor {
  pbsattn::DType dtype = pbsattn::DType::f32;
  std::int64_t head_dim = 0;
  std::vector<std::byte> bytes;

  HeadTensor() = default;
  HeadTensor(const pbsattn_view& view, std::int64_t head, std::int64_t tokens, std::int64_t dim)
      : dtype(static_cast<pbsattn::DType>(view.dtype)), head_dim(dim) {
    const std::int64_t size = view.dtype == PBSATTN_F32 ? 4 : 2;
    bytes.resize(static_cast<std::size_t>(tokens * dim * size));
    const auto* from = static_cast<const std::byte*>(view.data) + head * view.head_stride * size;
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::memcpy(bytes.data() + token * dim * size, from + token * view.token_stride * size,
                  static_cast<std::size_t>(dim * size));
    }
  }
  pbsattn::ConstView view() const { return {.data = bytes.data(), .dtype = dtype, .token_stride = head_dim}; }
};

// Waits for one layer of a prefill and takes one head of it.
struct Capture {
  int layer;
  int head;
  pbsattn::Shape shape;  // of the head taken; q_len 0 until then
  HeadTensor q, k, v;

  static void observe(void* user, int32_t layer, const pbsattn_shape* shape, const pbsattn_view* q,
                      const pbsattn_view* k, const pbsattn_view* v) {
    auto& self = *static_cast<Capture*>(user);
    if (layer != self.layer || self.shape.q_len != 0 || self.head >= shape->q_heads) return;
    const std::int64_t kv_head = self.head / (shape->q_heads / shape->kv_heads);
    self.q = HeadTensor(*q, self.head, shape->q_len, shape->head_dim);
    self.k = HeadTensor(*k, kv_head, shape->kv_len, shape->head_dim);
    self.v = HeadTensor(*v, kv_head, shape->kv_len, shape->head_dim);
    self.shape = {.q_len = shape->q_len, .kv_len = shape->kv_len, .head_dim = shape->head_dim};
  }
};

void capture_head(Session& session, Capture& capture, const std::vector<llama_token>& prompt,
                  const Attention& attention) {
  ggml_backend_pbsattn_set_observer(Capture::observe, &capture);
  {
    const Progress progress(fmt::format("layer {}", capture.layer), [&capture] {
      return static_cast<double>(ggml_backend_pbsattn_stats_get(nullptr, 0)) / (capture.layer + 1);
    });
    const int last = static_cast<int>(prompt.size()) - 1;
    session.prefill(prompt, {&last, 1}, attention, capture.layer + 1);
  }
  ggml_backend_pbsattn_set_observer(nullptr, nullptr);
  if (capture.shape.q_len == 0) {
    const ModelInfo& model = session.info();
    throw Failure(
        fmt::format("layer {} of model {}: pbsattn can't take its attention ({}); name another layer or model",
                    capture.layer, model.path, why_not_taken(layer_stats(), model.layers)));
  }
}

MaskPanel panel(const std::string& title, const pbsattn::Options& options, const pbsattn::OrderWeights& weights,
                const Capture& capture, int threads) {
  const auto plan = pbsattn::Plan::create(options, capture.shape, pbsattn::Device::cpu(threads));
  std::vector<std::byte> workspace(plan.workspace_size());
  std::vector<float> out(static_cast<std::size_t>(capture.shape.q_len * capture.shape.head_dim));
  const pbsattn::View out_view{.data = out.data(), .token_stride = capture.shape.head_dim};
  MaskPanel result{.title = title};
  pbsattn::Stats stats;
  plan.run({.q = capture.q.view(), .k = capture.k.view(), .v = capture.v.view(), .order_weights = weights},
           {.out = out_view}, workspace, &stats, &result.trace);
  result.density = stats.density();
  return result;
}

// The options of one head under what the file of a learned order says, and what the command line says over that.
pbsattn::Options options_of_head(const Attention& attention, int layer, int head, int q_heads) {
  const auto heads = learned_layers(attention)->heads(layer, q_heads, {pbsattn::to_c(attention.options)});
  return pbsattn::to_cpp(heads[heads.size() == 1 ? 0 : static_cast<std::size_t>(head)]);
}

void require_index(int value, int count, const char* option, const std::string& what) {
  if (value < 0 || value >= count) {
    throw UsageError(fmt::format("{} {}: the model's {} are 0 to {}", option, value, what, count - 1));
  }
}

void mask(const MaskOptions& options) {
  // What the picture shows is an order, which auto has none of without a file.
  Attention after = attention_named(options.attention.learned().empty() ? "pbs" : std::string(learned_name),
                                    options.attention, Role::under_test);
  const Attention full = attention_named("full", options.attention, Role::compared);
  options.prompt.check_threads();
  const std::string text = read_prompt(options.prompt.prompt_file);
  if (after.by_learned) after.learned = read_learned(options.attention.learned());
  OutputFile file(options.out);

  Session session(options.prompt.model, options.prompt.verbose);
  require_index(options.layer, session.info().layers, "--layer", "layers");
  require_index(options.head, session.info().q_heads, "--head", "query heads");
  pbsattn::Options permuted = after.options;
  std::vector<float> weights;
  pbsattn::RopePairs pairs = pbsattn::RopePairs::halves;
  if (after.by_learned) {
    session.require_own(*after.learned);
    permuted = options_of_head(after, options.layer, options.head, session.info().q_heads);
    std::tie(weights, pairs) = session.weights_of(*after.learned, options.layer);
  }
  permuted.fallback = pbsattn::Fallback::never;  // which would keep every block of a short prompt
  pbsattn::Options unpermuted = permuted;
  unpermuted.permutation = pbsattn::Permutation::none;
  std::vector<llama_token> prompt = session.tokenize(text);
  if (options.prompt.tokens > 0 && options.prompt.tokens < static_cast<int>(prompt.size())) {
    prompt.resize(static_cast<std::size_t>(options.prompt.tokens));
  }
  const int length = static_cast<int>(prompt.size());
  if (length > session.info().context || length < GGML_PBSATTN_MIN_TOKENS_FLOOR) {
    throw Failure(
        fmt::format("prompt of {} tokens: outside {} .. {}, the model's context; pass another text or --tokens", length,
                    GGML_PBSATTN_MIN_TOKENS_FLOOR, session.info().context));
  }
  const int threads = options.prompt.thread_count();
  session.open({.prompt = length, .threads = threads});

  Capture capture{.layer = options.layer, .head = options.head, .shape = {}, .q = {}, .k = {}, .v = {}};
  capture_head(session, capture, prompt, full);
  const std::string title =
      fmt::format("{}, layer {}, head {}, {} tokens, {}", std::filesystem::path(options.prompt.model).stem().string(),
                  options.layer, options.head, length,
                  after.by_learned ? "a learned order" : fmt::format("top-p {}", permuted.top_p));
  const std::size_t features = weights.size() / static_cast<std::size_t>(session.info().kv_heads);
  const int group = session.info().q_heads / session.info().kv_heads;
  const pbsattn::OrderWeights own{
      .values = std::span(weights).subspan(static_cast<std::size_t>(options.head / group) * features, features),
      .pairs = pairs};
  const std::vector<MaskPanel> panels = {panel("Keys where they stand", unpermuted, own, capture, threads),
                                         panel("Keys permuted inside segments", permuted, own, capture, threads)};
  file.commit(mask_svg(title, panels));
  print(fmt::format("{}: density {:.3f} before the permutation, {:.3f} after it\n", options.out, panels[0].density,
                    panels[1].density));
}

}  // namespace

void add_mask(CLI::App& program) {
  auto* command = program.add_subcommand("mask", "draw the blocks one head attends to, before and after permutation");
  auto options = std::make_shared<MaskOptions>();
  options->prompt.add_to(*command);
  command->add_option("--layer", options->layer, "the layer, from 0")->capture_default_str();
  command->add_option("--head", options->head, "the query head, from 0")->capture_default_str();
  command->add_option("--out", options->out, "the SVG file to write")->required();
  options->attention.add_to(*command);
  command->callback([options] { mask(*options); });
}

}  // namespace app
