// Throws calls at planning and running. Through the C interface, whatever a plan accepts it must run within the buffers
// that its shape and strides describe, which lie here between AddressSanitizer's red zones, and whatever overlaps is
// refused or right. Small calls must agree with the reference: the same order and lists but for near ties by its own
// scores (decisions.h), and over these the same outputs.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "cached.h"
#include "call.h"
#include "decisions.h"
#include "expect.h"
#include "sized.h"
#include "tensor.h"

namespace {

using namespace pbsattn;
using namespace pbsattn::fuzz;

Share ran("calls that are run", 0.3);
Share compared("of those, calls compared with the reference", 0.1);
Share paged("of those, calls whose keys and values lie in pages", 0.02);
Share cached("of those, calls that find segments in a cache", 0.01);
Share overlapping("of those, calls whose output lies over an input", 0.01);
Ties other_orders("heads whose keys stand in another order than the reference's");
Ties other_lists("rows that list other blocks than the reference in the same order of keys");

// One like a model's, or now and then one that is no number, or as large as a float can be.
float take_sink(Bytes& bytes) {
  using Limits = std::numeric_limits<float>;
  constexpr std::array ends{Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(),
                            Limits::max(),       Limits::lowest(),   1e30F};
  constexpr std::int64_t largest = 24;  // in quarters
  const std::int64_t drawn = bytes.take_near(-largest, largest + std::ssize(ends));
  const std::int64_t end = drawn - largest - 1;
  if (end >= 0 && end < std::ssize(ends)) return ends[static_cast<std::size_t>(end)];
  return static_cast<float>(drawn) / 4;
}

struct Tensors {
  Tensors(Bytes& bytes, const Shape& s)
      : q(bytes, Tensor::take_dtype(bytes), s.batch, s.q_heads, s.q_len, s.head_dim),
        k(bytes, Tensor::take_dtype(bytes), s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(bytes, Tensor::take_dtype(bytes), s.batch, s.kv_heads, s.kv_len, value_dim(s)),
        out(bytes, Tensor::take_dtype(bytes), s.batch, s.q_heads, s.q_len, value_dim(s)),
        lse(static_cast<std::size_t>(s.batch * s.q_heads * s.q_len)) {
    if (!bytes.take_rarely(3)) return;
    for (std::int64_t h = 0; h < s.q_heads; ++h) sinks.push_back(take_sink(bytes));
  }

  // Draws what the plan's permutation takes besides; of hostile bytes nearly so.
  void take_order(Bytes& bytes, const Options& options, const Shape& s) {
    if (options.permutation == Permutation::learned) {
      const std::int64_t features = s.head_dim / 2 + s.head_dim;
      weights.assign(static_cast<std::size_t>(s.kv_heads * (bytes.take_near(features, features) & 0xFF)), 0.0F);
      if (!bytes.take_rarely(8))
        for (float& weight : weights) weight = 4 * bytes.take_share(255) - 2;
      pairs = static_cast<RopePairs>(bytes.take_near(0, 1) & 0xFF);
    }
    if (options.permutation != Permutation::arrival || bytes.take_rarely(4)) return;
    const std::int64_t segments = s.kv_len / options.segment;
    const std::int64_t tokens = segments * options.segment;
    known = (bytes.take_near(0, segments) & 0xFF) * options.segment;
    head_stride = tokens + (bytes.take_near(0, 3) & 0xFF);
    if (head_stride == 0) return;
    // Known segments stand backwards, and of hostile bytes now and then as no segment can.
    order.assign(static_cast<std::size_t>(s.batch * s.kv_heads * head_stride), -1);
    for (std::int64_t i = 0; i < std::ssize(order); ++i)
      if (const std::int64_t slot = i % head_stride; slot < known)
        order[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(slot / options.segment * options.segment +
                                                                       options.segment - 1 - slot % options.segment);
    if (bytes.hostile() && !order.empty()) order[bytes.take<std::uint16_t>() % order.size()] += 1;
  }
  OrderWeights order_weights() const { return {weights, pairs}; }
  KeyOrder kept(const Shape& s) {
    if (order.empty()) return {};
    return {.data = order.data(), .batch_stride = s.kv_heads * head_stride, .head_stride = head_stride, .known = known};
  }

  // Changes keys and values from a token on. Returns how many tokens, the first, are as they were: where rows lie over
  // each other fewer than that.
  std::int64_t change_from(std::int64_t first) {
    std::int64_t unchanged = first;
    for (Tensor* tensor : {&k, &v}) {
      const Tensor before = tensor->copy();
      const auto each = [&](std::int64_t begin, std::int64_t end, auto&& body) {
        for (std::int64_t t = begin; t < end; ++t)
          for (std::int64_t i = 0; i < tensor->batch * tensor->heads; ++i)
            body(i / tensor->heads, i % tensor->heads, t);
      };
      each(first, tensor->tokens, [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        std::fill_n(tensor->row(b, h, t), tensor->row_bytes(), std::uint8_t{0x3E});
      });
      each(0, first, [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        for (std::int64_t d = 0; d < tensor->head_dim; ++d)
          if (const double x = before.get(b, h, t, d), y = tensor->get(b, h, t, d);
              x != y && !(std::isnan(x) && std::isnan(y)))
            unchanged = std::min(unchanged, t);
      });
    }
    return unchanged;
  }

  // Moves keys and values into pages of a cache, now and then; of hostile bytes nearly so.
  void take_pages(Bytes& bytes, const Shape& s) {
    if (!bytes.take_rarely(3)) return;
    const std::int64_t size = 16 * (1 + bytes.take<std::uint8_t>() % 5);
    const std::int64_t entries = ceil_div(s.kv_len, size);
    const std::int64_t count = s.batch * entries + bytes.take<std::uint8_t>() % 3;
    Tensor k_pages(bytes, k.view.dtype, count, s.kv_heads, size, s.head_dim);
    Tensor v_pages(bytes, v.view.dtype, count, s.kv_heads, size, value_dim(s));
    if (!k_pages.fits || !v_pages.fits) return;
    table.resize(static_cast<std::size_t>(count));
    std::iota(table.begin(), table.end(), 0);
    std::ranges::shuffle(table, std::mt19937_64(bytes.hash()));
    table.resize(static_cast<std::size_t>(s.batch * entries));
    pages = {.table = nullptr, .batch_stride = entries, .size = size, .count = count};
    for (const auto& [from, to] : {std::pair{&k, &k_pages}, {&v, &v_pages}}) {
      std::ranges::fill(*to->memory, std::uint8_t{0xFF});  // NaN, which nothing reads
      const bool refused = !from->runs_forward() || !to->runs_forward();
      for (std::int64_t b = 0; b < s.batch && !refused; ++b)
        for (std::int64_t h = 0; h < s.kv_heads; ++h)
          for (std::int64_t t = 0; t < s.kv_len; ++t)
            std::copy_n(from->row(b, h, t), from->row_bytes(),
                        to->row(table[static_cast<std::size_t>(b * entries + t / size)], h, t % size));
      *from = *to;
    }
    if (!bytes.hostile()) return;
    // What a run must refuse: it can't know how long a table is, nor how much memory pages have.
    if (bytes.take_rarely(4)) {
      const auto page = bytes.take<std::int32_t>();
      table[bytes.take<std::uint16_t>() % table.size()] = page >= 0 && page < count ? -1 : page;
    }
    if (bytes.take_rarely(4)) pages.size -= 1 + bytes.take<std::uint8_t>() % 15;
    if (bytes.take_rarely(4)) pages.count = bytes.take<std::uint8_t>() % count;  // or refuse, or need no more
  }

  bool fit() const { return q.fits && k.fits && v.fits && out.fits; }
  Tensors copy() const {
    Tensors result = *this;
    for (Tensor* tensor : {&result.q, &result.k, &result.v, &result.out}) *tensor = tensor->copy();
    return result;
  }

  Tensor q, k, v, out;
  std::vector<std::int32_t> table;  // of pages, if k and v lie in some
  Pages pages;                      // but for the pointer to that
  std::vector<float> lse, sinks;
  std::vector<float> weights;
  RopePairs pairs = RopePairs::halves;
  std::vector<std::int32_t> order;
  std::int64_t head_stride = 0, known = 0;
};

pbsattn_view to_c(const View& v) {
  auto c = sized<pbsattn_view>();
  c.data = v.data;
  c.dtype = static_cast<std::int32_t>(v.dtype);
  c.batch_stride = v.batch_stride;
  c.head_stride = v.head_stride;
  c.token_stride = v.token_stride;
  return c;
}

pbsattn_status run_through_c(const pbsattn_plan* plan, const Shape& shape, Tensors& t, const Cache& cache, float* lse,
                             std::size_t misalign, pbsattn_stats* stats) {
  const pbsattn_view q = to_c(t.q.view), k = to_c(t.k.view), v = to_c(t.v.view), out = to_c(t.out.view);
  const std::size_t size = pbsattn_plan_workspace_size(plan);
  const std::unique_ptr<std::byte[]> workspace(new std::byte[misalign + size]);
  std::fill_n(workspace.get(), misalign + size, std::byte{0xFF});
  auto run = sized<pbsattn_run>();
  run.q = &q;
  run.k = &k;
  run.v = &v;
  run.out = &out;
  run.lse = lse;
  run.sinks = t.sinks.empty() ? nullptr : t.sinks.data();
  run.workspace = workspace.get() + misalign;
  run.workspace_size = size;
  run.stats = stats;
  auto weights = sized<pbsattn_order_weights>();
  weights.values = t.weights.data();
  weights.count = t.weights.size();
  weights.pairs = static_cast<std::int32_t>(t.pairs);
  run.order_weights = &weights;
  const KeyOrder kept = t.kept(shape);
  auto order = sized<pbsattn_key_order>();
  order.data = kept.data;
  order.batch_stride = kept.batch_stride;
  order.head_stride = kept.head_stride;
  order.known = kept.known;
  run.order = &order;
  auto pages = sized<pbsattn_pages>();
  pages.table = t.table.empty() ? nullptr : t.table.data();
  pages.batch_stride = t.pages.batch_stride;
  pages.size = t.pages.size;
  pages.count = t.pages.count;
  run.pages = &pages;
  run.cache = cache.cache.get();
  run.cache_valid = cache.valid;
  return pbsattn_plan_run(plan, &run);
}

Plan plan_of(const Call& call, const Device& device, std::size_t cap) {
  return call.heads.size() == 1 ? Plan::create(call.heads.front(), call.shape, device, cap)
                                : Plan::create(std::span<const Options>(call.heads), call.shape, device, cap);
}

ConstView const_view(const Tensor& tensor) {
  const View& v = tensor.view;
  return {v.data, v.dtype, v.batch_stride, v.head_stride, v.token_stride};
}

Trace run_apart(const Plan& plan, Tensors& t) {
  std::vector<std::byte> workspace(plan.workspace_size());
  Trace trace;
  plan.run({.q = const_view(t.q),
            .k = const_view(t.k),
            .v = const_view(t.v),
            .sinks = t.sinks,
            .order_weights = t.order_weights()},
           {.out = t.out.view, .lse = t.lse.data(), .order = t.kept(plan.shape())}, workspace, nullptr, &trace);
  return trace;
}

// `agree` of each pair of outputs.
template <class Agree>
void expect_outputs(const Tensor& a, const Tensor& b, const char* what, Agree&& agree) {
  for (std::int64_t n = 0; n < a.batch; ++n)
    for (std::int64_t h = 0; h < a.heads; ++h)
      for (std::int64_t t = 0; t < a.tokens; ++t)
        for (std::int64_t d = 0; d < a.head_dim; ++d)
          if (const double x = a.get(n, h, t, d), y = b.get(n, h, t, d); !agree(x, y)) {
            std::fprintf(stderr, "output [%d][%d][%d][%d]: %.9g, not %.9g\n", static_cast<int>(n), static_cast<int>(h),
                         static_cast<int>(t), static_cast<int>(d), x, y);
            fail(what);
          }
}

bool same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

void expect_reference(const Call& call, const Plan& plan, Tensors& ours, const Trace& trace, bool finite) {
  const Options options = plan.options();
  const Geometry geometry{
      .shape = call.shape, .block = options.block, .segment = options.segment, .window = options.window};
  const Inputs inputs{.q = const_view(ours.q),
                      .k = const_view(ours.k),
                      .v = const_view(ours.v),
                      .sinks = ours.sinks,
                      .order_weights = ours.order_weights()};
  // A plan's path is that of inputs that are not all bf16.
  const bool all_bf16 = std::ranges::all_of(std::array{inputs.q, inputs.k, inputs.v},
                                            [](const ConstView& view) { return view.dtype == DType::bf16; });
  const bool automatic = options.precision == Precision::automatic && all_bf16;
  const std::string path = automatic ? describe_cpu().bf16_path : std::string(plan.path());
  const bool bf16 = path.find("bf16") != std::string::npos;
  // Queries that a patch lacks are zeros to the CPU, of which infinite keys make NaN, and nothing to the reference.
  const bool patches = options.score == BlockScore::antidiagonal || options.score == BlockScore::antidiagonal_causal;
  for (std::int64_t flat = 0; (finite || !patches) && flat < call.shape.batch * call.shape.q_heads; ++flat) {
    Options of_head = call.heads[call.heads.size() == 1 ? 0 : static_cast<std::size_t>(flat % call.shape.q_heads)];
    of_head.scale = options.scale;
    if (geometry.windowed()) of_head = options;
    expect_decisions({inputs, of_head, geometry, flat, bf16, ours.kept(call.shape)}, trace, other_orders, other_lists);
  }

  Tensors theirs = ours.copy();
  reference::attend(inputs, options, geometry, trace, {.out = theirs.out.view, .lse = theirs.lse.data()});
  // Means of 16 bits may be rounded the other way.
  const bool rounded =
      options.correction != Correction::none && (ours.k.view.dtype != DType::f32 || ours.v.view.dtype != DType::f32);
  const double coarse = bf16 || rounded ? 0.1 : 1e-3;
  const double unit = ours.out.view.dtype == DType::f32 ? 0 : ours.out.view.dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  const auto close = [&](double scale) {
    return [=](double a, double b) {
      if (!std::isfinite(a) || !std::isfinite(b)) return std::isfinite(a) == std::isfinite(b);
      return std::abs(a - b) <= coarse * scale + unit * std::abs(b);
    };
  };
  constexpr double largest_value = 6;  // of numbers like a model's
  expect_outputs(ours.out, theirs.out, "over the same lists outputs are the reference's", close(largest_value));
  for (std::size_t i = 0; i < ours.lse.size(); ++i)
    if (!close(1 + std::abs(theirs.lse[i]))(ours.lse[i], theirs.lse[i])) {
      std::fprintf(stderr, "lse %zu: %.9g, not %.9g\n", i, ours.lse[i], theirs.lse[i]);
      fail("over the same lists log-sum-exps are the reference's");
    }
}

void run(const pbsattn_plan* plan, const Call& call, Bytes& bytes) {
  Tensors tensors(bytes, call.shape);
  if (!tensors.fit()) return;
  Contents contents = Contents::take(bytes);
  for (Tensor* input : {&tensors.q, &tensors.k, &tensors.v}) {
    input->fill(contents, bytes);
    ++contents.seed;
  }
  tensors.take_order(bytes, call.heads.front(), call.shape);
  Tensors apart = tensors.copy();
  Cache cache(plan, call.shape, bytes);
  if (cache.cache != nullptr && tensors.k.runs_forward() && tensors.v.runs_forward()) {
    Tensors earlier = tensors.copy();
    const std::int64_t valid = earlier.change_from(bytes.take<std::uint16_t>() % (call.shape.kv_len + 1));
    run_through_c(plan, call.shape, earlier, cache, nullptr, 0, nullptr);
    cache.valid = valid;
  }
  if (bytes.hostile() && bytes.take_rarely(8)) cache.valid = bytes.take<std::int16_t>();
  const bool refused = cache.valid < 0 || cache.valid > (cache.cache == nullptr ? 0 : call.shape.kv_len);
  tensors.take_pages(bytes, call.shape);
  Tensor* const inputs[] = {&tensors.q, &tensors.k, &tensors.v};
  const unsigned over = bytes.take<std::uint8_t>() % 16;
  const bool overlaps = over >= 1 && over <= std::size(inputs);
  if (overlaps) {
    Tensor& input = *inputs[over - 1];
    tensors.out.lay_over(input);
    input.memory = tensors.out.memory;
    input.view.data = tensors.out.view.data;
  }

  const std::int64_t found = std::min(pbsattn_segment_cache_tokens(cache.cache.get()), cache.valid);
  const std::vector<std::uint8_t> before = *tensors.out.memory;
  const bool wants_lse = bytes.take_rarely(2);
  auto stats = sized<pbsattn_stats>();
  const pbsattn_status status =
      run_through_c(plan, call.shape, tensors, cache, wants_lse ? tensors.lse.data() : nullptr,
                    bytes.take<std::uint8_t>() % 2, &stats);
  require(status != PBSATTN_OK || !refused, "valid tokens are of the sequence");
  ran.count(status == PBSATTN_OK ? 1 : 0);
  paged.count(status == PBSATTN_OK && !tensors.table.empty() ? 1 : 0);
  cached.count(status == PBSATTN_OK && found > 0 ? 1 : 0);
  overlapping.count(overlaps ? 1 : 0);
  if (status != PBSATTN_OK) {
    require_line(pbsattn_last_error());
    require(status != PBSATTN_INTERNAL, "a call is run or refused");
    require(overlaps || bytes.hostile(), "a call that keeps the rules is run");
    require(*tensors.out.memory == before, "a call that is refused writes nothing");
    return;
  }
  require(tensors.out.only_view_changed(before), "a run writes its output and nothing else");
  require(0 < stats.visited_blocks && stats.visited_blocks <= stats.causal_blocks, "a run counts its blocks");

  // The same with nothing over anything else, nor in pages, nor cached, through the C++ interface.
  const Plan again = plan_of(call, call.device, call.cap);
  const Trace trace = run_apart(again, apart);
  require(static_cast<std::int64_t>(trace.block.size()) == stats.visited_blocks, "a trace has the blocks counted");
  expect_outputs(tensors.out, apart.out, "a run computes the same bits, whatever lies over what and in pages or not",
                 same);
  require(tensors.order == apart.order, "a run writes the same order");
  for (std::size_t i = 0; wants_lse && i < tensors.lse.size(); ++i)
    require(same(tensors.lse[i], apart.lse[i]), "log-sum-exps are the same bits");

  // Naive loops make the reference slow.
  const bool small = call.shape.kv_len <= 128 && call.shape.batch * call.shape.q_heads <= 6;
  const bool judged = call.device.kind == Device::Kind::cpu && small &&
                      call.heads.front().fallback == Fallback::never && contents.kind != Contents::bits;
  compared.count(judged ? 1 : 0);
  if (judged) expect_reference(call, again, apart, trace, contents.kind == Contents::normal);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  const Call call = take_call(bytes);
  const pbsattn_shape shape = to_c(call.shape);
  const pbsattn_device device = to_c(call.device);
  std::vector<pbsattn_options> heads;
  for (const Options& head : call.heads) heads.push_back(to_c(head));
  pbsattn_plan* plan = nullptr;
  const pbsattn_status status = heads.size() == 1
                                    ? pbsattn_plan_create(heads.data(), &shape, &device, call.cap, &plan)
                                    : pbsattn_plan_create_by_head(heads.data(), &shape, &device, call.cap, &plan);
  require((plan != nullptr) == (status == PBSATTN_OK) && status != PBSATTN_INTERNAL, "a call is planned or refused");
  if (plan == nullptr) {
    require_line(pbsattn_last_error());
    require(bytes.hostile() || (call.cap != Plan::no_cap && status == PBSATTN_OUT_OF_MEMORY),
            "a call that keeps the rules is planned");
    ran.count(0);
    return 0;
  }
  const bool reference = call.device.kind == Device::Kind::reference;
  if (call.shape.kv_len <= (reference ? 64 : 320) && call.shape.batch * call.shape.q_heads <= 12 &&
      call.shape.head_dim <= 64 && value_dim(call.shape) <= 64)
    run(plan, call, bytes);
  pbsattn_plan_destroy(plan);
  return 0;
}
