// How near to a tie, by the reference's own scores, a decision is that differs from the reference's.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/geometry.h"
#include "reference/definition.h"

namespace pbsattn::test {

// Return the key scores that the order of query head `flat` follows, and by what share of the higher one two of them
// differ, at most, that stand in the wrong order. What float32 can't hold counts as equal. Learned scores are raised to
// positive numbers whose shares are differences over a bound of the sum of a key's terms; an order that is known
// (Permutation::arrival) follows numbers far from each other.
std::vector<double> ordering_scores(const Inputs& inputs, const Options& options, const Geometry& geometry,
                                    std::int64_t flat, const KeyOrder& kept = {});
double farthest_swap(const Geometry& geometry, const std::vector<double>& scores,
                     const std::vector<std::int32_t>& order);

// Returns by how much the reference's scores of a row would have to change for the definition to list exactly `list`: 0
// where it does, nothing where a change of `tolerance` is too small. The change favours the listed blocks, so whatever
// stands behind the difference, it is that near to a tie. Of patterns it is how near the closest of the head's choices
// was.
std::optional<double> tie_behind(const Options& options, const Geometry& geometry, std::int64_t row,
                                 const reference::Scoring& scoring, const reference::RowScores& scores,
                                 const std::vector<std::int32_t>& order, const std::vector<std::int32_t>& list,
                                 double tolerance);

// Does the same of the scores that the definition gives the row. Of BlockScore::two_step also where the choice of
// blocks that the second step reads may have been a near tie.
std::optional<double> tie_behind(const reference::Head& head, const Options& options, const Geometry& geometry,
                                 std::int64_t row, const reference::Scoring& scoring,
                                 const std::vector<std::int32_t>& order, const std::vector<std::int32_t>& list,
                                 double tolerance);

}  // namespace pbsattn::test
