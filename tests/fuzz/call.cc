#include "call.h"

#include <algorithm>
#include <type_traits>

#include "sized.h"

namespace pbsattn::fuzz {
namespace {

template <class Enum>
Enum take_enum(Bytes& bytes) {
  return static_cast<Enum>(bytes.take_near(0, static_cast<std::int64_t>(Names<Enum>::values.size()) - 1) & 0xFF);
}

int take_int(Bytes& bytes, std::int64_t low, std::int64_t high) {
  return static_cast<int>(bytes.take_near(low, high));
}

// What heads of one call may differ in.
void take_head(Bytes& bytes, Options& options) {
  options.keep = take_enum<KeepRule>(bytes);
  options.top_p = std::max(bytes.take_share(20), bytes.hostile() ? -1.0F : 0.05F);
  options.threshold = bytes.take_share(16);
  options.floor_top_p = bytes.take_rarely(4) ? bytes.take_share(20) : 0;
  options.top_k = take_int(bytes, 0, 4);
  options.density = bytes.take_share(8);
  options.vertical = take_int(bytes, 0, 400);
  options.slash = take_int(bytes, 0, 400);
  options.tau = bytes.take_share(8);
  options.min_budget = take_int(bytes, 0, 400);
  options.dense_last_rows = bytes.take_rarely(3) ? take_int(bytes, 0, 3) : 0;
  options.sink_blocks = bytes.take_rarely(3) ? take_int(bytes, 0, 2) : 0;
  options.local_blocks = bytes.take_rarely(3) ? take_int(bytes, 0, 2) : 0;
  options.threshold_tokens = bytes.take_rarely(3) ? 64 * bytes.take_share(16) : 0;
  if (bytes.hostile()) return;
  // Two scores go with one rule each.
  const bool lines = options.score == BlockScore::vertical_slash, pools = options.score == BlockScore::flexible;
  const bool any = options.keep == KeepRule::all || options.keep == KeepRule::none;
  if (any) return;
  if (lines) options.keep = KeepRule::vertical_slash;
  if (pools) options.keep = KeepRule::coverage;
  if (options.score == BlockScore::none) options.keep = KeepRule::none;
  if (options.score == BlockScore::two_step) options.keep = KeepRule::threshold;
  if (!lines && options.keep == KeepRule::vertical_slash) options.keep = KeepRule::top_p;
  if (!pools && options.keep == KeepRule::coverage) options.keep = KeepRule::top_k;
}

Options take_options(Bytes& bytes) {
  Options options;
  options.permutation = take_enum<Permutation>(bytes);
  options.order_scope = take_enum<OrderScope>(bytes);
  options.score = take_enum<BlockScore>(bytes);
  options.correction = bytes.take_rarely(4) ? take_enum<Correction>(bytes) : Correction::none;
  options.rules = take_enum<Rules>(bytes);
  options.precision = take_enum<Precision>(bytes);
  options.fallback = bytes.take_rarely(8) ? take_enum<Fallback>(bytes) : Fallback::never;
  options.block = static_cast<int>(32 * (bytes.take_near(1, 3) & 0xFFFFFF));
  options.segment = static_cast<int>(options.block * (bytes.take_near(1, 3) & 0xFF));
  options.expected_density = bytes.take_share(8);
  options.scale = bytes.take_rarely(4) ? bytes.take_share(4) : 0;
  if (bytes.take_rarely(4)) options.window = take_int(bytes, 1, 200);
  options.softcap = bytes.take_rarely(4) ? 8 * bytes.take_share(4) : 0;
  options.two_step_queries = take_int(bytes, 1, 40);
  options.two_step_exact = take_int(bytes, 1, 40);
  options.two_step_reach = take_int(bytes, 1, 8);
  if (bytes.hostile()) return options;
  if (options.score == BlockScore::vertical_slash || options.score == BlockScore::flexible)
    options.permutation = Permutation::none;
  if (options.permutation == Permutation::learned || options.permutation == Permutation::arrival)
    options.order_scope = OrderScope::kv_head;
  return options;
}

Shape take_shape(Bytes& bytes) {
  constexpr std::int64_t longest = 320;  // tokens; enough for a few segments, the last one incomplete
  Shape shape;
  shape.batch = bytes.take_near(1, 2);
  shape.kv_heads = bytes.take_near(1, 2);
  shape.q_heads = bytes.take_near(1, 3) * (shape.kv_heads & 0xFF);
  shape.kv_len = bytes.take_near(1, bytes.take_rarely(2) ? longest : 128);
  shape.q_len =
      bytes.take_rarely(2) ? bytes.take_near(1, std::clamp<std::int64_t>(shape.kv_len, 1, longest)) : shape.kv_len;
  shape.head_dim = 8 * bytes.take_near(1, 5);
  shape.head_dim_v = bytes.take_rarely(3) ? 8 * bytes.take_near(1, 5) : 0;
  return shape;
}

}  // namespace

Call take_call(Bytes& bytes) {
  if (bytes.take_rarely(4)) bytes.allow_hostile();
  Call call;
  const Options options = take_options(bytes);
  call.shape = take_shape(bytes);
  call.device.kind = static_cast<Device::Kind>(bytes.take_near(0, bytes.hostile() ? 2 : 1) & 0xFF);
  call.device.threads = take_int(bytes, 1, 3);
  if (bytes.take_rarely(4)) call.cap = bytes.take<std::uint32_t>() >> 8;
  const bool by_head = bytes.take_rarely(3) && call.shape.q_heads >= 1 && call.shape.q_heads <= 8;
  call.heads.assign(by_head ? static_cast<std::size_t>(call.shape.q_heads) : 1, options);
  for (Options& head : call.heads) take_head(bytes, head);
  return call;
}

pbsattn_options to_c(const Options& o) {
  auto c = sized<pbsattn_options>();
  const auto copy = [](auto& to, auto from) { to = static_cast<std::remove_reference_t<decltype(to)>>(from); };
  copy(c.permutation, o.permutation);
  copy(c.order_scope, o.order_scope);
  copy(c.score, o.score);
  copy(c.keep, o.keep);
  copy(c.correction, o.correction);
  copy(c.rules, o.rules);
  copy(c.precision, o.precision);
  copy(c.fallback, o.fallback);
  c.top_p = o.top_p;
  c.threshold = o.threshold;
  c.floor_top_p = o.floor_top_p;
  c.top_k = o.top_k;
  c.density = o.density;
  c.vertical = o.vertical;
  c.slash = o.slash;
  c.tau = o.tau;
  c.min_budget = o.min_budget;
  c.block = o.block;
  c.segment = o.segment;
  c.dense_last_rows = o.dense_last_rows;
  c.sink_blocks = o.sink_blocks;
  c.local_blocks = o.local_blocks;
  c.scale = o.scale;
  c.expected_density = o.expected_density;
  c.softcap = o.softcap;
  c.window = o.window;
  c.threshold_tokens = o.threshold_tokens;
  c.two_step_queries = o.two_step_queries;
  c.two_step_exact = o.two_step_exact;
  c.two_step_reach = o.two_step_reach;
  return c;
}

pbsattn_shape to_c(const Shape& s) {
  auto c = sized<pbsattn_shape>();
  c.batch = s.batch;
  c.q_heads = s.q_heads;
  c.kv_heads = s.kv_heads;
  c.q_len = s.q_len;
  c.kv_len = s.kv_len;
  c.head_dim = s.head_dim;
  c.head_dim_v = s.head_dim_v;
  return c;
}

pbsattn_device to_c(const Device& d) {
  auto c = sized<pbsattn_device>();
  c.kind = static_cast<std::int32_t>(d.kind);
  c.threads = d.threads;
  c.index = d.index;
  return c;
}

}  // namespace pbsattn::fuzz
