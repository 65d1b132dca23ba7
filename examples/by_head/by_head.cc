// Options of each query head: some heads look near, some at a few columns of the whole prompt, one at everything.
#include <pbsattn/pbsattn.hpp>

#include <cstdio>
#include <random>
#include <vector>

int main() {
  const pbsattn::Shape shape{.batch = 1, .q_heads = 4, .kv_heads = 2, .q_len = 4096, .kv_len = 4096, .head_dim = 64};
  std::vector<float> q(shape.q_heads * shape.q_len * shape.head_dim), out(q.size());
  std::vector<float> k(shape.kv_heads * shape.kv_len * shape.head_dim), v(k.size());
  std::mt19937 random(1);
  std::normal_distribution<float> noise;
  for (auto* tensor : {&q, &k, &v})
    for (float& x : *tensor) x = noise(random);
  const std::int64_t head = shape.q_len * shape.head_dim;  // elements: tensors are [head][token][head_dim]
  const auto input = [&](const std::vector<float>& x) {
    return pbsattn::ConstView{.data = x.data(), .head_stride = head, .token_stride = shape.head_dim};
  };

  // MInference's two patterns: columns and diagonals, or the first block and near ones (an "A-shape"). Heads may differ
  // in the keep rule, its numbers, and what is always kept; permutation, score, block and segment are the plan's.
  std::vector<pbsattn::Options> heads(shape.q_heads, pbsattn::method("minference"));
  heads[0].vertical = 32;
  heads[0].slash = 128;
  heads[1].vertical = 48;
  heads[1].slash = 100;
  heads[2].keep = pbsattn::KeepRule::none;
  heads[2].sink_blocks = 1;
  heads[2].local_blocks = 7;
  heads[3].keep = pbsattn::KeepRule::all;

  try {
    const auto plan = pbsattn::Plan::create(heads, shape);
    std::vector<std::byte> workspace(plan.workspace_size());
    pbsattn::Stats stats;
    pbsattn::Trace trace;
    plan.run({.q = input(q), .k = input(k), .v = input(v)},
             {.out = {.data = out.data(), .head_stride = head, .token_stride = shape.head_dim}}, workspace, &stats,
             &trace);
    const std::int64_t causal = trace.rows * (trace.rows + 1) / 2;
    for (std::int64_t h = 0; h < shape.q_heads; ++h) {
      const std::int64_t kept = trace.row_start[(h + 1) * trace.rows] - trace.row_start[h * trace.rows];
      std::printf("head %d keeps %.3f of its causal blocks\n", static_cast<int>(h),
                  static_cast<double>(kept) / static_cast<double>(causal));
    }
    std::printf("together %.3f\n", stats.density());
  } catch (const pbsattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
