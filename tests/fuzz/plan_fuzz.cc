// Throws calls at planning and running. Through the C interface, whatever a plan accepts it must run within the buffers
// that its shape and strides describe, which lie here between AddressSanitizer's red zones, and whatever overlaps is
// refused or right. Small calls must agree with the reference: the same lists but for rare near ties, and over the same
// lists the same outputs.
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string_view>

#include "call.h"
#include "expect.h"
#include "sized.h"
#include "tensor.h"

namespace {

using namespace pbsattn;
using namespace pbsattn::fuzz;

Share ran("calls that are run", 0.3);
Share compared("of those, calls over the reference's lists, so that outputs are compared", 0.1);
Share overlapping("of those, calls whose output lies over an input", 0.01);
// What float32 decides otherwise than double are near ties.
constexpr double near_ties = 0.03;
Share other_orders("calls whose keys stand in another order than the reference's", 0, 0.1);
std::array<Share, 12> other_lists{{{"none: rows with other blocks than the reference's", 0, near_ties},
                                   {"mean_pool: the same", 0, near_ties},
                                   {"per_query: the same", 0, near_ties},
                                   {"antidiagonal: the same", 0, near_ties},
                                   {"antidiagonal_causal: the same", 0, near_ties},
                                   {"exact: the same", 0, near_ties},
                                   {"mean_pool_causal: the same", 0, near_ties},
                                   {"sampled: the same", 0, near_ties},
                                   {"energy: the same", 0, near_ties},
                                   {"dual_band: the same", 0, near_ties},
                                   {"vertical_slash: the same", 0, near_ties},
                                   {"flexible: the same", 0, near_ties}}};

struct Tensors {
  Tensors(Bytes& bytes, const Shape& s)
      : q(bytes, s.batch, s.q_heads, s.q_len, s.head_dim),
        k(bytes, s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(bytes, s.batch, s.kv_heads, s.kv_len, s.head_dim),
        out(bytes, s.batch, s.q_heads, s.q_len, s.head_dim),
        lse(static_cast<std::size_t>(s.batch * s.q_heads * s.q_len)) {}

  bool fit() const { return q.fits && k.fits && v.fits && out.fits; }
  Tensors copy() const {
    Tensors result = *this;
    for (Tensor* tensor : {&result.q, &result.k, &result.v, &result.out}) *tensor = tensor->copy();
    return result;
  }

  Tensor q, k, v, out;
  std::vector<float> lse;
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

pbsattn_status run_through_c(const pbsattn_plan* plan, const Tensors& t, float* lse, std::size_t misalign,
                             pbsattn_stats* stats) {
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
  run.workspace = workspace.get() + misalign;
  run.workspace_size = size;
  run.stats = stats;
  return pbsattn_plan_run(plan, &run);
}

Plan plan_of(const Call& call, const Device& device, std::size_t cap) {
  return call.heads.size() == 1 ? Plan::create(call.heads.front(), call.shape, device, cap)
                                : Plan::create(std::span<const Options>(call.heads), call.shape, device, cap);
}

Trace run_apart(const Plan& plan, Tensors& t) {
  std::vector<std::byte> workspace(plan.workspace_size());
  Trace trace;
  const auto read = [](const Tensor& tensor) {
    const View& v = tensor.view;
    return ConstView{v.data, v.dtype, v.batch_stride, v.head_stride, v.token_stride};
  };
  plan.run({.q = read(t.q), .k = read(t.k), .v = read(t.v)}, {.out = t.out.view, .lse = t.lse.data()}, workspace,
           nullptr, &trace);
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

// How many rows list other blocks.
std::int64_t count_other_rows(const Trace& a, const Trace& b) {
  std::int64_t count = 0;
  for (std::size_t row = 0; row + 1 < a.row_start.size(); ++row) {
    const auto list = [&](const Trace& trace) {
      return std::span(trace.block)
          .subspan(static_cast<std::size_t>(trace.row_start[row]),
                   static_cast<std::size_t>(trace.row_start[row + 1] - trace.row_start[row]));
    };
    if (!std::ranges::equal(list(a), list(b))) ++count;
  }
  return count;
}

void expect_reference(const Call& call, const Plan& plan, const Tensors& ours, const Trace& trace, bool finite) {
  const Options& options = call.heads.front();
  Tensors theirs = ours.copy();
  const Trace reference = run_apart(plan_of(call, Device::reference(), Plan::no_cap), theirs);
  require(trace.rows == reference.rows && trace.blocks == reference.blocks &&
              trace.row_start.size() == reference.row_start.size() && trace.order.size() == reference.order.size(),
          "a trace has the reference's form");
  const bool bf16 = plan.path().find("bf16") != std::string_view::npos;
  const std::int64_t other = count_other_rows(trace, reference);
  if (finite && !bf16)
    other_lists[static_cast<std::size_t>(options.score)].count(other,
                                                               static_cast<std::int64_t>(trace.row_start.size()) - 1);
  const bool same_order = trace.order == reference.order;
  if (finite && !bf16) other_orders.count(same_order ? 0 : 1);
  compared.count(other == 0 && same_order ? 1 : 0);
  if (other != 0 || !same_order) return;

  // Means of 16 bits may be rounded the other way.
  const bool rounded =
      options.correction != Correction::none && (ours.k.view.dtype != DType::f32 || ours.v.view.dtype != DType::f32);
  const double coarse = bf16 || rounded ? 0.1 : 1e-3;
  const double unit = ours.out.view.dtype == DType::f32 ? 0 : ours.out.view.dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  const auto close = [&](double scale) {
    return [=](double a, double b) {
      // A query whose every score is -inf gives 0; a NaN among its values may spoil that.
      if (!finite && b == 0 && std::isnan(a)) return true;
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
  Tensors apart = tensors.copy();
  Tensor* const inputs[] = {&tensors.q, &tensors.k, &tensors.v};
  const unsigned over = bytes.take<std::uint8_t>() % 16;
  const bool overlaps = over >= 1 && over <= std::size(inputs);
  if (overlaps) {
    Tensor& input = *inputs[over - 1];
    tensors.out.lay_over(input);
    input.memory = tensors.out.memory;
    input.view.data = tensors.out.view.data;
  }

  const std::vector<std::uint8_t> before = *tensors.out.memory;
  const bool wants_lse = bytes.take_rarely(2);
  auto stats = sized<pbsattn_stats>();
  const pbsattn_status status =
      run_through_c(plan, tensors, wants_lse ? tensors.lse.data() : nullptr, bytes.take<std::uint8_t>() % 2, &stats);
  ran.count(status == PBSATTN_OK ? 1 : 0);
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

  // The same with nothing over anything else, through the C++ interface.
  const Plan again = plan_of(call, call.device, call.cap);
  const Trace trace = run_apart(again, apart);
  require(static_cast<std::int64_t>(trace.block.size()) == stats.visited_blocks, "a trace has the blocks counted");
  expect_outputs(tensors.out, apart.out, "a run computes the same bits, whatever lies over what", same);
  for (std::size_t i = 0; wants_lse && i < tensors.lse.size(); ++i)
    require(same(tensors.lse[i], apart.lse[i]), "log-sum-exps are the same bits");

  // Naive loops make the reference slow.
  const bool small = call.shape.kv_len <= 128 && call.shape.batch * call.shape.q_heads <= 6;
  if (call.device.kind == Device::Kind::cpu && small && call.heads.front().fallback == Fallback::never &&
      contents.kind != Contents::bits)
    expect_reference(call, again, apart, trace, contents.kind == Contents::normal);
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
      call.shape.head_dim <= 64)
    run(plan, call, bytes);
  pbsattn_plan_destroy(plan);
  return 0;
}
