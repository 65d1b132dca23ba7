#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>
#include <utility>

#include "core/executor.h"
#include "core/threads.h"
#include "core/validation/validate.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn {
namespace {

// Made when the program starts, since memory for it would be wanted when there is none. Copies share its text.
const Error& no_memory() {
  static const Error error(ErrorCode::out_of_memory,
                           "out of memory: the system gives this process no more; free some, or raise its limit");
  return error;
}
// A program that can't have even this memory ends before it begins.
// NOLINTNEXTLINE(bugprone-throwing-static-initialization)
[[maybe_unused]] const Error& made_early = no_memory();

// The body's result; what it throws leaves as Error.
template <class Body>
auto throwing_errors(Body&& body) {
  try {
    try {
      return body();
    } catch (const Error&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw no_memory();
    } catch (const std::length_error&) {  // of a container larger than any memory
      throw no_memory();
    } catch (const std::exception& error) {
      throw Error(ErrorCode::internal, fmt::format("{}: unexpected; please report it", error.what()));
    }
  } catch (const std::bad_alloc&) {  // for a message
    throw no_memory();
  }
}

int resolve_threads(int threads) {
  if (threads < 0 || threads > max_threads)
    throw Error(ErrorCode::invalid_argument,
                fmt::format("threads {}: outside 0 .. {}; 0 takes one for each processor", threads, max_threads));
  return threads == 0 ? std::min(available_processors(), max_threads) : threads;
}

// Leaves out what the plan's permutation doesn't take.
std::pair<Inputs, Outputs> taken_by(const Options& options, Inputs inputs, Outputs outputs) {
  if (options.permutation != Permutation::learned) inputs.order_weights = {};
  if (options.permutation != Permutation::arrival) outputs.order = {};
  return {inputs, outputs};
}

void check_and_clear(const Plan& plan, const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace,
                     Stats* stats, Trace* trace) {
  const Geometry geometry{.shape = plan.shape(), .block = plan.options().block, .segment = plan.options().segment};
  // What isn't valid is forgotten by every run, one that is refused or uses no cache too.
  if (SegmentCache* const cache = outputs.cache.cache; cache != nullptr)
    detail::CacheAccess::tokens(*cache) = std::clamp<std::int64_t>(outputs.cache.valid, 0, cache->tokens());
  validate(inputs, outputs, plan.shape());
  validate_order(inputs, outputs, plan.options().permutation, geometry);
  if (workspace.size() < plan.workspace_size())
    throw Error(ErrorCode::out_of_memory, fmt::format("workspace of {} bytes: this plan needs {}; allocate "
                                                      "plan.workspace_size() or plan under a cap",
                                                      workspace.size(), plan.workspace_size()));
  refuse_overlaps(inputs, outputs, workspace.first(plan.workspace_size()), geometry);
  if (stats != nullptr) *stats = {};
  if (trace != nullptr) *trace = {};
}

// Returns what a plan computes whose window hides keys: that window, and nothing that chooses among its blocks.
Options window_alone(const Options& options) {
  return {.precision = options.precision,
          .block = options.block,
          .segment = options.segment,
          .scale = options.scale,
          .softcap = options.softcap,
          .window = options.window};
}

// `heads` is empty, or has the options of each query head, the first of which are `options`.
std::unique_ptr<detail::Executor> make_executor(const Options& options, std::span<const Options> heads,
                                                const Shape& shape, const Device& device, std::size_t workspace_cap) {
  detail::PlanSpec spec{
      .options = options,
      .heads = {heads.begin(), heads.end()},
      .geometry = {.shape = shape, .block = options.block, .segment = options.segment, .window = options.window},
      .threads = resolve_threads(device.threads),
      .device_index = device.index,
      .workspace_cap = workspace_cap};
  if (spec.geometry.windowed()) {
    spec.options = window_alone(options);
    spec.heads.clear();
  }
  const float scale = options.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(shape.head_dim)) : options.scale;
  spec.options.scale = scale;
  for (Options& head : spec.heads) head.scale = scale;
  switch (device.kind) {
    case Device::Kind::cpu: return cpu::make_executor(spec);
    case Device::Kind::reference: return reference::make_executor(spec);
    case Device::Kind::cuda:
#ifdef PBSATTN_CUDA
      return cuda::make_executor(spec);
#else
      throw Error(
          ErrorCode::unsupported,
          "device cuda: this build has no CUDA backend; configure with -DPBSATTN_CUDA=ON, or use Device::cpu()");
#endif
  }
  throw Error(ErrorCode::invalid_argument,
              fmt::format("device kind {}: no such device; 0 is the CPU, 1 the reference, 2 CUDA",
                          static_cast<int>(device.kind)));
}

}  // namespace

std::string_view version() {
  return PBSATTN_VERSION;
}

Plan::Plan(std::unique_ptr<detail::Executor> executor) : executor_(std::move(executor)) {}
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;
Plan::~Plan() = default;

Plan Plan::create(const Options& options, const Shape& shape, const Device& device, std::size_t workspace_cap) {
  return throwing_errors([&] {
    validate(options);
    validate(shape);
    return Plan(make_executor(options, {}, shape, device, workspace_cap));
  });
}

Plan Plan::create(std::span<const Options> heads, const Shape& shape, const Device& device, std::size_t workspace_cap) {
  return throwing_errors([&] {
    validate(shape);
    validate(heads, shape);
    return Plan(make_executor(heads.front(), heads, shape, device, workspace_cap));
  });
}
const Options& Plan::options() const noexcept {
  return executor_->spec.options;
}
const Shape& Plan::shape() const noexcept {
  return executor_->spec.geometry.shape;
}
std::size_t Plan::workspace_size() const noexcept {
  return executor_->workspace_size();
}
std::string_view Plan::path() const noexcept {
  return executor_->path();
}
std::size_t Plan::cache_size(std::int64_t tokens) const {
  return throwing_errors([&] {
    validate_cache_tokens(tokens);
    return executor_->cache_size(tokens);
  });
}

void Plan::run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
               Trace* trace) const {
  throwing_errors([&] {
    const auto [in, out] = taken_by(options(), inputs, outputs);
    check_and_clear(*this, in, out, workspace, stats, trace);
    executor_->run(in, out, workspace, stats, trace);
  });
}

void Plan::run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stream stream,
               Stats* stats, Trace* trace) const {
  throwing_errors([&] {
    const auto [in, out] = taken_by(options(), inputs, outputs);
    check_and_clear(*this, in, out, workspace, stats, trace);
    executor_->run_on(stream, in, out, workspace, stats, trace);
  });
}

}  // namespace pbsattn
