#include "core/validation/overlap.h"

#include <algorithm>
#include <numeric>

namespace pbsattn {
namespace {

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a / b - (a % b != 0 && a < 0 ? 1 : 0);
}

// Sums of step * i with low <= i <= high, a term from each axis, and whether one lies in a range. Large steps go first:
// where each is larger than what the following reach together, as in tensors without overlap, few i are left to try.
class Sums {
 public:
  void add(std::int64_t step, std::int64_t low, std::int64_t high) {
    if (step == 0 || (low == 0 && high == 0)) return;
    Term* const place = std::find_if(begin(), end(), [&](const Term& term) { return term.step <= step; });
    // Two axes of one step are as good as a longer one.
    if (place != end() && place->step == step) {
      place->low += low;
      place->high += high;
      return;
    }
    std::move_backward(place, end(), end() + 1);
    *place = {.step = step, .low = low, .high = high};
    ++count_;
  }

  bool reach(std::int64_t from, std::int64_t to) {
    for (std::size_t i = count_; i-- > 0;) {
      Term& term = terms_[i];
      const Term rest = i + 1 < count_ ? terms_[i + 1] : Term{};
      term.least = rest.least + term.step * term.low;
      term.most = rest.most + term.step * term.high;
      term.divisor = std::gcd(term.step, rest.divisor);
    }
    steps_left_ = most_steps;
    return reach(0, from, to);
  }

 private:
  struct Term {
    std::int64_t step = 0, low = 0, high = 0;
    // Of the sums of this term and those after it:
    std::int64_t least = 0, most = 0, divisor = 0;
  };
  static constexpr int most_steps = 1 << 14;

  Term* begin() { return terms_.data(); }
  Term* end() { return terms_.data() + count_; }

  bool reach(std::size_t first, std::int64_t from, std::int64_t to) {
    if (--steps_left_ < 0) return true;
    if (first == count_) return from <= 0 && 0 <= to;
    const Term& term = terms_[first];
    from = std::max(from, term.least);
    to = std::min(to, term.most);
    if (from > to || floor_div(to, term.divisor) * term.divisor < from) return false;
    const Term rest = first + 1 < count_ ? terms_[first + 1] : Term{};
    const std::int64_t begin = std::max(term.low, -floor_div(rest.most - from, term.step));
    const std::int64_t end = std::min(term.high, floor_div(to - rest.least, term.step));
    for (std::int64_t i = begin; i <= end; ++i)
      if (reach(first + 1, from - term.step * i, to - term.step * i)) return true;
    return false;
  }

  std::array<Term, 7> terms_{};  // of two regions' axes, and room to insert
  std::size_t count_ = 0;
  int steps_left_ = 0;
};

// From the first byte to the end of the last row.
std::int64_t reach_of(const Region& region) {
  std::int64_t reach = region.row_bytes;
  for (const auto& [stride, extent] : region.axes) reach += stride * (extent - 1);
  return reach;
}

}  // namespace

bool overlap(const Region& a, const Region& b) {
  if (a.row_bytes == 0 || b.row_bytes == 0) return false;
  // Most tensors lie apart.
  const bool a_first = a.begin <= b.begin;
  const std::uintptr_t apart = a_first ? b.begin - a.begin : a.begin - b.begin;
  if (apart >= static_cast<std::uintptr_t>(reach_of(a_first ? a : b))) return false;
  // Rows of a and b share a byte where their distance, a's start minus b's, is in (-a.row_bytes, b.row_bytes).
  Sums sums;
  for (const auto& [stride, extent] : a.axes) sums.add(stride, 0, extent - 1);
  for (const auto& [stride, extent] : b.axes) sums.add(stride, 1 - extent, 0);
  const auto distance = a_first ? -static_cast<std::int64_t>(apart) : static_cast<std::int64_t>(apart);
  return sums.reach(1 - a.row_bytes - distance, b.row_bytes - 1 - distance);
}

bool overlaps_itself(const Region& region) {
  // Rows differ in a first axis, by a positive step if they are taken in that order, and anyhow in those after it.
  for (std::size_t first = 0; first < region.axes.size(); ++first) {
    const auto& [stride, extent] = region.axes[first];
    if (extent == 1) continue;
    if (stride == 0) return true;
    Sums sums;
    for (std::size_t i = first + 1; i < region.axes.size(); ++i)
      sums.add(region.axes[i].stride, 1 - region.axes[i].extent, region.axes[i].extent - 1);
    sums.add(stride, 1, extent - 1);
    if (sums.reach(1 - region.row_bytes, region.row_bytes - 1)) return true;
  }
  return false;
}

}  // namespace pbsattn
