#include "support/cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "core/validation/validate.h"

namespace pbsattn::test {
namespace {

// Returns a view of pages at the beginning of memory; rows are `length` elements apart.
ConstView view_of_pages(DType dtype, const CacheLayout& layout, std::int64_t heads, std::int64_t length) {
  return {.data = nullptr,
          .dtype = dtype,
          .batch_stride = layout.page_size * heads * length + layout.gap,
          .head_stride = layout.heads_first ? layout.page_size * length : length,
          .token_stride = layout.heads_first ? length : heads * length};
}

// Copies a tensor's rows to their pages.
void copy_rows(const Tensor& tensor, const Pages& pages, const ConstView& view, std::byte* to) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  const ConstView from = tensor.view();
  for (std::int64_t b = 0; b < tensor.batch; ++b)
    for (std::int64_t h = 0; h < tensor.heads; ++h)
      for (std::int64_t t = 0; t < tensor.tokens; ++t) {
        const std::int64_t page = pages.table[b * pages.batch_stride + t / pages.size];
        const std::int64_t source = b * from.batch_stride + h * from.head_stride + t * from.token_stride;
        const std::int64_t target =
            page * view.batch_stride + h * view.head_stride + t % pages.size * view.token_stride;
        std::memcpy(to + target * size, static_cast<const std::byte*>(from.data) + source * size,
                    static_cast<std::size_t>(tensor.head_dim * size));
      }
}

}  // namespace

void PrintTo(const CacheLayout& layout, std::ostream* stream) {
  *stream << (layout.heads_first ? "HND" : "NHD") << ", pages of " << layout.page_size
          << (layout.one_row ? ", keys and values in one row" : "") << ", " << layout.gap << " elements between pages";
}

PagedCache::PagedCache(const Problem& problem, const CacheLayout& layout) {
  const Shape& s = problem.shape;
  const std::int64_t entries = ceil_div(s.kv_len, layout.page_size);
  constexpr std::int64_t others = 3;  // pages of nobody
  const std::int64_t count = s.batch * entries + others;
  table.resize(static_cast<std::size_t>(count));
  std::iota(table.begin(), table.end(), 0);
  std::ranges::shuffle(table, std::mt19937_64(static_cast<std::uint64_t>(layout.page_size)));
  table.resize(static_cast<std::size_t>(s.batch * entries));
  pages = {.table = table.data(), .batch_stride = entries, .size = layout.page_size, .count = count};

  const bool one_row = layout.one_row && problem.k.dtype == problem.v.dtype;
  const std::int64_t v_dim = value_dim(s);
  k = view_of_pages(problem.k.dtype, layout, s.kv_heads, s.head_dim + (one_row ? v_dim : 0));
  v = one_row ? k : view_of_pages(problem.v.dtype, layout, s.kv_heads, v_dim);
  const auto bytes = [&](const ConstView& view) {
    return static_cast<std::size_t>(count * view.batch_stride) * size_of(view.dtype);
  };
  constexpr std::byte nan_pattern{0xFF};  // NaN in all three dtypes
  constexpr std::size_t alignment = 64;
  const std::size_t values =
      one_row ? static_cast<std::size_t>(s.head_dim) * size_of(k.dtype) : (bytes(k) / alignment + 1) * alignment;
  memory_.assign(one_row ? bytes(k) : values + bytes(v), nan_pattern);
  copy_rows(problem.k, pages, k, memory_.data());
  copy_rows(problem.v, pages, v, memory_.data() + values);
  k.data = memory_.data();
  v.data = memory_.data() + values;
}

Inputs PagedCache::inputs(const Problem& problem) const {
  Inputs inputs = problem.inputs();
  inputs.k = k;
  inputs.v = v;
  inputs.pages = pages;
  return inputs;
}

}  // namespace pbsattn::test
