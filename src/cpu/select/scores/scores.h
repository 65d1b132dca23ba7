// Block scores: what each of a row's key blocks is expected to weigh, before the keep rule. A score writes a row's
// weights, whose shares of the sum that it returns are the scores; NaN if they have no value.
//
// mean_pool is scored for a strip of rows at once, two_step for a few (two_step.h); these and per_query are made to be
// fast. The rest is for comparisons: plain loops around the f32 kernels, a row at a time.
#pragma once

#include "cpu/context.h"
#include "cpu/select/scratch.h"

namespace pbsattn::cpu {

// Scores a strip of rows by BlockScore::mean_pool, [block][strip], which mean_pool_weights() turns into one row's
// weights.
void score_mean_pool(const StageContext& c, std::int64_t head, std::int64_t first_row, int rows,
                     const SelectScratch& scratch);
double mean_pool_weights(const StageContext& c, std::int64_t row, int lane, const SelectScratch& scratch);

double score_mean_pool_causal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
double score_energy(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
// Adds to a row's weights each block's share of the softmax of up to a strip of queries over means of blocks. Returns
// false where one has none.
bool add_pooled_shares(const StageContext& c, std::int64_t head, std::int64_t row, const Rows& queries, int count,
                       const SelectScratch& scratch, float* weights);
double score_per_query(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
double score_exact(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
double score_sampled(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
// Scores a row by BlockScore::antidiagonal or antidiagonal_causal.
double score_antidiagonal(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);

// BlockScore::dual_band: the slow band's weights follow blocks() after the fast one's.
struct BandTotals {
  double fast = 0, slow = 0;
};
BandTotals score_dual_band(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);
// Writes the factors of a head's two bands, from all its pooled queries and keys.
void calibrate_bands(const StageContext& c, std::int64_t head, const SelectScratch& scratch);

// Mark in the masks of a head's rows what its columns and diagonals keep.
void mark_vertical_slash(const StageContext& c, std::int64_t head, const SelectScratch& scratch);
void mark_flexible(const StageContext& c, std::int64_t head, const SelectScratch& scratch);

inline void set_bit(std::uint64_t* mask, std::int64_t block) {
  mask[block / 64] |= std::uint64_t{1} << (block % 64);
}

}  // namespace pbsattn::cpu
