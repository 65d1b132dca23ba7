// The CPU backend's Plan: checks what only it refuses, and runs the stages pass by pass.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "core/fallback.h"
#include "core/stopwatch.h"
#include "core/validation/validate.h"
#include "cpu/attend/attend.h"
#include "cpu/cache.h"
#include "cpu/permute/permute.h"
#include "cpu/select/select.h"

namespace pbsattn::cpu {
namespace {

// From ./dev bench cpu at 8K tokens, where permute and select took 5 to 8 % of full attention: 64 blocks a head, 2080
// pairs. Two-step scores of keys that no query orders took 4.1 % there and 2.0 % at 32K, at head_dim 64
// (results/log/cpu-select.md); of keys in pbs order 7.4 %. Whole prompts don't tell a row's price from a key block's;
// chunks do: keys that stay where they are are packed for full attention too, and their means are cheap.
CostModel cost_model_of(const Options& options) {
  if (options.score != BlockScore::two_step) return {.key_block = 2.5};
  if (options.permutation == Permutation::none) return {.key_block = .04, .row = .86, .pair = .013};
  return {.key_block = options.permutation == Permutation::learned ? .9 : 2.5, .pair = .013};
}

class CpuExecutor final : public detail::Executor {
 public:
  explicit CpuExecutor(const detail::PlanSpec& plan_spec)
      : Executor(plan_spec),
        automatic_(&choose(kernels_for(spec.options.precision == Precision::bf16 ? Precision::bf16 : Precision::f32))),
        for_bf16_(spec.options.precision == Precision::automatic ? kernels_for(Precision::bf16)
                                                                 : KernelList{automatic_}),
        f32_(&f32_path()),
        extent_(choose_extent(spec, paths())),
        workspace_size_(workspace_bytes(spec, paths(), extent_)) {}

  std::size_t workspace_size() const noexcept override { return workspace_size_; }
  std::string_view path() const noexcept override { return automatic_->name; }
  std::size_t cache_size(std::int64_t tokens) const override { return cache_bytes(spec, paths(), tokens); }

  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats,
           Trace* trace) const override {
    const Geometry& g = spec.geometry;
    validate_contents(inputs, outputs, g);
    const bool bf16 = inputs.q.dtype == DType::bf16 && inputs.k.dtype == DType::bf16 && inputs.v.dtype == DType::bf16;
    const Kernels& kernels = bf16 ? bf16_path() : *automatic_;
    Stats total;
    if (trace != nullptr) *trace = detail::start_trace(g);
    Layout layout(spec, kernels, extent_, workspace.data());
    const CacheRun cache(spec, kernels, layout, inputs, outputs);
    for (std::int64_t batch = 0; batch < g.shape.batch; ++batch) {
      for (std::int64_t head = 0; head < g.shape.q_heads;) {
        const Heads heads = heads_at(batch, head);
        cache.enter(heads, layout);
        const StageContext context{spec, kernels, *f32_, inputs, outputs, heads, layout};
        Stopwatch watch;
        permute(context);
        total.permute_seconds += watch.lap();
        select(context);
        total.select_seconds += watch.lap();
        total.visited_blocks += attend(context);
        total.attend_seconds += watch.lap();
        if (trace != nullptr) extend_trace(context, *trace);
        head += heads.q_count;
      }
    }
    cache.finish();
    total.causal_blocks = g.shape.batch * g.shape.q_heads * g.causal_blocks_per_head();
    if (stats != nullptr) *stats = total;
  }

 private:
  KernelList kernels_for(Precision products) const {
    KernelList list = candidates(products);
    if (list.front()->attend_rows == nullptr || takes_rows(*list.front())) return list;
    for (const Kernels* other : runnable_kernels())
      if (other->products == list.front()->products && other->attend_rows == nullptr) return {other};
    return {&f32_path()};
  }

