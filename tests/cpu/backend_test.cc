// The CPU backend against the reference, on every path and over everything that Options and Shape allow.
#include <gtest/gtest.h>

#include <algorithm>

#include "cpu/path.h"
#include "pbsattn/options.hpp"
#include "support/case.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

ProblemSpec of_dtypes(const Shape& s, DType q, DType k, DType v, DType out) {
  return {.shape = s, .q = q, .k = k, .v = v, .out = out};
}

std::vector<MethodCase> lengths_and_chunks() {
  std::vector<MethodCase> cases;
  for (const std::int64_t n : {1, 2, 127, 128, 129, 255, 256, 257, 511, 1000}) {
    cases.push_back({"dense_n" + std::to_string(n), {.shape = shape_of(n, n)}, method("full")});
    cases.push_back({"pbs_n" + std::to_string(n), {.shape = shape_of(n, n)}, pbs()});
  }
  for (const std::int64_t q_len : {1, 3, 31, 100, 129, 300}) {
    cases.push_back({"dense_chunk" + std::to_string(q_len), {.shape = shape_of(q_len, 777)}, method("full")});
    cases.push_back({"pbs_chunk" + std::to_string(q_len), {.shape = shape_of(q_len, 777)}, pbs()});
  }
  return cases;
}

std::vector<MethodCase> heads() {
  std::vector<MethodCase> cases;
  for (const std::int64_t dim : {8, 24, 64, 80, 128, 256}) {
    const auto name = "dim" + std::to_string(dim);
    cases.push_back({"f32_" + name, {.shape = shape_of(600, 600, dim, 1)}, pbs()});
    cases.push_back({"bf16_" + name, alike(shape_of(450, 450, dim, 1)), pbs()});
  }
  for (const auto& [dim, dim_v] : {std::pair{192, 128}, {64, 8}, {24, 80}, {96, 72}, {40, 256}}) {
    const auto name = "dim" + std::to_string(dim) + "_of_values" + std::to_string(dim_v);
    Options corrected = pbs(0.5F);
    corrected.correction = Correction::mean;
    const Shape shape{.q_heads = 2, .q_len = 450, .kv_len = 500, .head_dim = dim, .head_dim_v = dim_v};
    cases.push_back({"f32_" + name, {.shape = shape}, pbs()});
    cases.push_back({"bf16_" + name, alike(shape), pbs()});
    cases.push_back({"corrected_" + name, alike(shape), corrected});
  }
  for (const std::int64_t group : {3, 5, 7, 8})
    cases.push_back({"group" + std::to_string(group), {.shape = shape_of(300, 300, 64, group, 1)}, pbs()});
  cases.push_back({"three_kv_heads", {.shape = shape_of(520, 520, 64, 9, 3)}, pbs()});
  cases.push_back({"batch_of_two", {.shape = shape_of(300, 400, 64, 4, 2, 2)}, pbs()});
  return cases;
}

std::vector<MethodCase> dtypes_and_layouts() {
  const Shape s = shape_of(400, 520, 64, 4, 2);
  const Shape two = shape_of(300, 300, 64, 4, 2, 2);
  std::vector<MethodCase> cases{
      {"f16", alike(s, DType::f16), pbs()},
      {"bf16", alike(s), pbs()},
      {"bf16_in_f32_out", of_dtypes(s, DType::bf16, DType::bf16, DType::bf16, DType::f32), pbs()},
      {"f32_query_f16_cache", of_dtypes(s, DType::f32, DType::f16, DType::f16, DType::f32), pbs()},
      {"all_different", of_dtypes(s, DType::bf16, DType::f32, DType::f16, DType::bf16), pbs()},
  };
  for (const auto& [name, layout] :
       {std::pair{"bshd", TensorLayout::bshd}, {"padded", TensorLayout::padded}, {"cache", TensorLayout::cache}})
    for (const auto& [type, dtype] : {std::pair{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}})
      cases.push_back({std::string(name) + "_" + type, alike(two, dtype, layout), pbs()});
  return cases;
}

using Settings = std::initializer_list<std::pair<std::string_view, std::string_view>>;

Options with(Settings settings, Options base = pbs()) {
  for (const auto& [name, value] : settings) set_option(base, name, value);
  return base;
}

