// The C interface: each function translates its arguments, calls the C++ API and turns exceptions into
// status codes. Nothing is computed here.
#include <cstddef>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/capi/c_structs.h"
#include "core/options/c_options.h"
#include "core/validation/validate.h"
#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.h"
#include "pbsattn/pbsattn.hpp"

struct pbsattn_plan {
  pbsattn::Plan plan;
};
struct pbsattn_segment_cache {
  pbsattn::SegmentCache cache;
};

namespace {

thread_local std::string last_error;

pbsattn_status fail(pbsattn_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <class Body>
pbsattn_status guarded(Body&& body) noexcept {
  try {
    last_error.clear();
    body();
    return PBSATTN_OK;
  } catch (const pbsattn::Error& error) {
    switch (error.code()) {
      case pbsattn::ErrorCode::invalid_argument: return fail(PBSATTN_INVALID_ARGUMENT, error.what());
      case pbsattn::ErrorCode::unsupported: return fail(PBSATTN_UNSUPPORTED, error.what());
      case pbsattn::ErrorCode::out_of_memory: return fail(PBSATTN_OUT_OF_MEMORY, error.what());
      case pbsattn::ErrorCode::internal: break;
    }
    return fail(PBSATTN_INTERNAL, error.what());
  } catch (const std::bad_alloc&) {
    return fail(PBSATTN_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(PBSATTN_INTERNAL, error.what());
  } catch (...) {
    return fail(PBSATTN_INTERNAL, "unknown exception");
  }
}

using pbsattn::default_options;
using pbsattn::read_struct;
using pbsattn::require_pointer;
using pbsattn::require_zero;
using pbsattn::to_c;

pbsattn::Options read_options(const pbsattn_options* options, const std::string& what) {
  return pbsattn::to_cpp(read_struct(options, what, default_options));
}

void write_options(pbsattn_options* options, const pbsattn::Options& value) {
  pbsattn::write_settings(options, "options", to_c(value), default_options);
}

template <class Void>
pbsattn::BasicView<Void> read_view(const pbsattn_view* view, const std::string& what) {
  const pbsattn_view v = read_struct(view, what);
  require_zero(v.reserved, what);
  return {v.data, pbsattn::to_enum<pbsattn::DType>(v.dtype), v.batch_stride, v.head_stride, v.token_stride};
}

pbsattn::OrderWeights read_order_weights(const pbsattn_order_weights* weights) {
  if (weights == nullptr) return {};
  const pbsattn_order_weights w = read_struct(weights, "order_weights");
  require_zero(w.reserved, "order_weights");
  if (w.count > 0) require_pointer(w.values, "order_weights.values");
  return {.values = {w.values, w.count}, .pairs = pbsattn::to_enum<pbsattn::RopePairs>(w.pairs)};
}

pbsattn::KeyOrder read_key_order(const pbsattn_key_order* order) {
  if (order == nullptr) return {};
  const pbsattn_key_order o = read_struct(order, "order");
  return {.data = o.data, .batch_stride = o.batch_stride, .head_stride = o.head_stride, .known = o.known};
}

pbsattn::Pages read_pages(const pbsattn_pages* pages) {
  if (pages == nullptr) return {};
  const pbsattn_pages p = read_struct(pages, "pages");
  return {.table = p.table, .batch_stride = p.batch_stride, .size = p.size, .count = p.count};
}

// Translates shape and device, and makes the plan.
template <class Create>
pbsattn_status make_plan(const pbsattn_shape* shape, const pbsattn_device* device, pbsattn_plan** plan,
                         Create&& create) {
  if (plan != nullptr) *plan = nullptr;
  return guarded([&] {
    require_pointer(plan, "plan");
    const pbsattn_shape s = read_struct(shape, "shape");
    const pbsattn_device d = read_struct(device, "device");
    require_zero(d.reserved, "device");
    const pbsattn::Shape cpp_shape{.batch = s.batch,
                                   .q_heads = s.q_heads,
                                   .kv_heads = s.kv_heads,
                                   .q_len = s.q_len,
                                   .kv_len = s.kv_len,
                                   .head_dim = s.head_dim,
                                   .head_dim_v = s.head_dim_v};
    const pbsattn::Device cpp_device{pbsattn::to_enum<pbsattn::Device::Kind>(d.kind), d.threads, d.index};
    *plan = new pbsattn_plan{create(cpp_shape, cpp_device)};
  });
}

}  // namespace

const char* pbsattn_version(void) {
  return PBSATTN_VERSION;
}
const char* pbsattn_last_error(void) {
  return last_error.c_str();
}

const char* pbsattn_method_name(size_t index) {
  const auto table = pbsattn::methods();
  return index < table.size() ? table[index].name.data() : nullptr;
}

pbsattn_status pbsattn_method(const char* name, pbsattn_options* options) {
  return guarded([&] {
    require_pointer(name, "name");
    write_options(options, pbsattn::parse_method(name));
  });
}

pbsattn_status pbsattn_set_option(pbsattn_options* options, const char* name, const char* value) {
  return guarded([&] {
    pbsattn::Options changed = read_options(options, "options");
    require_pointer(name, "name");
    require_pointer(value, "value");
    pbsattn::set_option(changed, name, value);
    write_options(options, changed);
  });
}

pbsattn_status pbsattn_plan_create(const pbsattn_options* options, const pbsattn_shape* shape,
                                   const pbsattn_device* device, size_t workspace_cap, pbsattn_plan** plan) {
  return make_plan(shape, device, plan, [&](const pbsattn::Shape& s, const pbsattn::Device& d) {
    return pbsattn::Plan::create(read_options(options, "options"), s, d, workspace_cap);
  });
}

pbsattn_status pbsattn_plan_create_by_head(const pbsattn_options* heads, const pbsattn_shape* shape,
                                           const pbsattn_device* device, size_t workspace_cap, pbsattn_plan** plan) {
  return make_plan(shape, device, plan, [&](const pbsattn::Shape& s, const pbsattn::Device& d) {
    pbsattn::validate(s);  // q_heads is how many there are
    const pbsattn::StructArray<const pbsattn_options> all(heads, static_cast<std::size_t>(s.q_heads), "heads");
    std::vector<pbsattn::Options> options;
    options.reserve(all.count);
    for (std::size_t h = 0; h < all.count; ++h) options.push_back(read_options(all[h], all.name(h)));
    return pbsattn::Plan::create(std::span<const pbsattn::Options>(options), s, d, workspace_cap);
  });
}

void pbsattn_plan_destroy(pbsattn_plan* plan) {
  delete plan;
}

size_t pbsattn_plan_workspace_size(const pbsattn_plan* plan) {
  return plan == nullptr ? 0 : plan->plan.workspace_size();
}

const char* pbsattn_plan_path(const pbsattn_plan* plan) {
  return plan == nullptr ? "" : plan->plan.path().data();
}

pbsattn_status pbsattn_plan_options(const pbsattn_plan* plan, pbsattn_options* options) {
  return guarded([&] {
    require_pointer(plan, "plan");
    write_options(options, plan->plan.options());
  });
}

pbsattn_status pbsattn_plan_cache_size(const pbsattn_plan* plan, int64_t tokens, size_t* size) {
  return guarded([&] {
    require_pointer(plan, "plan");
    require_pointer(size, "size");
    *size = plan->plan.cache_size(tokens);
  });
}

pbsattn_status pbsattn_segment_cache_create(void* memory, size_t size, pbsattn_segment_cache** cache) {
  if (cache != nullptr) *cache = nullptr;
  return guarded([&] {
    require_pointer(cache, "cache");
    if (size > 0) require_pointer(memory, "memory");
    *cache = new pbsattn_segment_cache{pbsattn::SegmentCache({static_cast<std::byte*>(memory), size})};
  });
}

void pbsattn_segment_cache_destroy(pbsattn_segment_cache* cache) {
  delete cache;
}

int64_t pbsattn_segment_cache_tokens(const pbsattn_segment_cache* cache) {
  return cache == nullptr ? 0 : cache->cache.tokens();
}

pbsattn_status pbsattn_plan_run(const pbsattn_plan* plan, const pbsattn_run* run) {
  return guarded([&] {
    require_pointer(plan, "plan");
    const pbsattn_run r = read_struct(run, "run");
    const auto q_heads = static_cast<std::size_t>(plan->plan.shape().q_heads);
    const pbsattn::Inputs inputs{.q = read_view<const void>(r.q, "q"),
                                 .k = read_view<const void>(r.k, "k"),
                                 .v = read_view<const void>(r.v, "v"),
                                 .sinks = {r.sinks, r.sinks == nullptr ? 0 : q_heads},
                                 .order_weights = read_order_weights(r.order_weights),
                                 .pages = read_pages(r.pages)};
    const pbsattn::Outputs outputs{
        .out = read_view<void>(r.out, "out"),
        .lse = r.lse,
        .order = read_key_order(r.order),
        .cache = {.cache = r.cache == nullptr ? nullptr : &r.cache->cache, .valid = r.cache_valid}};
    if (r.workspace_size > 0) require_pointer(r.workspace, "workspace");
    if (r.stats != nullptr) pbsattn::size_of_struct(r.stats, "stats");  // before the work
    pbsattn::Stats stats;
    plan->plan.run(inputs, outputs, {static_cast<std::byte*>(r.workspace), r.workspace_size}, pbsattn::Stream{r.stream},
                   r.stats == nullptr ? nullptr : &stats);
    if (r.stats != nullptr)
      pbsattn::write_struct(r.stats, "stats",
                            {sizeof(pbsattn_stats), stats.visited_blocks, stats.causal_blocks, stats.permute_seconds,
                             stats.select_seconds, stats.attend_seconds});
  });
}
