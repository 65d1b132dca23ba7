// A whole model through libllama: every layer against ggml's kernel on the same inputs, and what tokens it expects.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

#include "attention_graph.h"
#include "ggml-pbsattn.h"
#include "interface.h"
#include "llama.h"
#include "real_text.h"

namespace pbsattn::ggml::test {
namespace {

// Neither a multiple of the block nor of the cache's padding: tails everywhere.
constexpr std::int32_t prompt_tokens = 2200;
constexpr std::int32_t scored_tokens = 1100;  // the last ones, whose surprise is compared
constexpr int threads = 2;

Config config_of(const char* method, float top_p, pbsattn_precision precision) {
  Config config;
  EXPECT_EQ(pbsattn_method(method, &config.options), PBSATTN_OK);
  config.options.top_p = top_p;
  config.options.precision = precision;
  return config;
}

Config off() {
  Config config = config_of("full", 1.0F, PBSATTN_PRECISION_F32);
  config.mode = GGML_PBSATTN_MODE_OFF;
  return config;
}

// -log p(token) under one row of logits.
double surprise(std::span<const float> logits, llama_token token) {
  const float highest = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit - highest));
  return std::log(sum) + highest - logits[static_cast<std::size_t>(token)];
}

struct Prefill {
  std::vector<double> surprises;  // of the scored tokens
  std::vector<ggml_pbsattn_layer_stats> layers;

  double density() const {
    double visited = 0, causal = 0;
    for (const auto& layer : layers) {
      visited += static_cast<double>(layer.visited_blocks);
      causal += static_cast<double>(layer.causal_blocks);
    }
    return visited / causal;
  }
  double worst_relative_rms() const {
    double worst = 0;
    for (const auto& layer : layers) worst = std::max(worst, layer.check_rel_rms);
    return worst;
  }
};

// How two runs differ, token by token, in nats: pairing takes out how hard a token is.
struct Change {
  double mean = 0;
  double standard_error = 0;
  double rms = 0;
};
Change change(const Prefill& run, const Prefill& from) {
  const auto count = static_cast<double>(run.surprises.size());
  double sum = 0, squares = 0;
  for (std::size_t i = 0; i < run.surprises.size(); ++i) {
    const double difference = run.surprises[i] - from.surprises[i];
    sum += difference;
    squares += difference * difference;
  }
  const double mean = sum / count;
  return {.mean = mean,
          .standard_error = std::sqrt((squares / count - mean * mean) / (count - 1)),
          .rms = std::sqrt(squares / count)};
}

class Model : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (model_path().empty() || real_text().empty()) return;
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
        },
        nullptr);
    load_ggml();
    ggml_backend_register(ggml_backend_pbsattn_reg());
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    model_ = llama_model_load_from_file(model_path().c_str(), params);
    ASSERT_NE(model_, nullptr) << "PBSATTN_TEST_MODEL " << model_path() << " doesn't load";

    const std::string text = real_text();
    tokens_.resize(text.size() + 8);
    tokens_.resize(static_cast<std::size_t>(llama_tokenize(vocabulary(), text.data(),
                                                           static_cast<std::int32_t>(text.size()), tokens_.data(),
                                                           static_cast<std::int32_t>(tokens_.size()), true, false)));
    ASSERT_GT(tokens_.size(), static_cast<std::size_t>(prompt_tokens));
  }
  static void TearDownTestSuite() { llama_model_free(model_); }
  void SetUp() override {
    if (model_path().empty()) GTEST_SKIP() << no_model;
    if (real_text().empty()) GTEST_SKIP() << no_text;
  }

  static const llama_vocab* vocabulary() { return llama_model_get_vocab(model_); }
  static std::int32_t layers() { return llama_model_n_layer(model_); }

  static Prefill prefill(const Config& config, std::uint32_t ubatch = prompt_tokens,
                         llama_flash_attn_type flash_attention = LLAMA_FLASH_ATTN_TYPE_ENABLED) {
    EXPECT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
    llama_context_params params = llama_context_default_params();
    params.n_ctx = prompt_tokens;
    params.n_batch = prompt_tokens;
    params.n_ubatch = ubatch;
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = flash_attention;
    llama_context* context = llama_init_from_model(model_, params);
    ggml_backend_pbsattn_stats_reset();

    llama_batch batch = llama_batch_init(prompt_tokens, 0, 1);
    batch.n_tokens = prompt_tokens;
    for (std::int32_t i = 0; i < prompt_tokens; ++i) {
      batch.token[i] = tokens_[static_cast<std::size_t>(i)];
      batch.pos[i] = i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = i >= prompt_tokens - scored_tokens;
    }
    Prefill result;
    EXPECT_EQ(llama_decode(context, batch), 0);
    const auto words = static_cast<std::size_t>(llama_vocab_n_tokens(vocabulary()));
    for (std::int32_t i = prompt_tokens - scored_tokens; i + 1 < prompt_tokens; ++i)
      result.surprises.push_back(surprise({llama_get_logits_ith(context, i), words}, batch.token[i + 1]));
    llama_batch_free(batch);
    llama_free(context);

    result.layers = layer_stats();
    return result;
  }

  // Runs that several tests look at, computed once: the model without us, by each of ggml's own two attentions,
  static const Prefill& ggmls() {
    static const Prefill result = prefill(off());
    return result;
  }
  static const Prefill& ggmls_without_flash_attention() {
    static const Prefill result = prefill(off(), prompt_tokens, LLAMA_FLASH_ATTN_TYPE_DISABLED);
    return result;
  }
  // and with us as we are by default.
  static const Prefill& usual() {
    static const Prefill result = prefill(config_of("pbs", 0.9F, PBSATTN_PRECISION_BF16));
    return result;
  }

 private:
  inline static llama_model* model_ = nullptr;
  inline static std::vector<llama_token> tokens_;
};

