#include "core/validation/validate.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/executor.h"
#include "core/validation/overlap.h"
#include "pbsattn/options.hpp"

namespace pbsattn {
namespace {

template <class... Args>
void require(bool holds, fmt::format_string<Args...> message, Args&&... args) {
  if (!holds) throw Error(ErrorCode::invalid_argument, fmt::format(message, std::forward<Args>(args)...));
}

template <class Enum>
void require_enum(Enum value, std::string_view name) {
  require(!name_of(value).empty(), "{} {}: no such value; the last one is {}", name, static_cast<int>(value),
          Names<Enum>::values.size() - 1);
}

template <class V>
void validate_view(const V& view, const char* name, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
                   std::int64_t length, const char* length_name = nullptr) {
  require(view.data != nullptr, "{}: null pointer; pass {} x {} x {} x {} elements", name, batch, heads, tokens,
          length);
  require(view.dtype <= DType::bf16, "dtype {}: no such value; the last one is {}", static_cast<int>(view.dtype),
          static_cast<int>(DType::bf16));
  require(reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) == 0,
          "{}: pointer not aligned to its element of {} bytes; pass an aligned tensor", name, size_of(view.dtype));
  // Axes of one element may have any stride. Inputs may repeat (stride 0); outputs may not overlap.
  const auto check = [&](std::int64_t extent, std::int64_t stride, const char* axis) {
    if (extent <= 1) return;
    require(stride >= 0, "{}: {} stride {} is negative; pass a tensor that runs forward", name, axis, stride);
    require(stride <= max_reach / static_cast<std::int64_t>(size_of(view.dtype)) / (extent - 1),
            "{}: {} stride {} reaches beyond any memory over {} of them; strides count elements", name, axis, stride,
            extent);
    require(length_name == nullptr || stride >= length, "{}: {} stride {} is under {} {}, so elements would overlap",
            name, axis, stride, length_name, length);
  };
  check(tokens, view.token_stride, "token");
  check(heads, view.head_stride, "head");
  check(batch, view.batch_stride, "batch");
}

template <class V>
Region region_of(const V& view, std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t head_dim) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  const auto axis = [&](std::int64_t extent, std::int64_t stride) {
    return Region::Axis{.stride = extent > 1 ? stride * size : 0, .extent = extent};
  };
  return {.begin = reinterpret_cast<std::uintptr_t>(view.data),
          .row_bytes = head_dim * size,
          .axes = {axis(batch, view.batch_stride), axis(heads, view.head_stride), axis(tokens, view.token_stride)}};
}

// Counts what views of k and v hold: batch entries of tokens, or pages of places.
struct KvExtents {
  std::int64_t parts, tokens;
};
KvExtents kv_extents(const Pages& pages, const Shape& s) {
  return pages.table == nullptr ? KvExtents{s.batch, s.kv_len} : KvExtents{pages.count, pages.size};
}

// A page table's entries as elements of rows, one of each batch entry.
ConstView view_of(const Pages& pages) {
  static_assert(sizeof *pages.table == sizeof(float));
  return {.data = pages.table, .dtype = DType::f32, .batch_stride = pages.batch_stride};
}

void validate_pages(const Pages& pages, const Shape& s) {
  if (pages.table == nullptr && pages.size == 0) return;
  require(pages.size > 0 && pages.size <= max_kv_len && pages.size % page_step == 0,
          "pages: size {}: no multiple of {} from {} to {}; give the tokens of a page, or 0 and no table for keys that "
          "lie contiguous",
          pages.size, page_step, page_step, max_kv_len);
  validate_view(view_of(pages), "page table", s.batch, 1, 1, ceil_div(s.kv_len, pages.size));
  require(pages.count > 0 && pages.count <= std::numeric_limits<std::int32_t>::max(),
          "pages: count {}: outside 1 .. {}; give how many pages k and v hold", pages.count,
          std::numeric_limits<std::int32_t>::max());
}

// An order's numbers as elements of rows, one of each KV head.
View view_of(const KeyOrder& order) {
  static_assert(sizeof *order.data == sizeof(float));
  return {.data = order.data,
          .dtype = DType::f32,
          .batch_stride = order.batch_stride,
          .head_stride = order.head_stride,
          .token_stride = 0};
}

