// The C interface: each function translates its arguments, calls the C++ API and turns exceptions into
// status codes. Nothing is computed here.
#include <cstddef>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/validate.h"
#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.h"
#include "pbsattn/pbsattn.hpp"

struct pbsattn_plan {
  pbsattn::Plan plan;
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

void require_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr)
    throw pbsattn::Error(pbsattn::ErrorCode::invalid_argument, std::string(name) + ": null pointer");
}

// Enumerators travel as int32 so that a wrong value is data, not undefined behaviour: out of range of the
// enum's byte becomes its last byte, which validation refuses.
template <class Enum>
Enum to_enum(std::int32_t value) {
  return static_cast<Enum>(value < 0 || value > 0xFF ? 0xFF : value);
}

pbsattn::Options to_cpp(const pbsattn_options& o) {
  return {.permutation = to_enum<pbsattn::Permutation>(o.permutation),
          .order_scope = to_enum<pbsattn::OrderScope>(o.order_scope),
          .score = to_enum<pbsattn::BlockScore>(o.score),
          .keep = to_enum<pbsattn::KeepRule>(o.keep),
          .correction = to_enum<pbsattn::Correction>(o.correction),
          .rules = to_enum<pbsattn::Rules>(o.rules),
          .precision = to_enum<pbsattn::Precision>(o.precision),
          .fallback = to_enum<pbsattn::Fallback>(o.fallback),
          .top_p = o.top_p,
          .threshold = o.threshold,
          .floor_top_p = o.floor_top_p,
          .top_k = o.top_k,
          .density = o.density,
          .vertical = o.vertical,
          .slash = o.slash,
          .tau = o.tau,
          .min_budget = o.min_budget,
          .block = o.block,
          .segment = o.segment,
          .dense_last_rows = o.dense_last_rows,
          .sink_blocks = o.sink_blocks,
          .local_blocks = o.local_blocks,
          .scale = o.scale,
          .expected_density = o.expected_density};
}

pbsattn_options to_c(const pbsattn::Options& o) {
  return {static_cast<std::int32_t>(o.permutation),
          static_cast<std::int32_t>(o.order_scope),
          static_cast<std::int32_t>(o.score),
          static_cast<std::int32_t>(o.keep),
          static_cast<std::int32_t>(o.correction),
          static_cast<std::int32_t>(o.rules),
          static_cast<std::int32_t>(o.precision),
          static_cast<std::int32_t>(o.fallback),
          o.top_p,
          o.threshold,
          o.floor_top_p,
          o.top_k,
          o.density,
          o.vertical,
          o.slash,
          o.tau,
          o.min_budget,
          o.block,
          o.segment,
          o.dense_last_rows,
          o.sink_blocks,
          o.local_blocks,
          o.scale,
          o.expected_density};
}

template <class Void>
pbsattn::BasicView<Void> to_cpp(const pbsattn_view& v) {
  return {v.data, to_enum<pbsattn::DType>(v.dtype), v.batch_stride, v.head_stride, v.token_stride};
}

// Checks the pointers, translates shape and device, and makes the plan.
template <class Create>
pbsattn_status make_plan(const pbsattn_options* options, const char* name, const pbsattn_shape* shape,
                         const pbsattn_device* device, pbsattn_plan** plan, Create&& create) {
  if (plan != nullptr) *plan = nullptr;
  return guarded([&] {
    require_pointer(options, name);
    require_pointer(shape, "shape");
    require_pointer(device, "device");
    require_pointer(plan, "plan");
    const pbsattn::Shape cpp_shape{.batch = shape->batch,
                                   .q_heads = shape->q_heads,
                                   .kv_heads = shape->kv_heads,
                                   .q_len = shape->q_len,
                                   .kv_len = shape->kv_len,
                                   .head_dim = shape->head_dim};
    const pbsattn::Device cpp_device{to_enum<pbsattn::Device::Kind>(device->kind), device->threads, device->index};
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
    require_pointer(options, "options");
    *options = to_c(pbsattn::method(name));
  });
}

pbsattn_status pbsattn_set_option(pbsattn_options* options, const char* name, const char* value) {
  return guarded([&] {
    require_pointer(options, "options");
    require_pointer(name, "name");
    require_pointer(value, "value");
    pbsattn::Options changed = to_cpp(*options);
    pbsattn::set_option(changed, name, value);
    *options = to_c(changed);
  });
}

pbsattn_status pbsattn_plan_create(const pbsattn_options* options, const pbsattn_shape* shape,
                                   const pbsattn_device* device, size_t workspace_cap, pbsattn_plan** plan) {
  return make_plan(options, "options", shape, device, plan, [&](const pbsattn::Shape& s, const pbsattn::Device& d) {
    return pbsattn::Plan::create(to_cpp(*options), s, d, workspace_cap);
  });
}

pbsattn_status pbsattn_plan_create_by_head(const pbsattn_options* heads, const pbsattn_shape* shape,
                                           const pbsattn_device* device, size_t workspace_cap, pbsattn_plan** plan) {
  return make_plan(heads, "heads", shape, device, plan, [&](const pbsattn::Shape& s, const pbsattn::Device& d) {
    pbsattn::validate(s);  // q_heads is how many there are
    std::vector<pbsattn::Options> options;
    options.reserve(s.q_heads);
    for (std::int64_t h = 0; h < s.q_heads; ++h) options.push_back(to_cpp(heads[h]));
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
    require_pointer(options, "options");
    *options = to_c(plan->plan.options());
  });
}

pbsattn_status pbsattn_plan_run(const pbsattn_plan* plan, const pbsattn_view* q, const pbsattn_view* k,
                                const pbsattn_view* v, const pbsattn_view* out, float* lse, void* workspace,
                                size_t workspace_size, pbsattn_stats* stats) {
  return pbsattn_plan_run_on_stream(plan, q, k, v, out, lse, workspace, workspace_size, nullptr, stats);
}

pbsattn_status pbsattn_plan_run_on_stream(const pbsattn_plan* plan, const pbsattn_view* q, const pbsattn_view* k,
                                          const pbsattn_view* v, const pbsattn_view* out, float* lse, void* workspace,
                                          size_t workspace_size, void* stream, pbsattn_stats* stats) {
  return guarded([&] {
    require_pointer(plan, "plan");
    require_pointer(q, "q");
    require_pointer(k, "k");
    require_pointer(v, "v");
    require_pointer(out, "out");
    if (workspace_size > 0) require_pointer(workspace, "workspace");
    pbsattn::Stats cpp_stats;
    plan->plan.run({.q = to_cpp<const void>(*q), .k = to_cpp<const void>(*k), .v = to_cpp<const void>(*v)},
                   {.out = to_cpp<void>(*out), .lse = lse}, {static_cast<std::byte*>(workspace), workspace_size},
                   pbsattn::Stream{stream}, stats == nullptr ? nullptr : &cpp_stats);
    if (stats != nullptr)
      *stats = {cpp_stats.visited_blocks, cpp_stats.causal_blocks, cpp_stats.permute_seconds, cpp_stats.select_seconds,
                cpp_stats.attend_seconds};
  });
}
