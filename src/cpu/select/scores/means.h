// What scores by the means of blocks share.
#pragma once

#include "cpu/context.h"
#include "cpu/select/scratch.h"

namespace pbsattn::cpu {

// Writes the mean of a row's queries, [head_dim].
void pool_query(const StageContext& c, std::int64_t head, std::int64_t row, float* pooled_q);

// Multiplies a strip of packed queries by means of blocks: scores[block][strip], for whole tiles of `blocks`.
void multiply_means(const StageContext& c, const float* means, std::int64_t blocks, const SelectScratch& scratch,
                    float* scores);

// Scores blocks 0 .. diagonal by packed queries and the blocks' means as the row sees them.
void score_causal_means(const StageContext& c, std::int64_t head, std::int64_t row, const SelectScratch& scratch);

// Writes weights[b] = exp(scores[b][lane] * scale - max). Returns their sum.
double exponentials(const float* scores, int lane, std::int64_t blocks, float scale, float* weights);

}  // namespace pbsattn::cpu
