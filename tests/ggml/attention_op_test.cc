// What the backend takes and what it leaves to ggml; the result must be right either way.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "attention_graph.h"
#include "interface.h"

namespace pbsattn::ggml::test {
namespace {

// Who ends up computing an op.
enum class Route {
  pbsattn,   // our kernel
  fallback,  // routed to our backend, which hands it to ggml's kernel
  ggml,      // left to ggml when the graph was planned
};

struct Expectation {
  std::string name;
  Case op;
  Route route;
  ggml_pbsattn_reason reason;
  double tolerance = 2e-5;  // relative RMS against ggml's kernel when we compute; else results are equal
};
std::ostream& operator<<(std::ostream& out, const Expectation& e) {
  return out << e.name;
}

Config exact_config() {
  Config config = default_config();
  config.options.top_p = 1.0F;
  config.options.precision = PBSATTN_PRECISION_F32;
  return config;
}

class AttentionOp : public testing::TestWithParam<Expectation> {
 protected:
  void SetUp() override {
    configure(exact_config());
    ggml_backend_pbsattn_stats_reset();
  }
  void TearDown() override { ggml_backend_pbsattn_set_observer(nullptr, nullptr); }

  static void configure(Config config) { ASSERT_TRUE(test::configure(config)) << ggml_backend_pbsattn_last_error(); }
  static std::vector<ggml_pbsattn_layer_stats> stats() { return layer_stats(); }
};
using SingleOp = AttentionOp;

TEST_P(AttentionOp, TakenOrNotTheResultIsGgmls) {
  const Expectation& expected = GetParam();
  const AttentionGraph graph(expected.op);
  const auto theirs = graph.compute(Backends(false).all());
  const auto ours = graph.compute(Backends(true).all());
  ASSERT_EQ(theirs.status, GGML_STATUS_SUCCESS);
  ASSERT_EQ(ours.status, GGML_STATUS_SUCCESS);

  EXPECT_EQ(ours.routed, expected.route != Route::ggml);
  if (expected.route == Route::pbsattn)
    EXPECT_LE(relative_rms(ours.values, theirs.values), f32_tolerance(expected.tolerance, 1e-2));
  else
    EXPECT_EQ(ours.values, theirs.values);

  if (expected.route == Route::ggml) {
    EXPECT_TRUE(stats().empty());
    EXPECT_EQ(ggml_backend_pbsattn_examine(graph.op()), expected.reason);
    const bool counts_as_prefill = expected.reason != GGML_PBSATTN_FEW_TOKENS;
    EXPECT_EQ(ggml_backend_pbsattn_refusals(), counts_as_prefill ? 1U << expected.reason : 0U);
  } else {
    ASSERT_EQ(stats().size(), 1U);
    EXPECT_EQ(stats()[0].layer, 3);
    EXPECT_EQ(stats()[0].calls, 1);
    EXPECT_EQ(stats()[0].reasons[expected.reason], 1) << ggml_backend_pbsattn_reason_name(expected.reason);
  }
}

Visible sliding_window(std::int64_t window, std::int64_t offset = 0) {
  return [=](std::int64_t i, std::int64_t j) { return j <= offset + i && offset + i - j < window; };
}
// What llama.cpp shows of a window's cache of so many cells once it uses them again.
Visible reused_cells(std::int64_t window, std::int64_t offset, std::int64_t cells) {
  return [=](std::int64_t i, std::int64_t j) {
    const std::int64_t behind = (offset + i - j) % cells;  // of the last token in cell j that row i may see
    return j < cells && behind < window;
  };
}
Visible two_sequences(std::int64_t first_length) {
  return [=](std::int64_t i, std::int64_t j) { return j <= i && (i < first_length) == (j < first_length); };
}
Visible hole_at(std::int64_t key) {
  return [=](std::int64_t i, std::int64_t j) { return j <= i && (j != key || i == j); };
}

const std::vector<Expectation> expectations = {
    {"Causal", {}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"CausalAfterPrefix", {.n_q = 520, .n_kv = 1024, .offset = 333}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"CausalWithoutPadding", {.n_q = 640, .n_kv = 640}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"HeadDim128OneToOneHeads", {.head_dim = 128, .kv_heads = 4}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"HeadDim72", {.head_dim = 72}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"HeadDim256", {.head_dim = 256, .q_heads = 2, .kv_heads = 1}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"Float32Cache", {.kv_type = GGML_TYPE_F32}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    // ggml rounds q to bf16 too when k is bf16.
    {"Bfloat16Cache", {.kv_type = GGML_TYPE_BF16}, Route::pbsattn, GGML_PBSATTN_TAKEN, 1e-2},
    {"Sinks", {.sinks = 4}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"SinksAfterPrefix",
     {.head_dim = 128, .q_heads = 8, .n_q = 520, .n_kv = 1024, .offset = 333, .sinks = 8},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},
    {"SoftCap", {.soft_cap = 30.0F}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"SoftCapThatMostLogitsReach", {.soft_cap = 1.5F}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"SoftCapAfterPrefix",
     {.head_dim = 256, .n_q = 520, .n_kv = 1024, .offset = 333, .soft_cap = 50.0F},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},
    {"SoftCapAndSinks", {.kv_type = GGML_TYPE_F32, .sinks = 4, .soft_cap = 5.0F}, Route::pbsattn, GGML_PBSATTN_TAKEN},

    {"WindowOfOne", {.visible = sliding_window(1)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowWithinASegment", {.visible = sliding_window(100)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowOfABlock", {.head_dim = 128, .visible = sliding_window(128)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowOverSegments", {.visible = sliding_window(300)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowThatHidesOneKey", {.visible = sliding_window(599)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowOfTheSequence", {.visible = sliding_window(600)}, Route::pbsattn, GGML_PBSATTN_TAKEN},
    {"WindowAfterPrefix",
     {.n_q = 520, .n_kv = 1024, .visible = sliding_window(64, 333), .offset = 333},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},
    {"WindowThatReachesThePrefix",
     {.n_q = 1000, .n_kv = 2304, .kv_type = GGML_TYPE_F32, .visible = sliding_window(500, 1100), .offset = 1100},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},
    {"WindowInBfloat16",
     {.kv_type = GGML_TYPE_BF16, .visible = sliding_window(128)},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN,
     1e-2},
    {"WindowWithSinks",
     {.q_heads = 8, .n_q = 700, .n_kv = 1280, .visible = sliding_window(128, 513), .offset = 513, .sinks = 8},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},
    {"WindowWithSoftCap",
     {.head_dim = 256, .visible = sliding_window(200), .soft_cap = 50.0F},
     Route::pbsattn,
     GGML_PBSATTN_TAKEN},

    {"WindowOfNothing", {.visible = sliding_window(0)}, Route::fallback, GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"ReusedCells",
     {.n_q = 512, .visible = reused_cells(128, 2000, 640)},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"Chunks",
     {.visible = [](std::int64_t i, std::int64_t j) { return j <= i && i / 256 == j / 256; }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"SymmetricWindow",
     {.visible = [](std::int64_t i, std::int64_t j) { return j < 600 && std::abs(i - j) <= 50; }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"TwoSequences", {.visible = two_sequences(300)}, Route::fallback, GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"OneKeyHidden", {.visible = hole_at(77)}, Route::fallback, GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"LastRowSeesOneKeyTooMany",
     {.visible = [](std::int64_t i, std::int64_t j) { return j <= i + (i == 599 ? 1 : 0); }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"Bidirectional",
     {.visible = [](std::int64_t, std::int64_t j) { return j < 600; }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"AllVisible",
     {.visible = [](std::int64_t, std::int64_t) { return true; }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},
    {"FirstRowHidden",
     {.visible = [](std::int64_t i, std::int64_t j) { return j < i; }},
     Route::fallback,
     GGML_PBSATTN_MASK_NOT_CAUSAL},

    {"Decode", {.n_q = 1, .offset = 700}, Route::ggml, GGML_PBSATTN_FEW_TOKENS},
    {"ShortPrompt", {.n_q = 511}, Route::ggml, GGML_PBSATTN_FEW_TOKENS},
    {"QuantisedCache", {.kv_type = GGML_TYPE_Q8_0}, Route::ggml, GGML_PBSATTN_TYPES},
    {"HeadDimNoMultipleOfEight", {.head_dim = 36}, Route::ggml, GGML_PBSATTN_HEAD_DIM},
    {"HeadDim320", {.head_dim = 320, .q_heads = 2, .kv_heads = 1}, Route::ggml, GGML_PBSATTN_HEAD_DIM},
    {"ValuesNarrowerThanKeys", {.head_dim = 64, .value_dim = 32}, Route::ggml, GGML_PBSATTN_HEAD_DIM},
    {"TwoStreams", {.streams = 2}, Route::ggml, GGML_PBSATTN_LAYOUT},
    {"NegativeSoftCap", {.soft_cap = -30.0F}, Route::ggml, GGML_PBSATTN_SOFT_CAP},
    {"Alibi", {.max_bias = 8.0F}, Route::ggml, GGML_PBSATTN_ALIBI},
    {"AlibiWithSinks", {.sinks = 4, .max_bias = 8.0F}, Route::ggml, GGML_PBSATTN_ALIBI},
    {"TopK", {.n_kv_max = 64}, Route::ggml, GGML_PBSATTN_TOP_K},
    {"NoMask", {.masked = false}, Route::ggml, GGML_PBSATTN_NO_MASK},
    {"SixthSource", {.more_source = 5}, Route::ggml, GGML_PBSATTN_UNKNOWN_INPUTS},
    {"LastSource", {.more_source = GGML_MAX_SRC - 1}, Route::ggml, GGML_PBSATTN_UNKNOWN_INPUTS},
    {"SixthParameter", {.parameter = 5}, Route::ggml, GGML_PBSATTN_UNKNOWN_INPUTS},
    {"NinthParameter", {.parameter = 8}, Route::ggml, GGML_PBSATTN_UNKNOWN_INPUTS},
    {"LastParameter",
     {.parameter = GGML_MAX_OP_PARAMS / static_cast<int>(sizeof(std::int32_t)) - 1},
     Route::ggml,
     GGML_PBSATTN_UNKNOWN_INPUTS},
};
INSTANTIATE_TEST_SUITE_P(, AttentionOp, testing::ValuesIn(expectations),
                         [](const auto& test) { return test.param.name; });

TEST_F(SingleOp, PrecisionOfNoNameIsLeftToGgml) {
  // ggml ends the process over it, so it is only examined.
  EXPECT_EQ(ggml_backend_pbsattn_examine(AttentionGraph({.parameter = 3}).op()), GGML_PBSATTN_UNKNOWN_INPUTS);
}

TEST_F(SingleOp, SinksThatArentANumberOfEachHeadAreLeftToGgml) {
  // Whose kernel would read behind them.
  for (const Case& wrong : {Case{.sinks = 3}, Case{.sinks = 8}, Case{.sinks = 4, .sink_type = GGML_TYPE_F16}})
    EXPECT_EQ(ggml_backend_pbsattn_examine(AttentionGraph(wrong).op()), GGML_PBSATTN_SINKS);
}

TEST_F(SingleOp, SoftCapsThatAreNoNumberAreLeftToGgml) {
  for (const float cap : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    EXPECT_EQ(ggml_backend_pbsattn_examine(AttentionGraph({.soft_cap = cap}).op()), GGML_PBSATTN_SOFT_CAP) << cap;
}

TEST_F(SingleOp, LayersOfOneShapeAreToldApart) {
  const Backends context(true);
  for (int round = 0; round < 2; ++round)
    for (const Case& layer : {Case{}, Case{.sinks = 4}, Case{.soft_cap = 2.0F}, Case{.sinks = 4, .soft_cap = 3.0F},
                              Case{.visible = sliding_window(90)}, Case{.visible = sliding_window(91)}}) {
      const AttentionGraph graph(layer);
      const auto theirs = graph.compute(Backends(false).all());
      EXPECT_LE(relative_rms(graph.compute(context.all()).values, theirs.values), f32_tolerance(2e-5, 1e-2))
          << layer.sinks << " sinks, soft-cap " << layer.soft_cap;
    }
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_TAKEN], 12);
}

TEST_F(SingleOp, BothDevicesAgree) {
  Config config = exact_config();
  ASSERT_EQ(pbsattn_method("pbs:top_p=0.5:precision=f32", &config.options), PBSATTN_OK);
  for (const Case& layer : {Case{.q_heads = 2, .kv_heads = 1, .n_q = 1024, .n_kv = 1024},
                            Case{.q_heads = 2, .kv_heads = 1, .n_q = 1024, .n_kv = 1024, .sinks = 2, .soft_cap = 5},
                            Case{.n_q = 600, .n_kv = 1024, .visible = sliding_window(200, 300), .offset = 300}}) {
    ggml_backend_pbsattn_stats_reset();
    const AttentionGraph graph(layer);
    config.device = PBSATTN_DEVICE_CPU;
    configure(config);
    const auto fast = graph.compute(Backends(true).all());
    config.device = PBSATTN_DEVICE_REFERENCE;
    configure(config);
    const auto reference = graph.compute(Backends(true).all());
    EXPECT_LE(relative_rms(fast.values, reference.values), f32_tolerance(1e-5, 3e-2));
    EXPECT_LT(stats()[0].visited_blocks, stats()[0].causal_blocks);
  }
}

TEST_F(SingleOp, Bfloat16ProductsStayCloseToGgml) {
  Config config = exact_config();
  config.options.precision = PBSATTN_PRECISION_BF16;
  configure(config);
  const AttentionGraph graph({});
  const auto ours = graph.compute(Backends(true).all());
  EXPECT_LE(relative_rms(ours.values, graph.compute(Backends(false).all()).values), 1e-2);
}

TEST_F(SingleOp, CacheOfAnotherNameHasNoLayer) {
  for (const char* name : {"leaf_7", "cache_k_l", "cache_k_l3x", "cache_k_l-3"}) {
    ggml_backend_pbsattn_stats_reset();
    AttentionGraph({.cache_name = name}).compute(Backends(true).all());
    ASSERT_EQ(stats().size(), 1U);
    EXPECT_EQ(stats()[0].layer, -1) << name;
    EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_TAKEN], 1);
  }
}

TEST_F(SingleOp, SparseVisitsLessAndChangesTheResult) {
  Config config = exact_config();
  ASSERT_EQ(pbsattn_method("pbs:top_p=0.3:precision=f32", &config.options), PBSATTN_OK);
  configure(config);
  const AttentionGraph graph({.n_q = 2048, .n_kv = 2048});
  const auto ours = graph.compute(Backends(true).all());
  const auto theirs = graph.compute(Backends(false).all());
  ASSERT_EQ(stats().size(), 1U);
  EXPECT_LT(stats()[0].visited_blocks, stats()[0].causal_blocks);
  EXPECT_EQ(stats()[0].causal_blocks, 4 * 16 * 17 / 2);
  EXPECT_GT(relative_rms(ours.values, theirs.values), 1e-3);
}

TEST_F(SingleOp, ChangedMaskIsReadAgainThoughNobodyAnnouncedAGraph) {
  AttentionGraph graph({});
  const Backends ours(true), theirs(false);
  ASSERT_EQ(graph.compute(ours.all()).status, GGML_STATUS_SUCCESS);
  graph.set_mask(two_sequences(50));
  EXPECT_EQ(graph.compute(ours.all()).values, graph.compute(theirs.all()).values);
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_MASK_NOT_CAUSAL], 1);
}

TEST_F(SingleOp, GgmlModeTimesGgmlsKernel) {
  Config config = exact_config();
  config.mode = GGML_PBSATTN_MODE_GGML;
  configure(config);
  const AttentionGraph graph({});
  const auto ours = graph.compute(Backends(true).all());
  EXPECT_TRUE(ours.routed);
  EXPECT_EQ(ours.values, graph.compute(Backends(false).all()).values);
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_BY_MODE], 1);
  EXPECT_GT(stats()[0].total_seconds, 0.0);
}

TEST_F(SingleOp, OffTakesNothing) {
  Config config = exact_config();
  config.mode = GGML_PBSATTN_MODE_OFF;
  configure(config);
  EXPECT_FALSE(AttentionGraph({}).compute(Backends(true).all()).routed);
}

TEST_F(SingleOp, CheckPassesOnGgmlsResultAndRecordsTheDifference) {
  Config config = exact_config();
  config.check = true;
  configure(config);
  const AttentionGraph graph({});
  EXPECT_EQ(graph.compute(Backends(true).all()).values, graph.compute(Backends(false).all()).values);
  ASSERT_EQ(stats()[0].checks, 1);
  EXPECT_GT(stats()[0].check_max_abs, 0.0);
  EXPECT_LE(stats()[0].check_rel_rms, f32_tolerance(2e-5, 1e-2));
}

TEST_F(SingleOp, RefusedPlanFallsBack) {
  Config config = exact_config();
  config.workspace_cap = 1;
  configure(config);
  const AttentionGraph graph({});
  EXPECT_EQ(graph.compute(Backends(true).all()).values, graph.compute(Backends(false).all()).values);
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_PLAN_REFUSED], 1);
}

TEST_F(SingleOp, ObserverSeesWhatIsComputed) {
  struct Seen {
    int calls = 0;
    std::int32_t layer = -1;
    pbsattn_shape shape{};
    float first_query = 0;
  } seen;
  ggml_backend_pbsattn_set_observer(
      [](void* user, std::int32_t layer, const pbsattn_shape* shape, const pbsattn_view* q, const pbsattn_view*,
         const pbsattn_view*) {
        auto& record = *static_cast<Seen*>(user);
        ++record.calls;
        record.layer = layer;
        record.shape = *shape;
        record.first_query = *static_cast<const float*>(q->data);
      },
      &seen);
  AttentionGraph({.n_q = 520, .n_kv = 1024, .offset = 100}).compute(Backends(true).all());
  EXPECT_EQ(seen.calls, 1);
  EXPECT_EQ(seen.layer, 3);
  EXPECT_EQ(seen.shape.q_len, 520);
  EXPECT_EQ(seen.shape.kv_len, 620);
  EXPECT_EQ(seen.shape.q_heads, 4);
  EXPECT_EQ(seen.shape.kv_heads, 2);
  EXPECT_NE(seen.first_query, 0.0F);
  AttentionGraph({.sinks = 4}).compute(Backends(true).all());
  AttentionGraph({.soft_cap = 30.0F}).compute(Backends(true).all());
  AttentionGraph({.visible = sliding_window(100)}).compute(Backends(true).all());
  EXPECT_EQ(seen.calls, 1) << "it isn't told of sinks, soft-caps and windows";
}

TEST_F(SingleOp, WindowsLeaveNothingOfTheMethod) {
  const AttentionGraph graph({.n_q = 1024, .n_kv = 2048, .visible = sliding_window(300, 700), .offset = 700});
  const auto theirs = graph.compute(Backends(false).all());
  Config config = exact_config();
  std::vector<float> first;
  for (const char* method :
       {"full:precision=f32", "pbs:top_p=0.1:precision=f32", "two-step:precision=f32", "minference:precision=f32",
        "auto:permutation=learned:order_scope=kv_head:precision=f32"}) {
    ASSERT_EQ(pbsattn_method(method, &config.options), PBSATTN_OK) << method;
    configure(config);
    const auto ours = graph.compute(Backends(true).all());
    EXPECT_LE(relative_rms(ours.values, theirs.values), f32_tolerance(2e-5, 1e-2)) << method;
    if (first.empty()) first = ours.values;
    EXPECT_EQ(ours.values, first) << method;
  }
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_TAKEN], 5);
}

TEST_F(SingleOp, WindowsCountBlocksAsIfNoneWereLeftOut) {
  AttentionGraph({.n_q = 600, .n_kv = 1792, .visible = sliding_window(128, 1024), .offset = 1024})
      .compute(Backends(true).all());
  ASSERT_EQ(stats().size(), 1U);
  EXPECT_EQ(stats()[0].kv_len, 1624);
  EXPECT_EQ(stats()[0].causal_blocks, 4 * (9 + 10 + 11 + 12 + 13));
  EXPECT_EQ(stats()[0].visited_blocks, 4 * 5 * 2);
}

TEST_F(SingleOp, WindowsUnderABadBlockAreLeftToGgml) {
  configure(exact_config());
  ASSERT_TRUE(ggml_backend_pbsattn_set_layers(R"({"3": {"*": {"block": 0}}})"));
  const AttentionGraph graph({.visible = sliding_window(100)});
  EXPECT_EQ(graph.compute(Backends(true).all()).values, graph.compute(Backends(false).all()).values);
  EXPECT_EQ(stats()[0].reasons[GGML_PBSATTN_PLAN_REFUSED], 1);
  ASSERT_TRUE(ggml_backend_pbsattn_set_layers(nullptr));
}

TEST_F(SingleOp, AbortsBetweenOps) {
  Backends backends(true);
  backends.set_abort_callback([](void*) { return true; }, nullptr);
  EXPECT_EQ(AttentionGraph({}).compute(backends.all()).status, GGML_STATUS_ABORTED);
}

TEST_F(SingleOp, ConfigureRefusesAndKeepsWhatWas) {
  Config config = exact_config();
  config.options.top_p = 1.5F;
  EXPECT_FALSE(test::configure(config));
  EXPECT_NE(std::string(ggml_backend_pbsattn_last_error()).find("top_p 1.5"), std::string::npos);
  config = exact_config();
  config.min_tokens = 256;
  EXPECT_FALSE(test::configure(config));
  EXPECT_NE(std::string(ggml_backend_pbsattn_last_error()).find("min_tokens 256"), std::string::npos);
  pbsattn_options options{.struct_size = sizeof options};
  ggml_pbsattn_config kept{.struct_size = sizeof kept, .options = &options};
  EXPECT_TRUE(ggml_backend_pbsattn_get_config(&kept));
  EXPECT_EQ(options.top_p, 1.0F);
  EXPECT_EQ(kept.min_tokens, 512);
}

}  // namespace
}  // namespace pbsattn::ggml::test
