// Stage two: each row of queries chooses key blocks by their scores.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

// Returns the key blocks that a row attends to, ascending: what the keep rule takes of blocks 0 .. own_begin-1 by
// `scores`, from row_scores(); the block of those whose slots hold token 0; sink and local blocks; and the row's own
// segment up to its diagonal. A window hides the blocks before it.
std::vector<std::int32_t> select_blocks(const Options& options, const Geometry& geometry, std::int64_t row,
                                        const RowScores& scores, std::span<const std::int32_t> order);

}  // namespace pbsattn::reference
