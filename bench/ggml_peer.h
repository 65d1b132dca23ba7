// llama.cpp's own attention kernel on the CPU, in this process.
#pragma once

#include <memory>
#include <vector>

#include "problem.h"

namespace bench {

class GgmlAttention {
 public:
  GgmlAttention(const Problem& problem, int threads);
  ~GgmlAttention();

  void operator()();
  const std::vector<float>& out() const;  // [token][q_heads][head_dim]

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bench
