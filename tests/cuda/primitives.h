// Device primitives, each in a kernel of its own, called from the host. All take and give host arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/geometry.cuh"

namespace pbsattn::test {

// cuda::cut_within() by number or by sum: which values are kept, and how many it says.
struct CutResult {
  std::vector<bool> kept;
  int count;
};
CutResult run_cut(const std::vector<float>& values, double limit, bool by_sum);

// cuda::find_highest() by number or by sum, and cuda::Taker with what it found: the blocks that a row takes.
std::vector<std::int32_t> run_find_highest(const std::vector<float>& weights, float target, bool by_count);

// cuda::rank_keys(): the key of each rank of a segment, whose length is a multiple of 32. sortable() of each score
// first.
std::vector<int> run_rank_keys(const std::vector<float>& scores);

// The product of `a` and `b`, both [128][head_dim], of small integers, in [128][128]; by load_tile(), which takes the
// first `rows` of a, or by gather_tile(), which takes those that `rows_of_a` names, -1: none. Head widths of
// cuda::widths.
std::vector<float> run_product(const std::vector<float>& a, const std::vector<float>& b, int head_dim, int rows,
                               const std::vector<int>* rows_of_a);

// A step of K or V (attend/tile.cuh) that the copy engine brings from token `first` on of [tokens][stride], in f16, as
// [keys][width].
std::vector<float> run_step_copy(const std::vector<float>& rows, cuda::Widths widths, bool values, int stride,
                                 int tokens, int first);

// The product of weights [64][128], of which a step's `keys` are taken, and [V 1] as attend has it, V [keys][values],
// all small integers: [64][values + 8].
struct WeightedSums {
  int keys;
  std::vector<float> sums;
};
WeightedSums run_weighted_sums(const std::vector<float>& weights, const std::vector<float>& v, cuda::Widths widths);

// warp_sum, warp_max, quad_sum and quad_max of 32 values, in each lane.
struct Reduced {
  std::vector<float> warp_sum, warp_max, quad_sum, quad_max;
};
Reduced run_reductions(const std::vector<float>& lanes);

// Whether the online sum of values, each added by Statistics::merge in 32 lanes' parts, is log2 of the sum of exp2.
float run_log_sum(const std::vector<float>& products, float scale_log2);

// cuda::Merger of two log-sum-exps: what the parts are multiplied by, and the log-sum-exp of both.
struct Merged {
  float a, b, lse;
};
Merged run_merger(float lse_a, float lse_b);

// What the device's RowGrid says of each row, the head being 3.
struct RowPlace {
  int own_begin, first_query, begin, end;
  std::int64_t list_start;

  bool operator==(const RowPlace&) const = default;
};
std::vector<RowPlace> run_row_grid(const cuda::RowGrid& grid);

// The same on the host.
std::vector<RowPlace> row_places(const cuda::RowGrid& grid);

}  // namespace pbsattn::test