std::vector<MethodCase> options() {
  const Shape s = shape_of(700, 700);
  const Shape chunk = shape_of(333, 777);
  const Shape grouped = shape_of(600, 600, 64, 6, 2);
  const Settings per_query{{"score", "per_query"}};
  const Settings shared_per_query{{"score", "per_query"}, {"order_scope", "kv_head"}};
  return {
      {"top_p_03", {.shape = s}, with({{"top_p", "0.3"}})},
      {"top_p_099", {.shape = s}, with({{"top_p", "0.99"}})},
      {"top_p_1", {.shape = s}, with({{"top_p", "1"}})},
      {"unpermuted", {.shape = s}, with({{"permutation", "none"}})},
      {"permuted_dense", {.shape = s}, with({{"keep", "all"}, {"score", "none"}})},
      {"shared_order", {.shape = grouped}, with({{"order_scope", "kv_head"}})},
      {"paper_rules", {.shape = s}, with({{"rules", "paper"}})},
      {"paper_rules_chunk", {.shape = chunk}, with({{"rules", "paper"}})},
      {"dense_last_row", {.shape = s}, with({{"dense_last_rows", "1"}})},
      {"dense_last_rows", {.shape = s}, with({{"dense_last_rows", "100"}})},
      {"scale", {.shape = s}, with({{"scale", "0.05"}})},
      {"block32_segment64", {.shape = shape_of(500, 500)}, with({{"block", "32"}, {"segment", "64"}})},
      {"block64_segment256", {.shape = s}, with({{"block", "64"}, {"segment", "256"}})},
      {"block96_segment192", {.shape = s}, with({{"block", "96"}, {"segment", "192"}})},
      {"block128_segment128", {.shape = s}, with({{"block", "128"}, {"segment", "128"}})},
      {"block128_segment384", {.shape = s}, with({{"block", "128"}, {"segment", "384"}})},
      {"block256_segment256", {.shape = s}, with({{"block", "256"}, {"segment", "256"}})},
      {"per_query", {.shape = s}, with(per_query)},
      {"per_query_chunk", {.shape = chunk}, with(per_query)},
      {"per_query_bf16", alike(grouped), with(shared_per_query)},
      {"threshold", {.shape = s}, with({{"keep", "threshold"}, {"threshold", "0.15"}})},
      {"threshold_0", {.shape = s}, with({{"keep", "threshold"}, {"threshold", "0"}})},
      {"threshold_floor", {.shape = s}, with({{"keep", "threshold"}, {"threshold", "0.4"}, {"floor_top_p", "0.6"}})},
      {"relative", {.shape = s}, with({{"keep", "relative"}, {"threshold", "0.6"}})},
      {"top_k", {.shape = s}, with({{"keep", "top_k"}, {"top_k", "2"}})},
      {"density", {.shape = s}, with({{"keep", "density"}, {"density", "0.5"}})},
      {"sink_and_local", {.shape = s}, with({{"top_p", "0.3"}, {"sink_blocks", "2"}, {"local_blocks", "3"}})},
      {"threshold_tokens",
       {.shape = s},
       with({{"score", "per_query"}, {"keep", "threshold"}, {"threshold", "0.3"}, {"threshold_tokens", "64"}})},
      {"pbs_threshold", {.shape = s}, with({{"threshold", "0.15"}}, method("pbs-threshold"))},
  };
}

// Lists every score on whole calls, on chunks that begin and end inside a block, and on permuted keys of grouped heads.
std::vector<MethodCase> scores() {
  std::vector<MethodCase> cases;
  for (const BlockScore score :
       {BlockScore::antidiagonal, BlockScore::antidiagonal_causal, BlockScore::exact, BlockScore::mean_pool_causal,
        BlockScore::sampled, BlockScore::energy, BlockScore::dual_band}) {
    Options options = pbs(0.7F);
    options.score = score;
    const std::string name(name_of(score));
    cases.push_back({name, {.shape = shape_of(600, 600, 64, 4, 2)}, options});
    options.permutation = Permutation::none;
    options.segment = 128;
    cases.push_back({name + "_chunk", {.shape = shape_of(333, 777)}, options});
    options.keep = KeepRule::density;
    options.density = 0.6F;
    options.rules = Rules::paper;
    cases.push_back({name + "_bf16", alike(shape_of(520, 520, 64, 2)), options});
    options.block = options.segment = 32;
    options.keep = KeepRule::relative;
    options.threshold = 0.5F;
    cases.push_back({name + "_block32", {.shape = shape_of(300, 300)}, options});
  }
  return cases;
}