  // Tells whether such a path can do the plan. A correction begins a row's softmax, capped logits are of a block's
  // products, and a window hides keys of other blocks than the last, so they take a path that attends block by block;
  // and these pack rows of keys and values to one length.
  bool takes_rows(const Kernels& kernels) const {
    const Options& options = spec.options;
    const Shape& shape = spec.geometry.shape;
    return options.correction == Correction::none && options.softcap == 0 && !spec.geometry.windowed() &&
           kernels.packed_head_dim(shape.head_dim) == kernels.packed_head_dim(value_dim(shape));
  }

  static const Kernels& f32_path() {
    const Kernels& first = *candidates(Precision::f32).front();
    if (first.products == Precision::f32) return first;
    const KernelList list = runnable_kernels();
    return **std::ranges::find(list, Precision::f32, &Kernels::products);
  }

  // Returns the path of inputs that are all bf16: chosen by the first run that has them, which is known only then, and
  // kept.
  const Kernels& bf16_path() const {
    const Kernels* chosen = bf16_.load();
    if (chosen == nullptr) {
      const Kernels* const found = &choose(for_bf16_);
      chosen = bf16_.compare_exchange_strong(chosen, found) ? found : chosen;
    }
    return *chosen;
  }

  // Returns the heads of the pass that starts at a query head: as many whole groups as a pass takes, or a group's next
  // part.
  Heads heads_at(std::int64_t batch, std::int64_t head) const {
    const Geometry& g = spec.geometry;
    const std::int64_t kv_begin = g.kv_head(head);
    const std::int64_t kv_end = std::min(g.shape.kv_heads, kv_begin + extent_.kv_heads);
    const std::int64_t q_end = std::min(kv_end * g.group(), head + extent_.q_heads);
    return {batch, head, q_end - head, kv_begin, kv_end - kv_begin};
  }

  static void extend_trace(const StageContext& c, Trace& trace) {
    const Geometry& g = c.geometry();
    for (std::int64_t head = 0; head < c.heads.q_count; ++head) {
      const std::int64_t moved = c.layout.permuted ? g.permuted_len() : 0;
      const std::int32_t* const order = moved == 0 ? nullptr : c.order(head, 0);
      trace.order.insert(trace.order.end(), order, order + moved);
      for (std::int64_t token = moved; token < g.shape.kv_len; ++token)
        trace.order.push_back(static_cast<std::int32_t>(token));
      for (std::int64_t row = 0; row < g.rows(); ++row) {
        c.for_each_block(head, row, [&](std::int32_t block) { trace.block.push_back(block); });
        trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
      }
    }
  }

  // Returns the paths of which a run's inputs choose one.
  KernelList paths() const {
    KernelList list = for_bf16_;
    list.push_back(automatic_);
    return list;
  }

  const Kernels* automatic_;
  KernelList for_bf16_;
  mutable std::atomic<const Kernels*> bf16_ = nullptr;
  const Kernels* f32_;
  Extent extent_;
  std::size_t workspace_size_;
};

}  // namespace

std::unique_ptr<detail::Executor> make_executor(const detail::PlanSpec& spec) {
  const auto refuse = [](const std::string& message) { throw Error(ErrorCode::unsupported, message); };
  const auto check_dim = [&](const char* name, std::int64_t dim) {
    if (dim % row_tile != 0 || dim > max_head_dim)
      refuse(fmt::format("{} {}: the CPU backend takes multiples of {} up to {}; pad, or use Device::reference()", name,
                         dim, row_tile, max_head_dim));
  };
  check_dim("head_dim", spec.geometry.shape.head_dim);
  check_dim("head_dim_v", value_dim(spec.geometry.shape));
  if (spec.options.block % strip != 0 || spec.options.block > max_block)
    refuse(fmt::format("block {}: the CPU backend takes multiples of {} up to {}; use 128, or Device::reference()",
                       spec.options.block, strip, max_block));
  return std::make_unique<CpuExecutor>(with_fallback_resolved(spec, cost_model_of(spec.options)));
}

}  // namespace pbsattn::cpu
