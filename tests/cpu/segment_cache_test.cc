// A SegmentCache changes no bit of any result: on every code path, in whatever way a sequence grows, is cut or changed
// behind it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>

#include "cpu/path.h"
#include "support/case.h"

namespace pbsattn::test {
namespace {

constexpr int segment = 64;

Options small(Options options) {
  options.block = 32;
  options.segment = segment;
  return options;
}

// A cache whose memory begins at an odd address and is followed by bytes that nobody may touch.
class Cached {
 public:
  explicit Cached(std::size_t size)
      : memory_(size + margin + 1, std::byte{0xA5}),
        cache(std::make_unique<SegmentCache>(std::span(memory_).subspan(1, size))) {}
  bool margin_intact() const {
    return std::ranges::all_of(std::span(memory_).last(margin), [](std::byte b) { return b == std::byte{0xA5}; });
  }

 private:
  static constexpr std::size_t margin = 64;
  std::vector<std::byte> memory_;

 public:
  std::unique_ptr<SegmentCache> cache;
};

std::vector<std::string> devices() {
  std::vector<std::string> paths = describe_cpu().paths;
  paths.emplace_back("reference");
  return paths;
}

class SegmentCaches : public testing::TestWithParam<std::string> {
 protected:
  SegmentCaches() {
    if (!reference()) forced_.emplace(GetParam());
  }
  bool reference() const { return GetParam() == "reference"; }
  Device device() const { return reference() ? Device::reference() : Device::cpu(2); }

  Cached cache_for(const Options& options, const Shape& shape, std::int64_t tokens) const {
    return Cached(Plan::create(options, shape, device()).cache_size(tokens));
  }

  // Returns whether a run with the cache gives what one without it does.
  testing::AssertionResult same(const Options& options, Problem& problem, const Cached& cached, std::int64_t valid,
                                std::size_t cap = Plan::no_cap) const {
    const RunResult alone = run(options, problem, {.device = device(), .cap = cap});
    const auto out = problem.out.bytes();
    const auto lse = problem.lse;
    const auto order = problem.order;
    forget_orders(problem);
    const Trace trace = run_cached(options, problem, cached, valid, cap);
    if (problem.out.bytes() != out || problem.lse != lse) return testing::AssertionFailure() << "other outputs";
    if (trace.order != alone.trace.order || problem.order != order) return testing::AssertionFailure() << "other order";
    if (trace.row_start != alone.trace.row_start || trace.block != alone.trace.block)
      return testing::AssertionFailure() << "other blocks";
    if (!cached.margin_intact()) return testing::AssertionFailure() << "bytes after the cache are written";
    return testing::AssertionSuccess();
  }

  Trace run_cached(const Options& options, Problem& problem, const Cached& cached, std::int64_t valid,
                   std::size_t cap = Plan::no_cap) const {
    const Plan plan = Plan::create(options, problem.shape, device(), cap);
    std::vector<std::byte> workspace(plan.workspace_size(), std::byte{0xFF});
    problem.out.fill(std::nan(""));
    std::ranges::fill(problem.lse, 0.0F);
    Outputs outputs = problem.outputs();
    outputs.cache = {cached.cache.get(), valid};
    Trace trace;
    plan.run(problem.inputs(), outputs, workspace, nullptr, &trace);
    return trace;
  }

  // Tokens that a run leaves in a cache: the segments before its last row's own.
  std::int64_t kept_of(const Options& options, const Shape& shape) const {
    const Geometry g = geometry_of(options, shape);
    return reference() || options.permutation == Permutation::last_queries ? 0 : g.own_begin(g.rows() - 1) * g.block;
  }

  // Grows a sequence in chunks that begin and end inside blocks and segments; the third completes none.
  void grow(const Options& options, const Problem& whole, std::size_t cap = Plan::no_cap) const {
    const Cached cached = cache_for(options, whole.shape, whole.shape.kv_len);
    const std::int64_t heads = whole.shape.batch * whole.shape.kv_heads;
    std::vector<std::int32_t> before;
    std::int64_t known = 0;
    std::int64_t begin = 0;
    for (const std::int64_t end : {std::int64_t{150}, std::int64_t{280}, std::int64_t{310}, whole.shape.kv_len}) {
      SCOPED_TRACE(end);
      const bool arrives = options.permutation == Permutation::arrival;
      Problem chunk = first_tokens(whole, end - begin, end, arrives ? segment : 0);
      const std::int64_t tokens = end / segment * segment;
      for (std::int64_t head = 0; head < heads; ++head)
        std::copy_n(before.begin() + head * known, known, chunk.order.begin() + head * tokens);
      chunk.known = known;
      EXPECT_TRUE(same(options, chunk, cached, begin, cap));
      EXPECT_EQ(cached.cache->tokens(), kept_of(options, chunk.shape));
      before = chunk.order;
      known = arrives ? tokens : 0;
      begin = end;
    }
  }