Region region_of(const void* data, std::int64_t bytes) {
  return {.begin = reinterpret_cast<std::uintptr_t>(data), .row_bytes = std::min(bytes, max_reach)};
}

}  // namespace

std::size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

void validate(const Options& options) {
  visit_options(options, [](std::string_view name, auto field) {
    if constexpr (std::is_enum_v<decltype(field)>) require_enum(field, name);
  });
  require(options.top_p > 0.0F && options.top_p <= 1.0F,
          "top_p {}: outside (0, 1]; 1 keeps every block, 0.9 is the paper's setting", options.top_p);
  require(options.threshold >= 0.0F && options.threshold <= 1.0F,
          "threshold {}: outside [0, 1]; it is a share of a row's attention, 0 keeps every block", options.threshold);
  require(options.floor_top_p >= 0.0F && options.floor_top_p <= 1.0F,
          "floor_top_p {}: outside [0, 1]; 0 turns the floor off", options.floor_top_p);
  require(options.top_k >= 0, "top_k {}: negative; it is a number of blocks", options.top_k);
  require(options.density >= 0.0F && options.density <= 1.0F,
          "density {}: outside [0, 1]; it is a share of a row's causal blocks", options.density);
  require(options.vertical >= 0, "vertical {}: negative; it is a number of columns", options.vertical);
  require(options.slash >= 0, "slash {}: negative; it is a number of diagonals", options.slash);
  require(options.tau >= 0.0F && options.tau <= 1.0F,
          "tau {}: outside [0, 1]; it is a distance of two distributions, 0.1 is FlexPrefill's setting", options.tau);
  require(options.min_budget >= 0, "min_budget {}: negative; it is a number of tokens", options.min_budget);
  require(options.sink_blocks >= 0, "sink_blocks {}: negative; 0 turns them off", options.sink_blocks);
  require(options.local_blocks >= 0, "local_blocks {}: negative; 0 turns them off", options.local_blocks);
  require(options.block >= 1, "block {}: not positive; the paper's setting is 128", options.block);
  require(options.segment >= options.block && options.segment % options.block == 0,
          "segment {}: no multiple of the block of {}; try {}", options.segment, options.block, 2LL * options.block);
  require(options.segment <= max_kv_len,
          "segment {}: over {}, the longest sequence; one as long as the sequence already keeps every block",
          options.segment, max_kv_len);
  require(options.dense_last_rows >= 0, "dense_last_rows {}: negative; 0 turns it off", options.dense_last_rows);
  require(std::isfinite(options.scale) && options.scale >= 0.0F,
          "scale {}: not a finite, non-negative number; 0 stands for 1/sqrt(head_dim)", options.scale);
  require(options.expected_density >= 0.0F && options.expected_density <= 1.0F,
          "expected_density {}: outside [0, 1]; 0 stands for what the paper measured", options.expected_density);
  require(std::isfinite(options.softcap) && options.softcap >= 0.0F,
          "softcap {}: not a finite, positive number; 0 stands for none", options.softcap);
  static_assert(Options{}.window == max_kv_len, "the default hides none");
  require(options.window >= 1,
          "window {}: not positive; it is a number of tokens, the query's own among them, and {} hides none",
          options.window, max_kv_len);
  require((options.score != BlockScore::antidiagonal && options.score != BlockScore::antidiagonal_causal) ||
              options.block % 8 == 0,
          "block {}: an antidiagonal score takes multiples of 8, the side of its patches; use 128", options.block);
  require(std::isfinite(options.threshold_tokens) && options.threshold_tokens >= 0.0F,
          "threshold_tokens {}: not a finite, non-negative number of tokens; 0 turns it off", options.threshold_tokens);
  const auto require_positive = [](int value, const char* name, int usual) {
    require(value >= 1, "{} {}: not positive; {} is usual", name, value, usual);
  };
  require_positive(options.two_step_queries, "two_step_queries", 16);
  require_positive(options.two_step_exact, "two_step_exact", 4);
  require_positive(options.two_step_reach, "two_step_reach", 4);
  require((options.permutation != Permutation::learned && options.permutation != Permutation::arrival) ||
              options.order_scope == OrderScope::kv_head,
          "order_scope {} with permutation {}: it has one order per KV head; set order_scope to kv_head",
          name_of(options.order_scope), name_of(options.permutation));
  if (options.keep == KeepRule::all || options.keep == KeepRule::none) return;
  require(options.score != BlockScore::none,
          "keep rule {} has no score to read; set score to mean_pool or per_query, or keep to all",
          name_of(options.keep));
  const auto belong_together = [&](BlockScore score, KeepRule keep) {
    require((options.score == score) == (options.keep == keep),
            "score {} with keep rule {}: {} goes with {} alone; set both, or neither", name_of(options.score),
            name_of(options.keep), name_of(score), name_of(keep));
    require(options.score != score || options.permutation == Permutation::none,
            "score {} with permutation {}: it scores distances, which moved keys don't keep; set permutation to none",
            name_of(options.score), name_of(options.permutation));
  };
  belong_together(BlockScore::vertical_slash, KeepRule::vertical_slash);
  belong_together(BlockScore::flexible, KeepRule::coverage);
  require(options.score != BlockScore::two_step || options.keep == KeepRule::threshold,
          "score two_step with keep rule {}: its second step goes by the threshold; set keep to threshold",
          name_of(options.keep));
}

