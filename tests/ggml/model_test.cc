// A whole model through libllama: every layer against ggml's kernel on the same inputs, and perplexity.
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
constexpr std::int32_t scored_tokens = 1100;  // the last ones count for perplexity
constexpr int threads = 2;

Config config_of(const char* method, float top_p, pbsattn_precision precision) {
  Config config;
  EXPECT_EQ(pbsattn_method(method, &config.options), PBSATTN_OK);
  config.options.top_p = top_p;
  config.options.precision = precision;
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
  double perplexity = 0;
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

  static Prefill prefill(Config config, std::uint32_t ubatch = prompt_tokens) {
    EXPECT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
    llama_context_params params = llama_context_default_params();
    params.n_ctx = prompt_tokens;
    params.n_batch = prompt_tokens;
    params.n_ubatch = ubatch;
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
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
    double sum = 0;
    const auto words = static_cast<std::size_t>(llama_vocab_n_tokens(vocabulary()));
    for (std::int32_t i = prompt_tokens - scored_tokens; i + 1 < prompt_tokens; ++i)
      sum += surprise({llama_get_logits_ith(context, i), words}, batch.token[i + 1]);
    result.perplexity = std::exp(sum / (scored_tokens - 1));
    llama_batch_free(batch);
    llama_free(context);

    result.layers = layer_stats();
    return result;
  }

  // The model without us; computed once.
  static const Prefill& ggmls() {
    static const Prefill result = [] {
      Config config = config_of("full", 1.0F, PBSATTN_PRECISION_F32);
      config.mode = GGML_PBSATTN_MODE_OFF;
      return prefill(config);
    }();
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
  } const cases[] = {{PBSATTN_PRECISION_F32, 5e-4},  // ggml rounds queries, and on some machines sums, to f16
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
    EXPECT_DOUBLE_EQ(checked.perplexity, theirs.perplexity);
  }
}

TEST_F(Model, PerplexityAgreesAtTopPOne) {
  // Differences of 1e-7 in attention flip roundings in quantised matrix products: at 2K tokens perplexity
  // wanders by some 0.4 % either way.
  const double expected = ggmls().perplexity;
  for (const pbsattn_precision precision : {PBSATTN_PRECISION_F32, PBSATTN_PRECISION_BF16}) {
    const Prefill ours = prefill(config_of("pbs", 1.0F, precision));
    EXPECT_NEAR(ours.perplexity / expected, 1.0, 5e-3) << "precision " << precision;
  }
}

TEST_F(Model, SparseVisitsLessAndStaysClose) {
  const double expected = ggmls().perplexity;
  const Prefill usual = prefill(config_of("pbs", 0.9F, PBSATTN_PRECISION_BF16));
  const Prefill sparser = prefill(config_of("pbs", 0.5F, PBSATTN_PRECISION_BF16));
  expect_each_layer_taken(usual, layers(), 1);
  EXPECT_LT(usual.density(), 0.95);
  EXPECT_LT(sparser.density(), usual.density() - 0.05);
  EXPECT_NE(usual.perplexity, expected);
  EXPECT_NE(sparser.perplexity, usual.perplexity);
  EXPECT_NEAR(usual.perplexity / expected, 1.0, 0.1);
}

TEST_F(Model, ChunksOfAPrefillAreTakenAndTheShortLastOneLeft) {
  Config config = config_of("pbs", 1.0F, PBSATTN_PRECISION_F32);
  config.check = true;
  const Prefill chunked = prefill(config, 512);
  expect_each_layer_taken(chunked, layers(), prompt_tokens / 512);
  EXPECT_EQ(chunked.layers[0].queries, prompt_tokens / 512 * 512);
  EXPECT_EQ(chunked.layers[0].kv_len, prompt_tokens / 512 * 512);
  EXPECT_LE(chunked.worst_relative_rms(), 5e-4);
}

}  // namespace
}  // namespace pbsattn::ggml::test
