// Random plans of every score with every keep rule that goes with it, and whether a backend decides as the reference
// does on the same inputs: each has its own order and its own lists.
#pragma once

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "support/judge.h"
#include "support/problem.h"

namespace pbsattn::test {

struct RandomPlan {
  ProblemSpec problem;
  std::vector<Options> heads;  // of each query head, or of all
};
void PrintTo(const RandomPlan& plan, std::ostream* stream);

// What a backend takes.
struct PlanLimits {
  std::vector<DType> dtypes;  // of all inputs alike
  std::vector<std::int64_t> head_dims;
  bool value_widths = false;  // values may be of another width than keys
  bool layers = false;        // there may be sinks, capped logits, windows
  std::vector<int> blocks;
  std::int64_t most_keys = 0;
  std::int64_t most_queries = 0;
  Precision precision = Precision::automatic;
};

// Returns `each` plans of every score and rule. Sixteen of them have every combination of rules, order scope,
// correction and one of two dtypes; the rest of a plan, and which combinations fewer plans take, is random but the same
// everywhere.
std::vector<RandomPlan> random_plans(const PlanLimits& limits, int each);

// Returns the plans that the CUDA backend is compared on, and the CPU's too, so that all three agree.
std::vector<RandomPlan> plans_for_cuda();

// What was compared, and what differed.
struct Agreement {
  std::int64_t plans = 0, heads = 0, rows = 0;
  std::int64_t sparse_rows = 0;            // rows that the reference lets leave out something
  std::int64_t other_orders = 0;           // of heads, by near ties
  std::int64_t lists_of_other_orders = 0;  // rows that the reference lists as the backend does in the backend's order
  std::int64_t other_lists = 0;            // of other rows, by near ties
  double key_tie = 0, block_tie = 0;       // how far the farthest of these was from a tie
};
std::ostream& operator<<(std::ostream& stream, const Agreement& agreement);

// A backend's run of a plan; the outputs are in the problem. Fills in the options as the backend resolved them.
using Backend = std::function<RunResult(const RandomPlan&, Problem&)>;

// Runs a plan on both. An order must be the reference's but for key scores within the tolerance of each other, and
// lists the reference's but for a tie within the tolerance (tie_behind). Where orders differ by near ties, the
// reference's lists are those of the backend's order. Outputs of decisions that are the same may differ by
// `output_error` of the largest value.
void expect_reference_decisions(const RandomPlan& plan, const Backend& backend, const Tolerance& tolerance,
                                double output_error, Agreement& agreement);

}  // namespace pbsattn::test
