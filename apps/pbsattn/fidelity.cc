#include "fidelity.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>

namespace app {
namespace {

double log_sum_exp(std::span<const float> logits) {
  const double peak = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - peak);
  return peak + std::log(sum);
}

std::ptrdiff_t most_likely(std::span<const float> row) {
  return std::ranges::max_element(row) - row.begin();
}

// sum p (log p - log q), where p is given by its logarithms and q by its logits.
double kl_divergence(std::span<const float> log_p, std::span<const float> q_logits, double q_log_sum) {
  double kl = 0;
  for (std::size_t i = 0; i < log_p.size(); ++i) kl += std::exp(log_p[i]) * (log_p[i] - (q_logits[i] - q_log_sum));
  return std::max(kl, 0.0);  // rounding may bring equal distributions below zero
}

Estimate estimate(std::span<const double> values) {
  const auto count = static_cast<double>(values.size());
  double mean = 0;
  for (const double value : values) mean += value / count;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {.mean = mean, .standard_error = count < 2 ? 0.0 : std::sqrt(squares / (count - 1) / count)};
}

}  // namespace

std::vector<int> sample_positions(int length, int count) {
  const int with_next = length - 1;
  if (count < 0 || count > with_next) count = with_next;
  std::vector<int> positions;
  for (int i = 1; i <= count; ++i) positions.push_back(static_cast<int>(std::int64_t{i} * with_next / count) - 1);
  positions.push_back(length - 1);
  return positions;
}

FidelityJudge::FidelityJudge(std::span<const llama_token> prompt, std::span<const int> positions)
    : prompt_(prompt), positions_(positions) {}

Fidelity FidelityJudge::judge(const std::function<std::span<const float>(int)>& logits) {
  const bool first = reference_.empty();
  Each each;
  Divergence divergence;
  for (std::size_t i = 0; i < positions_.size(); ++i) {
    const int position = positions_[i];
    const std::span<const float> row = logits(position);
    const double log_sum = log_sum_exp(row);
    const bool last = position + 1 == static_cast<int>(prompt_.size());
    if (!last) {
      each.position.push_back(position);
      each.nll.push_back(log_sum - row[static_cast<std::size_t>(prompt_[static_cast<std::size_t>(position) + 1])]);
    }
    if (first) {
      auto& kept = reference_.emplace_back(row.begin(), row.end());
      for (float& value : kept) value = static_cast<float>(value - log_sum);
      continue;
    }
    const std::span<const float> log_p = reference_[i];
    divergence.kl_last = kl_divergence(log_p, row, log_sum);
    divergence.top1_last = most_likely(log_p) == most_likely(row);
    if (!last) {
      each.kl.push_back(divergence.kl_last);
      each.same_top1.push_back(divergence.top1_last);
    }
    divergence.kl_mean += divergence.kl_last / static_cast<double>(positions_.size());
    divergence.top1_mean += (divergence.top1_last ? 1.0 : 0.0) / static_cast<double>(positions_.size());
  }
  const double perplexity = std::exp(estimate(each.nll).mean);
  Fidelity result{.perplexity = perplexity, .divergence = {}, .each = std::move(each)};
  if (first) {
    reference_nll_ = result.each.nll;
    return result;
  }
  std::vector<double> change(reference_nll_.size());
  std::ranges::transform(result.each.nll, reference_nll_, change.begin(), std::minus{});
  divergence.nll_change = estimate(change);
  result.divergence = divergence;
  return result;
}

}  // namespace app