// Lists orders that are learned, and orders that segments keep.
std::vector<MethodCase> orders() {
  std::vector<MethodCase> cases;
  Options options = method("pbs-two-step");
  options.order_scope = OrderScope::kv_head;
  options.threshold = 0.1F;
  const auto add = [&](const std::string& name, const ProblemSpec& problem) {
    cases.push_back({name, problem, options});
  };
  options.permutation = Permutation::learned;
  for (const auto& [name, pairs] : {std::pair{"halves", RopePairs::halves}, {"neighbours", RopePairs::neighbours}})
    for (const auto& [type, dtype] : {std::pair{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}})
      for (const std::int64_t dim : {24, 64, 128}) {
        ProblemSpec problem = alike(shape_of(333, 600, dim, 4, 2, 2), dtype);
        problem.order_weights = true;
        problem.pairs = pairs;
        add(std::string("learned_") + name + "_" + type + "_dim" + std::to_string(dim), problem);
      }
  options.permutation = Permutation::arrival;
  for (const std::int64_t known : {0, 256, 512}) {
    ProblemSpec problem = alike(shape_of(300, 777, 64, 6, 2));
    problem.kept_segment = 256;
    problem.known = known;
    add("arrival_known" + std::to_string(known), problem);
  }
  add("arrival_alone", {.shape = shape_of(600, 600, 64, 4, 2)});
  add("arrival_short", {.shape = shape_of(100, 100)});
  return cases;
}

std::vector<MethodCase> named_methods() {
  std::vector<MethodCase> cases;
  for (const char* name : {"pbs+", "xattention", "mean-pool", "flashprefill", "prism", "minference", "flexprefill",
                           "streaming", "oracle", "pbs-sampled", "pbs-two-step", "two-step"}) {
    Options options = method(name);
    options.dense_last_rows = std::min(options.dense_last_rows, 1);
    options.sink_blocks = std::min(options.sink_blocks, 1);
    options.local_blocks = std::min(options.local_blocks, 2);
    options.vertical = 40;
    options.slash = 120;
    options.min_budget = 1;
    if (options.score == BlockScore::two_step) options.threshold = 0.15F;
    std::string label(name);
    std::ranges::replace_if(
        label, [](char c) { return c == '-' || c == '+'; }, '_');
    cases.push_back({"method_" + label, {.shape = shape_of(700, 700, 64, 1)}, options});
    cases.push_back({"method_" + label + "_chunk", {.shape = shape_of(200, 650)}, options});
    cases.push_back({"method_" + label + "_short", {.shape = shape_of(100, 100)}, options});
  }
  Options two_step = method("pbs-two-step");
  two_step.threshold = 0.1F;
  two_step.two_step_queries = 50;  // more than a strip, as of exact ones
  two_step.two_step_exact = 40;
  two_step.order_scope = OrderScope::kv_head;
  cases.push_back({"two_step_many_queries", {.shape = shape_of(600, 700, 64, 4, 2)}, two_step});
  two_step.two_step_queries = two_step.two_step_exact = 1;
  two_step.segment = 512;
  two_step.threshold_tokens = 40;
  two_step.dense_last_rows = 0;
  cases.push_back({"two_step_one_query_bf16", alike(shape_of(900, 1400, 128, 2, 1)), two_step});
  two_step.floor_top_p = 0.3F;
  two_step.block = 32;
  two_step.segment = 64;
  cases.push_back({"two_step_floor", {.shape = shape_of(333, 500)}, two_step});
  Options pooled = method("flexprefill");
  pooled.tau = 1;
  pooled.min_budget = 1;
  cases.push_back({"flexprefill_by_pooling", {.shape = shape_of(700, 700)}, pooled});
  for (const bool permuted : {false, true}) {
    Options corrected = permuted ? pbs(0.5F) : method("flashprefill");
    corrected.correction = Correction::mean;
    corrected.dense_last_rows = 0;
    const std::string name = std::string("corrected") + (permuted ? "_permuted" : "");
    cases.push_back({name, {.shape = shape_of(600, 600)}, corrected});
    cases.push_back({name + "_bf16", alike(shape_of(300, 777)), corrected});
  }
  return cases;
}

