#include "support/hostile.h"

#include <cmath>
#include <limits>

namespace pbsattn::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
const double nan = std::nan("");

// Scores in whole numbers of steps, so that a backend's rounding of weights doesn't grow with them.
void stairs(Problem& p, double query) {
  p.q.fill(query);
  constexpr std::int64_t step = 16;
  for (std::int64_t token = 0; token < p.shape.kv_len; ++token)
    set_row(p.k, token, 0.25 * static_cast<double>(token / step));
}

}  // namespace

void set_row(Tensor& tensor, std::int64_t token, double value) {
  for (std::int64_t h = 0; h < tensor.heads; ++h)
    for (std::int64_t d = 0; d < tensor.head_dim; ++d) tensor.set(0, h, token, d, value);
}

std::vector<HostileCase> hostile_cases(const Shape& shape, int block) {
  const std::int64_t n = shape.kv_len;
  const std::int64_t last = n - 1;
  std::vector<HostileCase> cases{
      {"all_zero",
       [](Problem& p) {
         p.q.fill(0);
         p.k.fill(0);
       }},
      {"huge_keys",
       [=](Problem& p) {
         for (const std::int64_t token : {std::int64_t{5}, n / 3, n / 2, 3 * n / 4, last}) {
           set_row(p.k, token, 0);
           p.k.set(0, 0, token, 0, token % 2 == 0 ? 1e30 : -1e30);
         }
       }},
      {"huge_queries",
       [=](Problem& p) {
         for (const std::int64_t token : {std::int64_t{0}, std::int64_t{block} + 2, last})
           p.q.set(0, 0, token, 1, 1e30);
       }},
      {"huge_and_tiny_values",
       [=](Problem& p) {
         for (std::int64_t token = 0; token < n; ++token) p.v.set(0, 0, token, 3, token % 3 == 0 ? 1e30 : 1e-30);
       }},
      {"maximum_grows_with_every_block", [](Problem& p) { stairs(p, 0.5); }},
      {"maximum_falls_with_every_block", [](Problem& p) { stairs(p, -0.5); }},
      {"minus_infinity_hides_keys",
       [=](Problem& p) {
         p.q.fill(1.0);
         for (std::int64_t token = block - 14; token < n; token += 3) set_row(p.k, token, -infinity);
       }},
      {"whole_blocks_of_minus_infinity",
       [=](Problem& p) {
         p.q.fill(1.0);
         for (std::int64_t token = 0; token < 2 * block + block / 2; ++token) set_row(p.k, token, -infinity);
       }},
      {"all_minus_infinity",
       [](Problem& p) {
         p.q.fill(1.0);
         p.k.fill(-infinity);
       }},
      // One scoring query without any finite score leaves no order to speak of, whatever the others say.
      {"a_scoring_query_of_minus_infinity",
       [=](Problem& p) {
         p.k.fill(1.0);
         set_row(p.q, n - 30, -infinity);
       }},
      {"infinite_key",
       [=](Problem& p) {
         p.q.fill(1.0);
         set_row(p.k, block + 12, infinity);
       }},
  };
  const std::int64_t tokens[] = {0, block - 1, block, 5 * block / 2, n - 40, last};
  for (const std::int64_t token : tokens) {
    const std::string at = "_at_" + std::to_string(token);
    cases.push_back({"nan_key" + at, [=](Problem& p) { p.k.set(0, 0, token, 7, nan); }});
    cases.push_back({"nan_value" + at, [=](Problem& p) { p.v.set(0, 0, token, 7, nan); }});
    cases.push_back({"nan_query" + at, [=](Problem& p) { p.q.set(0, 1, token, 0, nan); }});
  }
  return cases;
}

}  // namespace pbsattn::test
