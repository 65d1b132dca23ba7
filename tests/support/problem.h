// One attention call with everything that it needs.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/geometry.h"
#include "support/tensor.h"

namespace pbsattn::test {

struct ProblemSpec {
  Shape shape;
  DType q = DType::f32, k = DType::f32, v = DType::f32, out = DType::f32;
  TensorLayout layout = TensorLayout::bhsd;
  std::uint64_t seed = 1;
  // Where not 0, q and k are multiples of it: of 1/8, say, so that products of two and sums of a block are exact in
  // float32, and what is pooled is rounded alike by whoever adds it up.
  double grid = 0;
  bool sinks = false;
  bool order_weights = false;
  RopePairs pairs = RopePairs::halves;
  // Of Permutation::arrival, where the segment isn't 0: room for orders, of which the first tokens' is known.
  int kept_segment = 0;
  std::int64_t known = 0;
};

// Inputs look like attention's: some keys draw most queries, and neighbouring tokens share a topic that
// makes their blocks matter to some rows and not to others. Without that, all block scores would be
// nearly equal and every choice a tie.
class Problem {
 public:
  explicit Problem(const ProblemSpec& spec);

  Inputs inputs() const {
    return {.q = q.view(), .k = k.view(), .v = v.view(), .sinks = sinks, .order_weights = {order_weights, pairs}};
  }
  Outputs outputs() { return {.out = out.view(), .lse = lse.data(), .order = kept_order()}; }
  KeyOrder kept_order() const;

  Shape shape;
  Tensor q, k, v, out;
  std::vector<float> lse;
  std::vector<float> sinks;          // [q_heads] or none
  std::vector<float> order_weights;  // [kv_heads][head_dim / 2 + head_dim] or none
  RopePairs pairs;
  mutable std::vector<std::int32_t> order;  // [batch][kv_heads][tokens of complete segments] or none
  std::int64_t known;
};

// Returns the first tokens of a problem as the problem of a call that ends with them, with room for orders of arrival.
Problem first_tokens(const Problem& whole, std::int64_t q_len, std::int64_t kv_len, int kept_segment = 0);

struct RunOptions {
  Device device = Device::cpu(2);
  std::size_t cap = Plan::no_cap;
  std::size_t misalign = 1;  // bytes the workspace starts after an aligned address
};

struct RunResult {
  Stats stats;
  Trace trace;
  Options options;  // with scale resolved
  std::string path;
  std::size_t workspace_size = 0;
};

// Returns what a plan says of itself before it runs.
RunResult result_of(const Plan& plan);
// Plans and runs in a workspace full of NaN, and checks that nothing outside views and workspace changed.
RunResult run(const Options& options, Problem& problem, const RunOptions& how = {});
// Does the same with options of all heads, or of each; the result has the first head's.
RunResult run(std::span<const Options> heads, Problem& problem, const RunOptions& how = {});

inline Geometry geometry_of(const Options& options, const Shape& shape) {
  return {.shape = shape, .block = options.block, .segment = options.segment, .window = options.window};
}

// Returns `options` with scale resolved as Plan does.
Options resolved(Options options, const Shape& shape);

// Return the blocks of one row, and the order of one head.
std::vector<std::int32_t> row_list(const Trace& trace, std::int64_t flat_head, std::int64_t row);
std::vector<std::int32_t> head_order(const Trace& trace, std::int64_t flat_head, std::int64_t kv_len);

}  // namespace pbsattn::test
