// What the last queries of a head pay to each key and to each distance: what BlockScore::vertical_slash and flexible go
// by. A part of select().
#pragma once

#include "cuda/memory/carver.h"
#include "cuda/select/scores/scores.h"

namespace pbsattn::cuda {

// Their arrays in the scratch of a score.
struct Masses {
  Masses(const Geometry& geometry, int most_queries, Carver& carver);

  // [batch][q_heads][kv_len]: softmax weights of the queries added up, by key and by distance from query to key. A
  // query whose softmax has no value counts nothing.
  float *columns = nullptr, *distances = nullptr;
  float2* parts = nullptr;     // [batch][q_heads][parts][most_queries]: Statistics of each query over some of the keys
  float2* log_sums = nullptr;  // [batch][q_heads][most_queries]
};

// Enqueues the masses of the last `queries` queries, up to most_queries, which is 64 or 128. Heads whose rule isn't
// `keep` are left out.
cudaError_t find_masses(const SelectArgs& args, KeepRule keep, std::int64_t queries, int most_queries,
                        const Masses& masses, cudaStream_t stream);

}  // namespace pbsattn::cuda
