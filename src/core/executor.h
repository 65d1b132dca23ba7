// The contract between Plan and a backend.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/geometry.h"
#include "pbsattn/pbsattn.hpp"

namespace pbsattn::detail {

// What a backend is made from: checked, with defaults resolved.
struct PlanSpec {
  Options options;
  // Of each query head, where they differ: in keep and its numbers, and in what is always kept.
  std::vector<Options> heads = {};
  Geometry geometry;
  int threads = 1;
  int device_index = 0;
  std::size_t workspace_cap = Plan::no_cap;

  // Those of all heads, or of each.
  std::span<const Options> option_sets() const { return heads.empty() ? std::span(&options, 1) : std::span(heads); }
  const Options& options_of(std::int64_t q_head) const {
    return heads.empty() ? options : heads[static_cast<std::size_t>(q_head)];
  }
};

// A trace that heads' orders and lists are appended to.
inline Trace start_trace(const Geometry& geometry) {
  return {.first_row = geometry.first_row(),
          .rows = geometry.rows(),
          .blocks = geometry.blocks(),
          .order = {},
          .row_start = {0},
          .block = {}};
}

// A SegmentCache's inside, for backends.
struct CacheAccess {
  static std::span<std::byte> memory(const SegmentCache& cache) { return cache.memory_; }
  static std::array<std::int64_t, 16>& made_by(SegmentCache& cache) { return cache.made_by_; }
  static std::int64_t& tokens(SegmentCache& cache) { return cache.tokens_; }
};

// One backend's stages behind one call. run() receives checked views and a workspace of at least
// workspace_size() bytes at any alignment, and fills stats and trace when they are not null.
class Executor {
 public:
  explicit Executor(const PlanSpec& plan_spec) : spec(plan_spec) {}
  virtual ~Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  virtual std::size_t workspace_size() const noexcept = 0;
  virtual std::string_view path() const noexcept = 0;
  // The bytes of a SegmentCache for so many tokens, 0 where runs use none.
  virtual std::size_t cache_size(std::int64_t /*tokens*/) const { return 0; }
  virtual void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
                   Trace* trace) const = 0;
  // The same on a stream. Devices that have streams override this.
  virtual void run_on(Stream stream, const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace,
                      Stats* stats, Trace* trace) const {
    if (stream.handle != nullptr)
      throw Error(ErrorCode::unsupported,
                  "stream: this plan's device has none; pass a null stream, or plan for Device::cuda()");
    run(inputs, outputs, workspace, stats, trace);
  }

  const PlanSpec spec;
};

}  // namespace pbsattn::detail

// Each backend's factory. Throws Error (unsupported, out_of_memory) for what only this backend refuses.
namespace pbsattn::cpu {
std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec);
}
namespace pbsattn::reference {
std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec);
}
namespace pbsattn::cuda {  // in builds with PBSATTN_CUDA
std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec);
}
