// What `pbsattn prefill` found, for people and for machines.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "attention.h"
#include "fidelity.h"
#include "session.h"

namespace app {

// A prompt's prefill under one attention.
struct Run {
  Attention attention;
  double first_token_seconds = 0;  // prefill and choice of the first token; loading and tokenising not counted
  std::vector<ggml_pbsattn_layer_stats> layers = {};
  Fidelity fidelity = {};
  std::vector<llama_token> continuation = {};
  std::string continuation_text = {};
  int repeats = 0;  // how often it was timed again

  double attention_seconds() const;
  double other_seconds() const;  // all but attention: the same work in every run
  // Takes the times of another run of the same if they are better.
  void time_again(double seconds, std::vector<ggml_pbsattn_layer_stats> again);
  double density() const;  // visited over causal blocks, all layers
};

struct PrefillReport {
  ModelInfo model;
  std::string prompt_file;
  int prompt_tokens = 0;
  int context = 0;
  int ubatch = 0;  // tokens of a micro-batch
  int threads = 0;
  int positions = 0;              // sampled for fidelity
  std::string reference = {};     // the run that fidelity is measured against
  std::string left_to_ggml = {};  // why pbsattn could not take some layers; "" if it took all
  bool each_position = false;     // whether JSON has every position's losses, not their means alone
  std::vector<Run> runs = {};     // the first is the baseline of speed-ups

  // The first run's speed-up if its attention took no time.
  double bound() const;
  // A run that no attention explains, the worst of them, or null: all but its attention, the same work in every run,
  // took longer than another run as a whole, so something else kept the machine busy. The baseline is one where a
  // speed-up is above the bound.
  Run* disturbed();
  const Run* disturbed() const { return const_cast<PrefillReport*>(this)->disturbed(); }
};

std::string table(const PrefillReport& report);
nlohmann::json to_json(const PrefillReport& report);

}  // namespace app
