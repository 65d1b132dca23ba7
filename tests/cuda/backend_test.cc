// The CUDA backend against the reference: order, lists and output over shapes, layouts and options.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/device_run.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

template <class Change>
Options pbs_with(Change&& change) {
  Options options = pbs();
  change(options);
  return options;
}

std::vector<MethodCase> lengths_and_chunks() {
  std::vector<MethodCase> cases;
  for (const std::int64_t n : {1, 127, 128, 255, 257, 512, 1000}) {
    cases.push_back({"dense_n" + std::to_string(n), alike(shape_of(n, n)), method("full")});
    cases.push_back({"pbs_n" + std::to_string(n), alike(shape_of(n, n)), pbs()});
  }
  for (const std::int64_t q_len : {1, 31, 100, 129, 300})
    cases.push_back({"pbs_chunk" + std::to_string(q_len), alike(shape_of(q_len, 777)), pbs()});
  for (const cuda::Widths widths : cuda::widths)
    for (const std::int64_t n : {1, 129, 1000})
      for (const std::int64_t kv_len : {n, std::int64_t{1100}}) {
        const ProblemSpec problem = alike(with_widths(shape_of(n, kv_len), widths));
        const std::string name = name_of(widths) + "_n" + std::to_string(n) + "_of" + std::to_string(kv_len);
        cases.push_back({"dense_dim" + name, problem, method("full")});
        cases.push_back({"pbs_dim" + name, problem, pbs()});
      }
  return cases;
}

std::vector<MethodCase> heads() {
  std::vector<MethodCase> cases;
  for (const std::int64_t group : {1, 2, 3, 5, 8})
    cases.push_back({"group" + std::to_string(group), alike(shape_of(200, 600, 128, group, 1)), pbs()});
  cases.push_back({"three_kv_heads", alike(shape_of(300, 600, 64, 9, 3)), pbs()});
  cases.push_back({"batch_of_two", alike(shape_of(300, 600, 64, 4, 2, 2)), pbs()});
  // More than one unit of keys for the log-sum-exp of key scores, and a unit that ends early.
  cases.push_back({"many_units", alike(shape_of(70, 2700, 128)), pbs()});
  for (const cuda::Widths widths : cuda::widths) {
    const auto add = [&](const char* name, const Shape& shape, const Options& options) {
      cases.push_back({name + std::string("_dim") + name_of(widths), alike(with_widths(shape, widths)), options});
    };
    add("group3_batch2", shape_of(200, 600, 0, 6, 2, 2), pbs());
    add("many_units", shape_of(70, 2700), pbs());
    add("shared_order", shape_of(300, 1100, 0, 3, 1),
        pbs_with([](Options& o) { o.order_scope = OrderScope::kv_head; }));
    for (const int segment : {128, 384, 1024})
      add(("segment" + std::to_string(segment)).c_str(), shape_of(900, 1100, 0, 2, 1),
          pbs_with([&](Options& o) { o.segment = segment; }));
  }
  return cases;
}

std::vector<MethodCase> dtypes_and_layouts() {
  std::vector<MethodCase> cases;
  for (const cuda::Widths widths : cuda::widths) {
    const Shape shape = with_widths(shape_of(700, 700), widths);
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      cases.push_back({type + std::string("_dim") + name_of(widths), alike(shape, dtype), pbs()});
    for (const auto& [layout, of] : {std::pair{"bshd", TensorLayout::bshd}, {"cache", TensorLayout::cache}})
      cases.push_back({layout + std::string("_dim") + name_of(widths),
                       alike(with_widths(shape_of(300, 600, 0, 4, 2, 2), widths), DType::bf16, of), pbs()});
  }
  cases.push_back({"bshd", alike(shape_of(300, 600, 64, 4, 2, 2), DType::bf16, TensorLayout::bshd), pbs()});
  cases.push_back({"cache", alike(shape_of(300, 600, 128, 4, 2, 2), DType::bf16, TensorLayout::cache), pbs()});
  return cases;
}