void validate(const Shape& s) {
  require(s.batch >= 1 && s.batch <= max_heads, "batch {}: outside 1 .. {}", s.batch, max_heads);
  require(s.q_heads >= 1 && s.q_heads <= max_heads, "q_heads {}: outside 1 .. {}", s.q_heads, max_heads);
  require(s.kv_heads >= 1 && s.kv_heads <= s.q_heads && s.q_heads % s.kv_heads == 0,
          "kv_heads {}: must divide q_heads {}; each KV head serves the same number of query heads", s.kv_heads,
          s.q_heads);
  require(s.kv_len >= 1 && s.kv_len <= max_kv_len, "kv_len {}: outside 1 .. {}", s.kv_len, max_kv_len);
  require(s.q_len >= 1 && s.q_len <= s.kv_len,
          "q_len {}: outside 1 .. kv_len {}; the queries are the last q_len of kv_len tokens", s.q_len, s.kv_len);
  require(s.head_dim >= 1 && s.head_dim <= max_heads, "head_dim {}: outside 1 .. {}", s.head_dim, max_heads);
  require(s.head_dim_v >= 0 && s.head_dim_v <= max_heads, "head_dim_v {}: outside 0 .. {}; 0 stands for head_dim",
          s.head_dim_v, max_heads);
}

void validate(std::span<const Options> heads, const Shape& shape) {
  require(static_cast<std::int64_t>(heads.size()) == shape.q_heads,
          "options of {} heads: q_heads is {}; give those of each query head", heads.size(), shape.q_heads);
  std::vector<std::string_view> by_head;
  visit_option_rows([&](const OptionInfo& info) {
    if (info.by_head) by_head.push_back(info.name);
  });
  const auto shared_values = [](const Options& options) {
    std::vector<std::pair<std::string_view, double>> values;
    visit_option_rows(
        [&](const OptionInfo& info, auto field) {
          if (!info.by_head) values.emplace_back(info.name, static_cast<double>(field));
        },
        options);
    return values;
  };
  const auto first = shared_values(heads.front());
  for (std::size_t h = 0; h < heads.size(); ++h) {
    validate(heads[h]);
    const auto own = shared_values(heads[h]);
    for (std::size_t i = 0; i < own.size(); ++i)
      require(own[i].second == first[i].second, "{} of head {} is not head 0's; heads may differ in {}", own[i].first,
              h, fmt::join(by_head, ", "));
  }
}

void validate(const Inputs& inputs, const Outputs& outputs, const Shape& s) {
  validate_view(inputs.q, "q", s.batch, s.q_heads, s.q_len, s.head_dim);
  validate_pages(inputs.pages, s);
  const auto [parts, tokens] = kv_extents(inputs.pages, s);
  validate_view(inputs.k, "k", parts, s.kv_heads, tokens, s.head_dim);
  validate_view(inputs.v, "v", parts, s.kv_heads, tokens, value_dim(s));
  validate_view(outputs.out, "out", s.batch, s.q_heads, s.q_len, value_dim(s), "head_dim_v");
  require(inputs.sinks.empty() || std::ssize(inputs.sinks) == s.q_heads,
          "sinks of {} heads: q_heads is {}; give the logit of each query head, or none", inputs.sinks.size(),
          s.q_heads);
  require(inputs.sinks.empty() || inputs.sinks.data() != nullptr,
          "sinks: null pointer; give the logit of each query head, or none");
  require(reinterpret_cast<std::uintptr_t>(inputs.sinks.data()) % sizeof(float) == 0,
          "sinks: pointer not aligned to its element of {} bytes; pass an aligned array", sizeof(float));
  require(reinterpret_cast<std::uintptr_t>(outputs.lse) % sizeof(float) == 0,
          "lse: pointer not aligned to its element of {} bytes; pass an aligned array", sizeof(float));
  const auto& [cache, valid] = outputs.cache;
  require(valid >= 0 && valid <= (cache == nullptr ? 0 : s.kv_len),
          "cache: {} valid tokens: outside 0 .. {}; give how many of the first it has seen, or 0", valid,
          cache == nullptr ? 0 : s.kv_len);
}

