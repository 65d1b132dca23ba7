// A server's cache, which holds the keys and values of a problem in pages.
#pragma once

#include <cstdint>
#include <ostream>
#include <span>
#include <vector>

#include "support/problem.h"

namespace pbsattn::test {

struct CacheLayout {
  std::int64_t page_size = 16;
  bool heads_first = false;  // [page][head][place] (HND), not [page][place][head] (NHD)
  bool one_row = false;      // a key and its value lie in one row, as far as they are of one dtype
  std::int64_t gap = 0;      // elements between pages
};
void PrintTo(const CacheLayout& layout, std::ostream* stream);

// Pages of all batch entries lie in random order, with others between them. What holds no token of the problem is NaN.
class PagedCache {
 public:
  PagedCache(const Problem& problem, const CacheLayout& layout);

  // Returns the problem's inputs, with keys and values from the cache.
  Inputs inputs(const Problem& problem) const;
  // Returns the memory that k and v view.
  std::span<const std::byte> memory() const { return memory_; }

  std::vector<std::int32_t> table;  // [batch][pages of an entry]
  Pages pages;                      // whose table is that
  ConstView k, v;

 private:
  std::vector<std::byte> memory_;
};

}  // namespace pbsattn::test
