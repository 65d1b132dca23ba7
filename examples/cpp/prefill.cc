// Sparse attention from C++: one layer's worth of made-up queries, keys and values, dense and sparse.
#include <pbsattn/pbsattn.hpp>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  // Eight query heads share two KV heads. The tensors are [token][head][head_dim], as projections leave
  // them; any other layout is other strides.
  const pbsattn::Shape shape{.batch = 1, .q_heads = 8, .kv_heads = 2, .q_len = 4096, .kv_len = 4096, .head_dim = 64};
  const std::int64_t q_row = shape.q_heads * shape.head_dim;
  const std::int64_t kv_row = shape.kv_heads * shape.head_dim;
  std::vector<float> q(shape.q_len * q_row), k(shape.kv_len * kv_row), v(shape.kv_len * kv_row), out(q.size());

  // A few keys that all queries like, as in real attention: 1 in 16 points in the queries' direction.
  std::mt19937 random(1);
  std::normal_distribution<float> noise;
  for (float& x : q) x = noise(random) + 0.5F;
  for (float& x : v) x = noise(random);
  for (std::int64_t token = 0; token < shape.kv_len; ++token)
    for (std::int64_t i = 0; i < kv_row; ++i) k[token * kv_row + i] = noise(random) + (token % 16 == 0 ? 1.5F : 0.0F);

  const auto view = [&](auto& tensor, std::int64_t row) {
    return pbsattn::View{.data = tensor.data(), .head_stride = shape.head_dim, .token_stride = row};
  };
  const auto const_view = [&](const auto& tensor, std::int64_t row) {
    return pbsattn::ConstView{.data = tensor.data(), .head_stride = shape.head_dim, .token_stride = row};
  };
  try {
    for (const char* name : {"full", "pbs"}) {
      // Only here can a configuration be refused. A plan runs any number of times.
      const auto plan = pbsattn::Plan::create(pbsattn::method(name), shape, pbsattn::Device::cpu());
      std::vector<std::byte> workspace(plan.workspace_size());
      pbsattn::Stats stats;
      plan.run({.q = const_view(q, q_row), .k = const_view(k, kv_row), .v = const_view(v, kv_row)},
               {.out = view(out, q_row)}, workspace, &stats);
      std::printf("%-5s density %.3f, %7.2f ms, first output %.4f\n", name, stats.density(), 1e3 * stats.seconds(),
                  static_cast<double>(out[0]));
    }
  } catch (const pbsattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