 private:
  static void forget_orders(Problem& problem) {
    const std::int64_t heads = problem.shape.batch * problem.shape.kv_heads;
    for (std::int64_t i = 0; i < std::ssize(problem.order); ++i)
      if (i % (std::ssize(problem.order) / heads) >= problem.known) problem.order[static_cast<std::size_t>(i)] = -1;
  }

  std::optional<ForcedPath> forced_;
};
INSTANTIATE_TEST_SUITE_P(Paths, SegmentCaches, testing::ValuesIn(devices()),
                         [](const auto& test) { return test.param; });

constexpr Shape grown{.batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 400, .kv_len = 400, .head_dim = 16};

// Every score, rule and permutation of the table.
TEST_P(SegmentCaches, GrowChunkByChunkUnderEveryMethod) {
  const Problem whole({.shape = grown, .sinks = true});
  for (const MethodInfo& method : methods()) {
    SCOPED_TRACE(method.name);
    Options options = small(method.options);
    options.fallback = Fallback::never;
    grow(options, whole);
    if (HasFailure()) return;
  }
}

TEST_P(SegmentCaches, KeepLearnedOrdersThoseOfArrivalAndMeansOfValues) {
  Problem whole({.shape = grown, .k = DType::f16, .v = DType::bf16, .order_weights = true});
  for (const Permutation permutation : {Permutation::learned, Permutation::arrival, Permutation::none})
    for (const BlockScore score : {BlockScore::mean_pool, BlockScore::mean_pool_causal, BlockScore::two_step})
      for (const Correction correction : {Correction::none, Correction::mean}) {
        SCOPED_TRACE(testing::Message() << "permutation " << static_cast<int>(permutation) << ", score "
                                        << static_cast<int>(score) << ", correction " << static_cast<int>(correction));
        Options options = small(method(score == BlockScore::two_step ? "two-step" : "pbs"));
        options.score = score;
        options.permutation = permutation;
        options.order_scope = OrderScope::kv_head;
        options.correction = correction;
        options.top_p = 0.5F;
        grow(options, whole);
        if (HasFailure()) return;
      }
}

TEST_P(SegmentCaches, ServeWindowsCappedLogitsWiderValuesAndPassesOfAHead) {
  Shape shape = grown;
  shape.head_dim_v = 40;
  const Problem whole({.shape = shape, .v = DType::f16});
  Options options = small(method("two-step"));
  options.softcap = 20;
  grow(options, whole);
  options.window = 100;
  grow(options, whole);
  options.softcap = 0;
  options.permutation = Permutation::learned;
  options.order_scope = OrderScope::kv_head;
  for (const std::int64_t hides_nothing : {0, 5}) {
    options.window = shape.kv_len + hides_nothing;
    grow(options, Problem({.shape = shape, .v = DType::f16, .order_weights = true}));
  }
  options = small(method("two-step"));
  options.softcap = 20;
  Shape head = shape;  // what the last chunk needs for one query head
  head.q_len = 90;
  head.batch = 1;
  const std::size_t whole_group = Plan::create(options, head, device()).workspace_size();
  head.kv_heads = 1;
  head.q_heads = 1;
  grow(options, whole, std::min(whole_group, 2 * Plan::create(options, head, device()).workspace_size()));
}

// What comes before the changed token is all that a caller knows to be the same.
TEST_P(SegmentCaches, KeysAndValuesChangePositionByPosition) {
  for (const Permutation permutation : {Permutation::none, Permutation::learned, Permutation::arrival}) {
    SCOPED_TRACE(static_cast<int>(permutation));
    Options options = small(method("two-step"));
    options.permutation = permutation;
    options.order_scope = OrderScope::kv_head;
    Problem problem({.shape = shape_of(40, 210, 8, 2, 1), .order_weights = true, .kept_segment = segment});
    const Cached cached = cache_for(options, problem.shape, 210);
    run_cached(options, problem, cached, 0);
    for (std::int64_t token = 0; token < 210; ++token) {
      problem.k.set(0, 0, token, token % 8, 3 + problem.k.get(0, 0, token, token % 8));
      problem.v.set(0, 0, token, token % 8, 5);
      problem.known = permutation == Permutation::arrival ? token / segment * segment : 0;
      ASSERT_TRUE(same(options, problem, cached, token)) << token;
    }
    if (reference()) continue;
    // A caller that says what isn't so gets what was: copies are read, not made again.
    ASSERT_EQ(cached.cache->tokens(), 192);
    problem.v.set(0, 0, 0, 0, 1000);
    problem.known = permutation == Permutation::arrival ? 192 : 0;
    EXPECT_FALSE(same(options, problem, cached, 210));
    problem.v.set(0, 0, 200, 0, 1000);
    cached.cache->clear();
    EXPECT_TRUE(same(options, problem, cached, 210));
  }
}

TEST_P(SegmentCaches, AreCutAndGrowAgain) {
  const Options options = small(method("two-step"));
  const Problem one({.shape = grown, .seed = 1});
  const Problem other({.shape = grown, .seed = 2});
  const Cached cached = cache_for(options, grown, 400);
  Problem problem = first_tokens(one, 400, 400);
  EXPECT_TRUE(same(options, problem, cached, 0));
  // Another end after the same 130 tokens, of which a run without a use for the cache sees 60 more.
  for (std::int64_t b = 0; b < grown.batch; ++b)
    for (std::int64_t h = 0; h < grown.kv_heads; ++h)
      for (std::int64_t t = 130; t < 400; ++t)
        for (std::int64_t d = 0; d < grown.head_dim; ++d) problem.k.set(b, h, t, d, other.k.get(b, h, t, d));
  const std::int64_t before = cached.cache->tokens();
  Problem part = first_tokens(problem, 60, 190);
  EXPECT_TRUE(same(small(method("pbs")), part, cached, 130));
  EXPECT_EQ(cached.cache->tokens(), std::min<std::int64_t>(before, 130));
  part = first_tokens(problem, 210, 400);
  EXPECT_TRUE(same(options, part, cached, 190));
  // And of the first sequence again.
  part = first_tokens(one, 50, 250);
  EXPECT_TRUE(same(options, part, cached, 130));
  // One that ends inside what is kept, its own segment among it.
  part = first_tokens(one, 30, 200);
  EXPECT_TRUE(same(options, part, cached, 200));
  EXPECT_EQ(cached.cache->tokens(), reference() ? 0 : 192);
}

TEST_P(SegmentCaches, OfAnotherPlanBeginAnew) {
  std::vector<Options> all(6, small(method("two-step")));
  all[1].segment = 96;
  all[2].block = 64;
  all[3].correction = Correction::mean;
  all[4].precision = Precision::f32;
  all[5] = small(method("xattention"));
  const Problem whole({.shape = grown, .k = DType::bf16});
  const Cached cached = cache_for(all[3], grown, 800);
  for (std::size_t i = 0; i < 2 * all.size(); ++i) {
    SCOPED_TRACE(i);
    Problem problem = first_tokens(whole, 100, 400);
    EXPECT_TRUE(same(all[i % all.size()], problem, cached, 400));
    EXPECT_TRUE(same(all[i % all.size()], problem, cached, 400));
  }
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f32}) {
    Problem problem({.shape = shape_of(100, 400, 16, 4, 2, 2), .q = DType::bf16, .k = dtype, .v = dtype});
    EXPECT_TRUE(same(all[0], problem, cached, 400)) << static_cast<int>(dtype);
  }
  for (const auto& [heads, batch] : {std::pair{4, 1}, {2, 2}, {1, 4}, {1, 2}}) {
    Problem problem({.shape = shape_of(100, 400, 16, 4, heads, batch)});
    EXPECT_TRUE(same(all[0], problem, cached, 400)) << heads;
  }
}

TEST_P(SegmentCaches, WithoutRoomServeForNothing) {
  const Options options = small(method("two-step"));
  Problem problem({.shape = grown});
  const Plan plan = Plan::create(options, grown, device());
  const std::size_t size = plan.cache_size(400);
  EXPECT_EQ(size == 0, reference());
  for (const std::size_t room : {std::size_t{0}, size / 2, size}) {
    const Cached cached(room);
    EXPECT_TRUE(same(options, problem, cached, 0)) << room;
    EXPECT_TRUE(same(options, problem, cached, 400)) << room;
    EXPECT_EQ(cached.cache->tokens(), room == size ? kept_of(options, grown) : 0) << room;
  }
  EXPECT_EQ(plan.cache_size(0), 0);
  EXPECT_EQ(Plan::create(small(method("pbs")), grown, device()).cache_size(400), 0) << "orders change with every call";
}

}  // namespace
}  // namespace pbsattn::test
