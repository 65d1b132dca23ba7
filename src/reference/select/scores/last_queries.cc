#include "reference/select/scores/last_queries.h"

#include <algorithm>
#include <cmath>

namespace pbsattn::reference {

Masses last_queries_masses(const Head& head, const Geometry& geometry, const Logits& logits, std::int64_t queries) {
  const std::int64_t keys = geometry.shape.kv_len;
  Masses masses{std::vector<double>(keys, 0.0), std::vector<double>(keys, 0.0)};
  std::vector<double> share;
  for (std::int64_t token = keys - queries; token < keys; ++token) {
    share.resize(token + 1);
    for (std::int64_t n = 0; n <= token; ++n) share[n] = logits(dot(head.q[token - geometry.q_offset()], head.k[n]));
    softmax(share);
    if (std::isnan(share[0])) continue;
    for (std::int64_t n = 0; n <= token; ++n) {
      masses.column[n] += share[n] / static_cast<double>(queries);
      masses.diagonal[token - n] += share[n] / static_cast<double>(queries);
    }
  }
  return masses;
}

std::vector<bool> heaviest(std::vector<double> masses, std::int64_t count, std::int64_t forced, double* margin) {
  for (std::int64_t i = 0; i < std::min<std::int64_t>(forced, std::ssize(masses)); ++i)
    masses[i] = 2;  // above any mass
  std::vector<bool> marked(masses.size(), false);
  const auto order = descending(masses);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, std::ssize(order)); ++i) marked[order[i]] = true;
  if (count < std::ssize(order)) note(margin, gap(masses[order[count - 1]], masses[order[count]]));
  return marked;
}

void note(double* margin, double distance) {
  if (margin != nullptr) *margin = std::min(*margin, std::abs(distance));
}

double gap(double heavier, double lighter) {
  return heavier > 0 ? (heavier - lighter) / heavier : 0.0;
}

Pattern nothing_of(const Geometry& geometry) {
  Pattern pattern;
  for (std::int64_t row = 0; row < geometry.rows(); ++row) pattern.emplace_back(geometry.diagonal(row) + 1, false);
  return pattern;
}

}  // namespace pbsattn::reference