void validate_cache_tokens(std::int64_t tokens) {
  require(tokens >= 0 && tokens <= max_kv_len, "cache of {} tokens: outside 0 .. {}; give the longest kv_len", tokens,
          max_kv_len);
}

void validate_order(const Inputs& inputs, const Outputs& outputs, Permutation permutation, const Geometry& g) {
  const Shape& s = g.shape;
  const std::int64_t tokens = g.permuted_len();
  if (permutation == Permutation::learned) {
    const auto& [values, pairs] = inputs.order_weights;
    const std::int64_t features = s.head_dim / 2 + s.head_dim;
    require(
        static_cast<std::int64_t>(values.size()) == s.kv_heads * features,
        "order_weights of {} numbers: permutation learned takes {} x {}, for each KV head head_dim / 2 and head_dim; "
        "give those, or set permutation to last_queries",
        values.size(), s.kv_heads, features);
    require(reinterpret_cast<std::uintptr_t>(values.data()) % sizeof(float) == 0,
            "order_weights: pointer not aligned to its element of {} bytes; pass an aligned array", sizeof(float));
    require(pairs <= RopePairs::neighbours, "order_weights: pairs {}: no such value; 0 is halves, 1 neighbours",
            static_cast<int>(pairs));
  }
  if (permutation != Permutation::arrival) return;
  const KeyOrder& order = outputs.order;
  require(order.known >= 0 && order.known <= tokens && order.known % g.segment == 0,
          "order: known {} tokens: no multiple of the segment of {} up to {}, the tokens of complete segments",
          order.known, g.segment, tokens);
  require(order.data != nullptr || order.known == 0,
          "order: null pointer with {} known tokens; pass the order that earlier calls wrote, or 0 tokens",
          order.known);
  if (order.data != nullptr && tokens > 0)
    validate_view(view_of(order), "order", s.batch, s.kv_heads, 1, tokens, "its length");
}

void validate_contents(const Inputs& inputs, const Outputs& outputs, const Geometry& g) {
  const Pages& pages = inputs.pages;
  const std::int64_t entries = pages.table == nullptr ? 0 : ceil_div(g.shape.kv_len, pages.size);
  for (std::int64_t batch = 0; batch < g.shape.batch; ++batch)
    for (std::int64_t i = 0; i < entries; ++i) {
      const std::int32_t page = pages.table[batch * pages.batch_stride + i];
      require(
          page >= 0 && page < pages.count,
          "page table: page {} at entry {} of batch entry {}: k and v have pages 0 to {}; give a page of theirs for "
          "every {} tokens",
          page, i, batch, pages.count - 1, pages.size);
    }
  for (const float weight : inputs.order_weights.values)
    require(std::isfinite(weight), "order_weights: {} among them; all are finite numbers, 0 leaves a feature out",
            weight);
  const KeyOrder& order = outputs.order;
  std::vector<bool> seen(order.known == 0 ? 0 : static_cast<std::size_t>(g.segment));
  for (std::int64_t head = 0; order.known > 0 && head < g.shape.batch * g.shape.kv_heads; ++head) {
    const std::int32_t* const tokens =
        order.data + head / g.shape.kv_heads * order.batch_stride + head % g.shape.kv_heads * order.head_stride;
    for (std::int64_t begin = 0; begin < order.known; begin += g.segment) {
      seen.assign(seen.size(), false);
      for (std::int64_t slot = begin; slot < begin + g.segment; ++slot) {
        const std::int64_t place = tokens[slot] - begin;
        require(place >= 0 && place < g.segment && !seen[place],
                "order: token {} at slot {} of batch entry {}, KV head {}: each token of its segment, {} to {}, "
                "stands there once; pass what a run wrote",
                tokens[slot], slot, head / g.shape.kv_heads, head % g.shape.kv_heads, begin, begin + g.segment - 1);
        seen[place] = true;
      }
    }
  }
}