// Lists what layers of models carry: on chunks and whole calls, on dense rows and sparse ones.
std::vector<MethodCase> layers() {
  const auto with_sinks = [](ProblemSpec spec) {
    spec.sinks = true;
    return spec;
  };
  std::vector<MethodCase> cases;
  for (const char* name : {"full", "pbs", "flashprefill"}) {
    Options options = method(name);
    options.top_p = 0.7F;
    options.dense_last_rows = options.sink_blocks = options.local_blocks = 0;
    const std::string label(name);
    Options capped = options;
    capped.softcap = 3;
    cases.push_back({"softcap_" + label, {.shape = shape_of(600, 600, 64, 4, 2, 2)}, capped});
    cases.push_back({"softcap_" + label + "_chunk_bf16", {with_sinks(alike(shape_of(333, 777, 64, 4, 2)))}, capped});
    cases.push_back({"sinks_" + label, {with_sinks({.shape = shape_of(600, 600, 64, 4, 2, 2)})}, options});
    cases.push_back({"sinks_" + label + "_chunk_bf16", {with_sinks(alike(shape_of(333, 777, 64, 4, 2)))}, options});
  }
  // Less than a strip, than a block, than a segment, and blocks and segments across which it slides.
  for (const int window : {1, 20, 64, 127, 128, 129, 200, 256, 400, 599, 600})
    for (const bool chunk : {false, true}) {
      Options options = method(chunk ? "flashprefill" : "pbs");
      options.window = window;
      options.softcap = window == 200 ? 3.0F : 0.0F;
      const auto label = std::to_string(window) + (chunk ? "_chunk_bf16" : "");
      const Shape shape = chunk ? shape_of(133, 600, 40, 4, 2, 2) : shape_of(600, 600, 24, 4, 2);
      cases.push_back({"window" + label, {with_sinks(chunk ? alike(shape) : ProblemSpec{.shape = shape})}, options});
    }
  return cases;
}

std::vector<MethodCase> joined(std::vector<MethodCase> a, const std::vector<MethodCase>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Lists the paths that plans choose on this machine.
std::vector<std::string> chosen_paths() {
  const DeviceInfo device = describe_cpu();
  if (device.f32_path == device.bf16_path) return {device.f32_path};
  return {device.f32_path, device.bf16_path};
}

// Tells whether AMX can do a plan: not with a correction, capped logits or a window, nor values whose packed rows
// aren't as long as the keys'.
bool amx_takes(const MethodCase& c) {
  const auto packed = [](std::int64_t dim) { return (dim + 31) / 32; };
  return c.options.correction == Correction::none && c.options.softcap == 0 &&
         c.options.window >= c.problem.shape.kv_len &&
         packed(c.problem.shape.head_dim) == packed(value_dim(c.problem.shape));
}

class Backend : public testing::TestWithParam<std::tuple<std::string, MethodCase>> {};

TEST_P(Backend, AgreesWithTheReference) {
  const auto& [path, c] = GetParam();
  const ForcedPath forced(path);
  Problem problem(c.problem);
  const RunResult result = run(c.options, problem);
  if (path == "amx_bf16" && !amx_takes(c))
    EXPECT_NE(result.path, path);
  else
    EXPECT_EQ(result.path, path);
  expect_right(problem, result, products_of(result.path));
}

std::string test_name(const testing::TestParamInfo<std::tuple<std::string, MethodCase>>& test) {
  return std::get<0>(test.param) + "_" + std::get<1>(test.param).name;
}

// What a path's own code decides: register tiles, conversions, tails.
INSTANTIATE_TEST_SUITE_P(AllPaths, Backend,
                         testing::Combine(testing::ValuesIn(describe_cpu().paths),
                                          testing::ValuesIn(joined(joined(heads(), dtypes_and_layouts()), layers()))),
                         test_name);
// What code shared by all paths decides.
INSTANTIATE_TEST_SUITE_P(ChosenPaths, Backend,
                         testing::Combine(testing::ValuesIn(chosen_paths()),
                                          testing::ValuesIn(joined(joined(lengths_and_chunks(), options()),
                                                                   joined(joined(scores(), orders()),
                                                                          named_methods())))),
                         test_name);

TEST(Backend, SparseCasesAreSparse) {
  Problem problem({.shape = shape_of(1000, 1000)});
  const double density = run(pbs(), problem).stats.density();
  EXPECT_LT(density, 0.9);
  EXPECT_GT(density, 0.3);
}

}  // namespace
}  // namespace pbsattn::test
