// What a head's last queries look at: columns (keys that all queries look at) and diagonals (distances that all queries
// look back).
#pragma once

#include <cstdint>
#include <vector>

#include "reference/select/scores/scores.h"

namespace pbsattn::reference {

// Mean softmax weight of the last `queries` queries on each key, and on each distance from query to key.
struct Masses {
  std::vector<double> column, diagonal;
};
// Adds these weights up; a NaN makes its query count nothing.
Masses last_queries_masses(const Head& head, const Geometry& geometry, const Logits& logits, std::int64_t queries);

// Marks the `count` heaviest, the first `forced` before all others.
std::vector<bool> heaviest(std::vector<double> masses, std::int64_t count, std::int64_t forced, double* margin);

// Lowers a margin, if there is one, to the distance of a choice from its opposite.
void note(double* margin, double distance);

// Returns how far two masses are from a tie, as a share of the heavier one.
double gap(double heavier, double lighter);

// Returns a pattern that keeps no block.
Pattern nothing_of(const Geometry& geometry);

}  // namespace pbsattn::reference