void refuse_overlaps(const Inputs& inputs, const Outputs& outputs, std::span<const std::byte> workspace,
                     const Geometry& geometry) {
  const Shape& s = geometry.shape;
  struct Named {
    const char* name;
    Region region;
  };
  const View& out = outputs.out;
  const Region out_region = region_of(out, s.batch, s.q_heads, s.q_len, value_dim(s));
  require(
      !overlaps_itself(out_region),
      "out: strides {}, {} and {} of batch, head and token put rows of head_dim_v {} over each other; pass a tensor "
      "whose elements have memory of their own",
      out.batch_stride, out.head_stride, out.token_stride, value_dim(s));
  // Rows that lie apart are so few that this doesn't overflow.
  const std::int64_t lse_bytes =
      outputs.lse == nullptr ? 0 : s.batch * s.q_heads * s.q_len * static_cast<std::int64_t>(sizeof(float));
  const auto workspace_bytes =
      static_cast<std::int64_t>(std::min(workspace.size(), static_cast<std::size_t>(max_reach)));
  const Region order_region = outputs.order.data == nullptr
                                  ? Region{}
                                  : region_of(view_of(outputs.order), s.batch, s.kv_heads, 1, geometry.permuted_len());
  require(
      !overlaps_itself(order_region),
      "order: strides {} and {} of batch and head put orders of {} tokens over each other; give each KV head its own",
      outputs.order.batch_stride, outputs.order.head_stride, geometry.permuted_len());
  const auto [parts, tokens] = kv_extents(inputs.pages, s);
  const Region k_region = region_of(inputs.k, parts, s.kv_heads, tokens, s.head_dim);
  const Region v_region = region_of(inputs.v, parts, s.kv_heads, tokens, value_dim(s));
  Region table_region;
  if (const Pages& pages = inputs.pages; pages.table != nullptr) {
    const auto require_apart = [](const char* name, const ConstView& view, const Region& region) {
      require(
          !overlaps_itself(region),
          "{}: strides {}, {} and {} of page, head and place put rows over each other; pass the cache's, the one from "
          "page to page as batch_stride",
          name, view.batch_stride, view.head_stride, view.token_stride);
    };
    require_apart("k", inputs.k, k_region);
    require_apart("v", inputs.v, v_region);
    table_region = region_of(view_of(pages), s.batch, 1, 1, ceil_div(s.kv_len, pages.size));
  }
  const std::span<const std::byte> cache =
      outputs.cache.cache == nullptr ? std::span<std::byte>() : detail::CacheAccess::memory(*outputs.cache.cache);
  const auto cache_bytes = static_cast<std::int64_t>(std::min(cache.size(), static_cast<std::size_t>(max_reach)));
  const auto weight_bytes = static_cast<std::int64_t>(inputs.order_weights.values.size_bytes());
  const std::array<Named, 11> all{{{"out", out_region},
                                   {"lse", region_of(outputs.lse, lse_bytes)},
                                   {"order", order_region},
                                   {"workspace", region_of(workspace.data(), workspace_bytes)},
                                   {"cache", region_of(cache.data(), cache_bytes)},
                                   {"q", region_of(inputs.q, s.batch, s.q_heads, s.q_len, s.head_dim)},
                                   {"k", k_region},
                                   {"v", v_region},
                                   {"page table", table_region},
                                   {"sinks", region_of(inputs.sinks.data(), std::ssize(std::as_bytes(inputs.sinks)))},
                                   {"order_weights", region_of(inputs.order_weights.values.data(), weight_bytes)}}};
  constexpr std::size_t written = 5;
  for (std::size_t i = 0; i < written; ++i)
    for (std::size_t other = i + 1; other < all.size(); ++other)
      require(!overlap(all[i].region, all[other].region),
              "{}: at {:#x}, over {} at {:#x}; a run writes {} while it needs {}, so pass memory that they don't share",
              all[i].name, all[i].region.begin, all[other].name, all[other].region.begin, all[i].name, all[other].name);
}

}  // namespace pbsattn
