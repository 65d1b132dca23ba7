// One attention problem on random data, in the layout and dtypes llama.cpp hands over: q float32, k and v
// float16, tokens outermost.
#pragma once

#include <cstdint>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace bench {

struct Problem {
  Problem(pbsattn::Shape problem_shape, unsigned seed);

  // Makes some segments matter more than others, and in each some keys, as in real heads: queries lean along one
  // column, keys lie along it as far as their segment's draw and their own say, times `strength`. A learned order goes
  // by it.
  void concentrate(float strength, unsigned seed);

  pbsattn::Inputs inputs() const;

  pbsattn::Shape shape;
  std::vector<float> q;              // [token][q_heads][head_dim]
  std::vector<std::uint16_t> k, v;   // [token][kv_heads][head_dim], float16 bits
  std::vector<float> order_weights;  // [kv_heads][3 * head_dim / 2]
};

// A plan with its workspace and output, ready to run on a problem again and again.
class Runner {
 public:
  Runner(const Problem& problem, const pbsattn::Options& options, const pbsattn::Device& device);

  void operator()();
  const pbsattn::Stats& stats() const { return stats_; }
  const std::vector<float>& out() const { return out_; }  // [token][q_heads][head_dim]
  std::string_view path() const { return plan_.path(); }
  std::size_t workspace_size() const { return workspace_.size(); }

 private:
  const Problem& problem_;
  pbsattn::Plan plan_;
  std::vector<std::byte> workspace_;
  std::vector<float> out_;
  pbsattn::Stats stats_;
};

// |a - b| / |b| in the Euclidean norm; NaN where either holds one.
double relative_error(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace bench
