// Fallback::when_faster: whether a plan's shape is long enough for sparsity to pay.
#pragma once

#include "core/executor.h"

namespace pbsattn {

// What permute and select cost on a device. The unit is the time that attend takes for one pair (row, key block) of one
// head when the device is full of them, so only ratios count and a model holds for all chips of a kind.
struct CostModel {
  double call = 0;       // of a call, whatever its size
  double key_block = 0;  // of a key block of one query head: scoring its keys, moving them, their mean
  double row = 0;        // of a row of one query head: choosing its blocks, but for what pairs cost
  double pair = 0;       // of a pair of one query head: scoring it
};

// The share of causal blocks that a method is expected to visit: options.expected_density, or what was measured at this
// many tokens: of two-step scores by us, of all others by the paper at top_p 0.9.
double expected_density(const Options& options, std::int64_t kv_len);

// The spec with the fallback resolved: the options as they are, or those of full attention. Full attention is taken
// where the expected density makes the method no faster. A density that nobody vouched for may also turn out as 1; then
// the method must not take more than a tenth longer than full attention.
detail::PlanSpec with_fallback_resolved(const detail::PlanSpec& spec, const CostModel& model);

}  // namespace pbsattn
