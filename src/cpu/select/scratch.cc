#include "cpu/select/scratch.h"

#include <algorithm>
#include <type_traits>

#include "cpu/workspace.h"

namespace pbsattn::cpu {

SelectScratch::SelectScratch(const detail::PlanSpec& spec, std::int64_t permuted_blocks, std::int64_t strip_bytes,
                             std::byte* memory) {
  const Geometry& g = spec.geometry;
  const Options& options = spec.options;
  const std::int64_t dim = g.shape.head_dim;
  const bool two_step = options.score == BlockScore::two_step;
  const bool light = options.score <= BlockScore::per_query;
  const bool plain = !light && !two_step;  // loops around keys that are packed for them
  const bool pattern = is_pattern(options.score);
  // Blocks before a row's own segment and those of it fill tiles of their own.
  const std::int64_t blocks = options.score == BlockScore::mean_pool ? permuted_blocks : g.blocks();
  const std::int64_t scored = (up_to_tile(blocks) + row_tile) * strip;
  const auto take = [&](auto*& pointer, std::int64_t count) {
    constexpr std::int64_t line = cache_line;
    if (memory != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + size);
    size += ceil_div(count * static_cast<std::int64_t>(sizeof *pointer), line) * line;
  };
  take(scores, scored);
  take(pooled_q, strip * dim);
  take(packed, strip * dim);
  take(sorted, blocks);
  take(weights, light ? blocks : two_step ? most_two_step_rows * blocks : 2 * blocks);
  take(sums, light ? 0 : scored);
  take(keys, !plain ? 0 : std::max(g.block, patch_tokens * row_tile) * dim);
  take(exps, !plain ? 0 : std::max(g.block, row_tile) * strip);
  take(patches, !plain ? 0 : std::max(patch_tokens * dim * strip, pattern ? scored : 0));
  take(index, light ? 0 : strip);
  take(columns, pattern ? g.shape.kv_len : 0);
  take(diagonals, pattern ? g.shape.kv_len : 0);
  take(ranked, pattern ? g.shape.kv_len + 1 : 0);
  take(bins, options.score == BlockScore::flexible ? cell_bins : 0);
  take(readers, two_step ? blocks : 0);
  take(exact, two_step ? strip_bytes : 0);
}

}  // namespace pbsattn::cpu
