// What the query heads of a plan may have of their own, as kernels read it: the keep rule and its numbers, and what is
// always kept.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <span>

#include "core/keep_rule.h"
#include "core/score_traits.h"
#include "cuda/limits.h"

namespace pbsattn::cuda {

struct HeadOptions {
  KeepRule keep;  // `all` where the rule's numbers keep every block
  float top_p, threshold, floor_top_p, density, tau;
  float threshold_tokens;  // infinite where they limit nothing
  int top_k, vertical, slash, min_budget;
  int sink_blocks, local_blocks, dense_last_rows;
  bool kept_first;         // what is always kept counts first toward top_p
  bool keep_all_if_short;  // of a row whose weights have no value

#ifdef __CUDACC__
  __device__ bool counts() const {
    return keep == KeepRule::top_k || keep == KeepRule::density;
  }
  // Returns the threshold of the row on a diagonal: core/keep_rule.h's row_threshold().
  __device__ float row_threshold(int diagonal) const {
    return fminf(threshold, threshold_tokens / (static_cast<float>(diagonal + 1) * block_tokens));
  }
#endif
};
inline HeadOptions head_options_of(const Options& options) {
  return {.keep = keeps_every_block(options) ? KeepRule::all : options.keep,
          .top_p = options.top_p,
          .threshold = options.threshold,
          .floor_top_p = options.floor_top_p,
          .density = options.density,
          .tau = options.tau,
          .threshold_tokens =
              options.threshold_tokens == 0.0F ? std::numeric_limits<float>::infinity() : options.threshold_tokens,
          .top_k = options.top_k,
          .vertical = options.vertical,
          .slash = options.slash,
          .min_budget = options.min_budget,
          .sink_blocks = options.sink_blocks,
          .local_blocks = options.local_blocks,
          .dense_last_rows = options.dense_last_rows,
          .kept_first = counts_kept_first(options.score),
          .keep_all_if_short = options.rules == Rules::paper};
}

// The options of a pass's heads, [batch][q_head]; batch entries share them.
struct OptionsOfHeads {
  HeadOptions all;                    // of all heads,
  const HeadOptions* each = nullptr;  // or, where not null, of each query head
  int q_heads = 1;

#ifdef __CUDACC__
  __device__ const HeadOptions& of(std::int64_t head) const {
    return each == nullptr ? all : each[head % q_heads];
  }
#endif
};

// Writes the options of heads to device memory, from parameters of launches: nothing is read from the host later, so a
// captured graph has its own copy.
cudaError_t write_head_options(std::span<const Options> heads, HeadOptions* to, cudaStream_t stream);

}  // namespace pbsattn::cuda
