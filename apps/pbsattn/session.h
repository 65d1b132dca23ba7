// A GGUF model in llama.cpp whose attention runs through the ggml plug-in.
#pragma once

#include <llama.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "ggml-pbsattn.h"
#include "learned_file.h"
#include "learned_layers.h"

namespace app {

struct ModelInfo {
  std::string path;
  std::string description;  // as llama.cpp words it: "llama ?B Q4_1"
  int layers = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int context = 0;  // tokens it was trained on
  int vocabulary = 0;
};

constexpr int most_threads = 512;  // what ggml takes

struct ContextSize {
  int prompt = 0;    // tokens that one prefill takes, whole
  int generate = 0;  // tokens that may follow
  int context = 0;   // tokens the KV cache holds; 0: prompt + generate
  int ubatch = 0;    // tokens of a micro-batch; 0: prompt
  int outputs = 1;   // positions of the prompt whose next-token distributions are wanted
  int threads = 1;
};

class Session {
 public:
  // Throws Failure when the model can't be loaded. llama.cpp's own messages show only if `verbose`.
  Session(const std::string& model_path, bool verbose);

  const ModelInfo& info() const noexcept { return info_; }
  // Throws Failure where the file of a learned order isn't this model's.
  void require_own(const pbsattn::learned::File& file) const;
  // Returns the weights of one layer for keys as this model has them, and their pairs. Throws Failure where there are
  // none.
  std::pair<std::vector<float>, pbsattn::RopePairs> weights_of(const pbsattn::learned::File& file, int layer) const;
  std::vector<llama_token> tokenize(const std::string& text) const;
  std::string text_of(std::span<const llama_token> tokens) const;

  // Makes room. Call it once, before prefill().
  void open(const ContextSize& size);

  // Forgets what came before and runs the prompt, ubatch by ubatch, under `attention`. Distributions after
  // `outputs` (positions, ascending) can be read until the next call. With `layers` it stops once the attention
  // of so many layers is computed. Throws when interrupted or when llama.cpp fails.
  void prefill(std::span<const llama_token> prompt, std::span<const int> outputs, const Attention& attention,
               int layers = 0);
  std::span<const float> logits(int position) const;
  llama_token most_likely(int position) const;

  // Continues greedily from the prompt's last position; ends early at the model's end of text.
  std::vector<llama_token> generate(int prompt_length, int count);

 private:
  struct Free {
    void operator()(llama_model* model) const { llama_model_free(model); }
    void operator()(llama_context* context) const { llama_free(context); }
  };

  bool layers_done() const;
  // A number of the model's file, "attention.key_length", or `otherwise` where it has none.
  int number(const std::string& key, int otherwise) const;
  void decode(std::span<const llama_token> tokens, int first_position, std::span<const int> outputs);

  std::unique_ptr<llama_model, Free> model_;
  std::unique_ptr<llama_context, Free> context_;
  const llama_vocab* vocab_ = nullptr;
  ModelInfo info_;
  std::size_t stop_after_ = 0;  // layers; 0: go on to the end
};

// Returns what the file of an attention's learned order says, over its options; null where it has none. Throws Failure
// where the file's settings are wrong.
std::shared_ptr<const pbsattn::ggml::LearnedLayers> learned_layers(const Attention& attention);

// The plug-in's statistics of each layer since the last prefill() began.
std::vector<ggml_pbsattn_layer_stats> layer_stats();

// Why pbsattn could not compute some of the model's attention, in words; "" if it computed all of it.
std::string why_not_taken(std::span<const ggml_pbsattn_layer_stats> layers, int model_layers);

}  // namespace app
