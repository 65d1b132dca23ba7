// Says whether a backend's order, lists and outputs are right, given that it computes in float32.
#pragma once

#include <optional>
#include <vector>

#include "reference/definition.h"
#include "support/problem.h"
#include "support/ties.h"

namespace pbsattn::test {

struct Tolerance {
  double key_score = 1e-4;    // relative: keys whose scores are this close may swap
  double block_score = 1e-4;  // of attention mass: blocks this close may swap, and top_p may be missed by it
};
// Returns what rounding allows: f32 products of f32 inputs; pooled values rounded to 16 bits where inputs have 16;
// exponentials kept in bf16 where products are bf16, and then inputs that bf16 does not hold exactly.
Tolerance tolerance_for(const Problem& problem, DType products);

// Judges the order: a permutation of each complete segment, identity after it, that descends in key score but for near
// ties, inside blocks too. All of a KV head's query heads agree when the order is shared.
void expect_order(const Problem& problem, const Options& options, const Trace& trace, const Tolerance& tolerance);

// Judges the lists, given the trace's own order: the reference's but for near ties (tie_behind).
void expect_lists(const Problem& problem, const Options& options, const Trace& trace, const Tolerance& tolerance);

// Judges the outputs over the trace's own order and lists: error against double precision at most twice that of
// attend_plain(), in the largest and in the root mean square, plus one unit of float32 of the largest value
// (log-sum-exp goes through base 2 and back).
void expect_output(const Problem& problem, const Options& options, const Trace& trace, DType products);

// Judges all three, and that stats count the trace's blocks.
void expect_right(const Problem& problem, const RunResult& result, DType products);

// A tensor's worth of doubles, [batch][q_heads][q_len][head_dim], and its [batch][q_heads][q_len] sums.
struct Values {
  std::vector<double> out, lse;
};
Values attend_exact(const Problem& problem, const Options& options, const Trace& trace);

// Computes attention over the trace's lists as anyone would write it in float, the result in out's dtype. With products
// in 16 bits, operands are rounded to those, softmax weights among them, which are summed as rounded.
Values attend_plain(const Problem& problem, const Options& options, const Trace& trace, DType products);

Values outputs_of(const Problem& problem);

struct Distance {
  double largest = 0, root_mean_square = 0;
};
Distance distance(const std::vector<double>& values, const std::vector<double>& truth);

}  // namespace pbsattn::test
