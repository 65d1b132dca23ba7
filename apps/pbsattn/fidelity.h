// How far the next-token distributions of a run stand from those of a reference run.
#pragma once

#include <llama.h>

#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace app {

// `count` positions of a prompt of `length` tokens, evenly spaced over those that have a next token, and
// the last; ascending. count < 0 stands for all.
std::vector<int> sample_positions(int length, int count);

// A mean over positions and its standard error, the positions taken as independent.
struct Estimate {
  double mean = 0;
  double standard_error = 0;
};

struct Divergence {
  double kl_mean = 0;     // mean over positions of KL(reference || run), in nats
  double kl_last = 0;     // at the prompt's last position
  double top1_mean = 0;   // share of positions where both have the same most likely token
  bool top1_last = true;  // at the prompt's last position
  Estimate nll_change;    // the run's negative log-likelihood of the next token less the reference's, in nats: pairing
                          // takes out how hard a token is, by far the larger part of what a perplexity wanders
};

// What the means are over: one number for each sampled position but the prompt's last, which has no next token.
struct Each {
  std::vector<int> position;
  std::vector<double> nll;      // of the next token
  std::vector<double> kl;       // KL(reference || run); empty for the reference, as the next
  std::vector<bool> same_top1;  // whether both have the same most likely token
};

struct Fidelity {
  double perplexity = 0;  // of the prompt's next tokens at the sampled positions
  std::optional<Divergence> divergence;
  Each each;
};

// Keeps one copy of the reference run's distributions; other runs stream past it.
class FidelityJudge {
 public:
  FidelityJudge(std::span<const llama_token> prompt, std::span<const int> positions);

  // The first call sets the reference and has no divergence.
  Fidelity judge(const std::function<std::span<const float>(int position)>& logits);

 private:
  std::span<const llama_token> prompt_;
  std::span<const int> positions_;
  std::vector<std::vector<float>> reference_;  // log-probabilities at each position
  std::vector<double> reference_nll_;          // of the next token, at each position that has one
};

}  // namespace app