std::vector<MethodCase> options() {
  const ProblemSpec problem = alike(shape_of(900, 1100, 64));
  std::vector<MethodCase> cases;
  for (const int segment : {128, 256, 384, 512, 1024})
    cases.push_back({"segment" + std::to_string(segment), problem, pbs_with([&](Options& o) { o.segment = segment; })});
  cases.push_back({"shared_order", alike(shape_of(300, 1100, 64, 6, 2)),
                   pbs_with([](Options& o) { o.order_scope = OrderScope::kv_head; })});
  cases.push_back({"shared_order_long_segment", alike(shape_of(300, 1100, 64, 3, 1)), pbs_with([](Options& o) {
                     o.order_scope = OrderScope::kv_head;
                     o.segment = 512;
                   })});
  cases.push_back({"unpermuted", problem, method("pbs-unpermuted")});
  cases.push_back({"paper_rules", problem, pbs_with([](Options& o) { o.rules = Rules::paper; })});
  cases.push_back({"dense_last_rows", problem, pbs_with([](Options& o) { o.dense_last_rows = 2; })});
  cases.push_back({"all_rows_dense", problem, pbs_with([](Options& o) {
                     o.permutation = Permutation::none;
                     o.dense_last_rows = 100;
                   })});
  cases.push_back({"scaled", problem, pbs_with([](Options& o) { o.scale = 0.3F; })});
  const auto per_query = [](Options& o) { o.score = BlockScore::per_query; };
  const auto threshold = [](float value, float floor, BlockScore score) {
    return pbs_with([=](Options& o) {
      o.score = score;
      o.keep = KeepRule::threshold;
      o.threshold = value;
      o.floor_top_p = floor;
    });
  };
  cases.push_back({"per_query", problem, pbs_with(per_query)});
  cases.push_back({"per_query_paper", problem, pbs_with([](Options& o) {
                     o.score = BlockScore::per_query;
                     o.rules = Rules::paper;
                   })});
  cases.push_back({"per_query_unpermuted", problem, pbs_with([](Options& o) {
                     o.score = BlockScore::per_query;
                     o.permutation = Permutation::none;
                   })});
  cases.push_back({"per_query_shared_order", alike(shape_of(300, 1100, 64, 6, 2, 2)), pbs_with([](Options& o) {
                     o.score = BlockScore::per_query;
                     o.order_scope = OrderScope::kv_head;
                   })});
  for (const int segment : {128, 384, 1024})
    cases.push_back({"per_query_segment" + std::to_string(segment), problem, pbs_with([&](Options& o) {
                       o.score = BlockScore::per_query;
                       o.segment = segment;
                     })});
  for (const cuda::Widths widths : cuda::widths)
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      cases.push_back({type + std::string("_per_query_dim") + name_of(widths),
                       alike(with_widths(shape_of(700, 730), widths), dtype), pbs_with(per_query)});
  // More than one tile of 128 pooled keys, and the last one short of its second half.
  for (const cuda::Widths widths : cuda::widths)
    cases.push_back({"per_query_two_tiles_dim" + name_of(widths),
                     alike(with_widths(shape_of(140, 21'000, 0, 1), widths)), pbs_with(per_query)});
  cases.push_back({"threshold", problem, threshold(0.1F, 0, BlockScore::mean_pool)});
  cases.push_back({"threshold_floor", problem, threshold(0.4F, 0.6F, BlockScore::mean_pool)});
  cases.push_back({"threshold_per_query", problem, threshold(0.1F, 0, BlockScore::per_query)});
  cases.push_back({"threshold_per_query_floor", problem, threshold(0.4F, 0.6F, BlockScore::per_query)});
  // Under the threshold for all rows, for some, and for none.
  for (const int tokens : {16, 64, 512})
    cases.push_back({"threshold_tokens" + std::to_string(tokens), problem, [&] {
                       Options options = threshold(0.12F, 0, BlockScore::per_query);
                       options.threshold_tokens = static_cast<float>(tokens);
                       return options;
                     }()});
  cases.push_back({"pbs_threshold", problem, method("pbs-threshold")});
  for (const auto score : {BlockScore::mean_pool, BlockScore::per_query}) {
    const auto with_rule = [&](KeepRule keep) {
      return pbs_with([&](Options& o) {
        o.score = score;
        o.keep = keep;
        o.threshold = 0.6F;
        o.top_k = 3;
        o.density = 0.5F;
      });
    };
    const std::string name = score == BlockScore::mean_pool ? "mean_pool_" : "per_query_";
    cases.push_back({name + "relative", problem, with_rule(KeepRule::relative)});
    cases.push_back({name + "top_k", problem, with_rule(KeepRule::top_k)});
    cases.push_back({name + "density", problem, with_rule(KeepRule::density)});
  }
  cases.push_back({"sink_and_local", problem, pbs_with([](Options& o) {
                     o.top_p = 0.3F;
                     o.sink_blocks = 2;
                     o.local_blocks = 3;
                   })});
  for (const float top_p : {0.01F, 0.5F, 0.9F, 0.99F, 0.999999F})
    cases.push_back({"top_p_" + std::to_string(static_cast<int>(top_p * 1e6F)), problem, pbs(top_p)});
  return cases;
}

// Scores that have launches of their own.
std::vector<MethodCase> masses() {
  std::vector<MethodCase> cases;
  for (const auto& [name, score] : {std::pair{"antidiagonal", BlockScore::antidiagonal},
                                    {"antidiagonal_causal", BlockScore::antidiagonal_causal},
                                    {"exact", BlockScore::exact},
                                    {"sampled", BlockScore::sampled},
                                    {"mean_pool_causal", BlockScore::mean_pool_causal},
                                    {"energy", BlockScore::energy},
                                    {"dual_band", BlockScore::dual_band}}) {
    const auto add = [&](const std::string& what, const ProblemSpec& problem, auto&& change) {
      cases.push_back({name + std::string("_") + what, problem, pbs_with([&](Options& o) {
                         o.score = score;
                         change(o);
                       })});
    };
    const ProblemSpec problem = alike(shape_of(900, 1100, 64));
    const auto nothing = [](Options&) {};
    for (const cuda::Widths widths : cuda::widths)
      for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
        add(type + std::string("_dim") + name_of(widths), alike(with_widths(shape_of(700, 730), widths), dtype),
            nothing);
    // Neither begins nor ends with a whole patch of 8, nor with a whole block.
    add("chunk", alike(shape_of(301, 1111, 64)), nothing);
    add("one_query", alike(shape_of(1, 777, 64)), nothing);
    add("heads", alike(shape_of(300, 600, 128, 6, 2, 2), DType::bf16, TensorLayout::bshd), nothing);
    // More than one thread block's share of keys or tile of their means, and more than one tile of queries.
    const bool of_means = score >= BlockScore::mean_pool_causal && score != BlockScore::sampled;
    for (const cuda::Widths widths : cuda::widths) {
      add("many_keys_dim" + name_of(widths), alike(with_widths(shape_of(130, of_means ? 21'000 : 9000, 0, 1), widths)),
          nothing);
      add("many_queries_dim" + name_of(widths), alike(with_widths(shape_of(2200, 2300, 0, 1), widths)), nothing);
    }
    add("shared_order", alike(shape_of(300, 1100, 64, 6, 2, 2)),
        [](Options& o) { o.order_scope = OrderScope::kv_head; });
    add("unpermuted", problem, [](Options& o) { o.permutation = Permutation::none; });
    for (const int segment : {128, 384, 1024})
      add("segment" + std::to_string(segment), problem, [=](Options& o) { o.segment = segment; });
    add("paper", problem, [](Options& o) { o.rules = Rules::paper; });
    add("scaled", problem, [](Options& o) { o.scale = 0.4F; });
    add("dense_last_rows", problem, [](Options& o) { o.dense_last_rows = 2; });
    for (const float top_p : {0.01F, 0.5F, 0.99F, 0.999999F})
      add("top_p_" + std::to_string(static_cast<int>(top_p * 1e6F)), problem, [=](Options& o) { o.top_p = top_p; });
    for (const auto& [rule, keep] : {std::pair{"threshold", KeepRule::threshold},
                                     {"relative", KeepRule::relative},
                                     {"top_k", KeepRule::top_k},
                                     {"density", KeepRule::density}})
      add(rule, problem, [keep](Options& o) {
        o.keep = keep;
        o.threshold = keep == KeepRule::relative ? 0.6F : 0.1F;
        o.floor_top_p = 0.5F;
        o.top_k = 3;
        o.density = 0.5F;
      });
  }
  for (const char* name : {"pbs+", "xattention", "oracle", "pbs-sampled", "mean-pool", "prism", "streaming"}) {
    std::string label(name);
    std::ranges::replace_if(
        label, [](char c) { return c == '-' || c == '+'; }, '_');
    cases.push_back({label, alike(shape_of(900, 1100, 64)), method(name)});
  }
  return cases;
}

// Means for all blocks, then keys of likely ones.
std::vector<MethodCase> two_step() {
  std::vector<MethodCase> cases;
  const auto add = [&](const std::string& what, const ProblemSpec& problem, auto&& change) {
    Options options = method("pbs-two-step");
    options.threshold = 0.12F;
    options.threshold_tokens = 0;
    options.dense_last_rows = 0;
    change(options);
    cases.push_back({what, problem, options});
  };
  const ProblemSpec problem = alike(shape_of(900, 1100, 64));
  const auto nothing = [](Options&) {};
  for (const cuda::Widths widths : cuda::widths)
    for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
      add(type + std::string("_dim") + name_of(widths), alike(with_widths(shape_of(700, 730), widths), dtype), nothing);
  add("chunk", alike(shape_of(301, 1111, 64)), nothing);
  add("one_query", alike(shape_of(1, 777, 64)), nothing);
  add("heads", alike(shape_of(300, 600, 128, 6, 2, 2), DType::bf16, TensorLayout::bshd), nothing);
  // More than one part and more than one tile of means; more than one item of rows.
  for (const cuda::Widths widths : cuda::widths) {
    add("many_keys_dim" + name_of(widths), alike(with_widths(shape_of(130, 21'000, 0, 1), widths)),
        [](Options& o) { o.threshold = 0.01F; });
    add("many_queries_dim" + name_of(widths), alike(with_widths(shape_of(4300, 4400, 0, 1), widths)),
        [](Options& o) { o.threshold = 0.05F; });
  }
  add("shared_order", alike(shape_of(300, 1100, 64, 6, 2, 2)), [](Options& o) { o.order_scope = OrderScope::kv_head; });
  add("shared_order_many_queries", alike(shape_of(2200, 2300, 64, 5, 1)), [](Options& o) {
    o.order_scope = OrderScope::kv_head;
    o.threshold = 0.08F;
  });
  add("unpermuted", alike(shape_of(900, 1100, 64, 6, 2, 2)), [](Options& o) { o.permutation = Permutation::none; });
  for (const int segment : {128, 384, 1024})
    add("segment" + std::to_string(segment), problem, [=](Options& o) { o.segment = segment; });
  // A row's lines fill a warp or less, a warpgroup, and two; some are of no use.
  for (const int queries : {1, 3, 16, 20, 64, 100, 128, 1000})
    add("queries" + std::to_string(queries), problem, [=](Options& o) { o.two_step_queries = queries; });
  for (const int exact : {1, 3, 4, 16, 33, 64, 100, 128, 1000})
    add("exact" + std::to_string(exact), alike(shape_of(900, 1100, 64, 3, 1)), [=](Options& o) {
      o.two_step_exact = exact;
      o.order_scope = exact % 2 == 0 ? OrderScope::kv_head : OrderScope::query_head;
    });
  for (const int reach : {1, 2, 1000})
    add("reach" + std::to_string(reach), problem, [=](Options& o) { o.two_step_reach = reach; });
  for (const float threshold : {0.01F, 0.3F, 1.0F})
    add("threshold_" + std::to_string(static_cast<int>(threshold * 100)), problem,
        [=](Options& o) { o.threshold = threshold; });
  add("tokens", problem, [](Options& o) { o.threshold_tokens = 80; });
  add("floor", problem, [](Options& o) {
    o.threshold = 0.4F;
    o.floor_top_p = 0.5F;
  });
  add("paper", problem, [](Options& o) { o.rules = Rules::paper; });
  add("scaled", problem, [](Options& o) { o.scale = 0.4F; });
  add("dense_last_rows", problem, [](Options& o) { o.dense_last_rows = 2; });
  add("corrected", problem, [](Options& o) { o.correction = Correction::mean; });
  cases.push_back({"two_step", alike(shape_of(2000, 2100, 64)), method("two-step")});
  cases.push_back({"pbs_two_step", alike(shape_of(2000, 2100, 64)), method("pbs-two-step")});
  return cases;
}

// Blocks that a row doesn't attend to answer as their means.
std::vector<MethodCase> corrections() {
  const Options flashprefill = [] {
    Options options = method("flashprefill");
    options.threshold = 0.5F;
    options.dense_last_rows = 1;
    options.sink_blocks = 1;
    options.local_blocks = 2;
    return options;
  }();
  const auto corrected = [](Options options) {
    options.correction = Correction::mean;
    return options;
  };
  const ProblemSpec problem = alike(shape_of(900, 1100, 64));
  std::vector<MethodCase> cases{
      {"flashprefill", alike(shape_of(900, 1100, 128)), flashprefill},
      {"flashprefill_chunk", alike(shape_of(301, 1111, 64)), flashprefill},
      {"flashprefill_one_query", alike(shape_of(1, 777, 64)), flashprefill},
      {"flashprefill_short", alike(shape_of(100, 100, 64)), flashprefill},
      {"flashprefill_heads", alike(shape_of(300, 600, 128, 6, 2, 2), DType::bf16, TensorLayout::bshd), flashprefill},
      {"corrected_permuted", problem, corrected(pbs(0.5F))},
      {"corrected_shared_order", alike(shape_of(300, 1100, 64, 6, 2, 2)), corrected(pbs_with([](Options& o) {
         o.order_scope = OrderScope::kv_head;
         o.top_p = 0.4F;
       }))},
      {"corrected_segment384", problem, corrected(pbs_with([](Options& o) { o.segment = 384; }))},
      {"corrected_unscored", alike(shape_of(130, 20'000, 64, 1)), corrected(method("streaming"))},
      {"corrected_vertical_slash", problem, corrected([] {
         Options options = method("minference");
         options.vertical = 10;
         options.slash = 110;
         return options;
       }())},
      {"corrected_per_query", problem, corrected(pbs_with([](Options& o) { o.score = BlockScore::per_query; }))},
  };
  for (const cuda::Widths widths : cuda::widths) {
    const std::string name = name_of(widths);
    // More than one tile of means, and tiles whose blocks are all listed.
    cases.push_back(
        {"flashprefill_many_keys_dim" + name, alike(with_widths(shape_of(130, 40'000, 0, 1), widths)), flashprefill});
    cases.push_back({"corrected_permuted_dim" + name, alike(with_widths(shape_of(300, 1100, 0, 3, 1), widths)),
                     corrected(pbs(0.5F))});
    cases.push_back(
        {"corrected_f16_dim" + name, alike(with_widths(shape_of(700, 730), widths), DType::f16), flashprefill});
  }
  return cases;
}

class CudaBackend : public testing::TestWithParam<MethodCase> {};

TEST_P(CudaBackend, AgreesWithTheReference) {
  Problem problem(GetParam().problem);
  const RunResult result = run_on_device(GetParam().options, problem);
  expect_right(problem, result, GetParam().problem.q);
}

const auto name_of = [](const auto& test) { return test.param.name; };
INSTANTIATE_TEST_SUITE_P(Lengths, CudaBackend, testing::ValuesIn(lengths_and_chunks()), name_of);
INSTANTIATE_TEST_SUITE_P(Heads, CudaBackend, testing::ValuesIn(heads()), name_of);
INSTANTIATE_TEST_SUITE_P(Layouts, CudaBackend, testing::ValuesIn(dtypes_and_layouts()), name_of);
INSTANTIATE_TEST_SUITE_P(Options, CudaBackend, testing::ValuesIn(options()), name_of);
INSTANTIATE_TEST_SUITE_P(Masses, CudaBackend, testing::ValuesIn(masses()), name_of);
INSTANTIATE_TEST_SUITE_P(TwoStep, CudaBackend, testing::ValuesIn(two_step()), name_of);
INSTANTIATE_TEST_SUITE_P(Corrections, CudaBackend, testing::ValuesIn(corrections()), name_of);

}  // namespace
}  // namespace pbsattn::test