void expect_each_layer_taken(const Prefill& run, std::int32_t layers, std::int64_t calls) {
  ASSERT_EQ(run.layers.size(), static_cast<std::size_t>(layers));
  for (std::int32_t layer = 0; layer < layers; ++layer) {
    const ggml_pbsattn_layer_stats& stats = run.layers[static_cast<std::size_t>(layer)];
    EXPECT_EQ(stats.layer, layer);
    EXPECT_EQ(stats.calls, calls);
    EXPECT_EQ(stats.reasons[GGML_PBSATTN_TAKEN], calls) << "layer " << layer;
  }
}

TEST_F(Model, EveryLayerEqualsGgmlsOnTheSameInputs) {
  const Prefill& theirs = ggmls();
  EXPECT_TRUE(theirs.layers.empty());
  struct {
    pbsattn_precision precision;
    double tolerance;
  } const cases[] = {
      {PBSATTN_PRECISION_F32, f32_tolerance(5e-4, 2e-2)},  // ggml rounds queries, and on some machines sums, to f16
      {PBSATTN_PRECISION_BF16, 2e-2}};
  for (const auto& [precision, tolerance] : cases) {
    Config config = config_of("pbs", 1.0F, precision);
    config.check = true;
    const Prefill checked = prefill(config);
    expect_each_layer_taken(checked, layers(), 1);
    for (const ggml_pbsattn_layer_stats& layer : checked.layers) {
      EXPECT_EQ(layer.checks, 1);
      EXPECT_EQ(layer.visited_blocks, layer.causal_blocks);
      EXPECT_EQ(layer.kv_len, prompt_tokens);
      EXPECT_LE(layer.check_rel_rms, tolerance) << "layer " << layer.layer << ", precision " << precision;
    }
    // What the layers passed on was ggml's result.
    EXPECT_EQ(checked.surprises, theirs.surprises);
  }
}

TEST_F(Model, PerplexityAgreesAtTopPOne) {
  // Any difference in attention, if only of 1e-7, flips roundings of activations to 8 bits in the quantised matrix
  // products. Flips make more of them in each layer, until tokens wander as far as quantisation lets them, whatever
  // began it. How far that is depends on the processor, so it is measured here, between ggml's own two ways to
  // compute the same attention: .096 nats on an AMD Zen 5, where ours differ by .090 to .099 at either precision. A
  // fault isn't rounding and takes tokens further: to .30 nats if the scale is wrong by a tenth, and to .31 if the
  // least third of all blocks are left out, which is asked for too, lest the bound let faults pass.
  const double wandering = change(ggmls_without_flash_attention(), ggmls()).rms;
  ASSERT_GT(wandering, 0.0);
  ASSERT_GT(change(usual(), ggmls()).rms, 2 * wandering) << "blocks left out would pass";
  for (const pbsattn_precision precision : {PBSATTN_PRECISION_F32, PBSATTN_PRECISION_BF16}) {
    const Change ours = change(prefill(config_of("pbs", 1.0F, precision)), ggmls());
    EXPECT_LE(ours.rms, 1.5 * wandering) << "precision " << precision;
    // Wandering goes either way: its mean is zero but for its own standard error, which no processor exceeds six times.
    EXPECT_LE(std::abs(ours.mean), 6 * ours.standard_error) << "precision " << precision;
  }
}

TEST_F(Model, SparseVisitsLessAndStaysClose) {
  const Prefill sparser = prefill(config_of("pbs", 0.5F, PBSATTN_PRECISION_BF16));
  expect_each_layer_taken(usual(), layers(), 1);
  EXPECT_LT(usual().density(), 0.95);
  EXPECT_LT(sparser.density(), usual().density() - 0.05);
  // The blocks left out at top_p .9 change tokens by .3 nats, but perplexity by -3 +- 1 %: what wandering adds to that
  // is .3 % (a standard error), so that a tenth is seven standard errors away on any processor.
  EXPECT_LT(std::abs(change(usual(), ggmls()).mean), 0.1);
}

TEST_F(Model, ChunksOfAPrefillAreTakenAndTheShortLastOneLeft) {
  Config config = config_of("pbs", 1.0F, PBSATTN_PRECISION_F32);
  config.check = true;
  const Prefill chunked = prefill(config, 512);
  expect_each_layer_taken(chunked, layers(), prompt_tokens / 512);
  EXPECT_EQ(chunked.layers[0].queries, prompt_tokens / 512 * 512);
  EXPECT_EQ(chunked.layers[0].kv_len, prompt_tokens / 512 * 512);
  EXPECT_LE(chunked.worst_relative_rms(), f32_tolerance(5e-4, 2e-2));
}

}  // namespace
}  // namespace pbsattn::ggml::test
