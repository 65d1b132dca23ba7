// A plan, and the taking of samples, behind plain functions, for cpu_torch.py: tensors are contiguous
// [heads][tokens][head_dim] of one dtype.
#include <memory>
#include <string>
#include <vector>

#include "pbsattn/pbsattn.hpp"
#include "sampling.h"

namespace {

struct Bench {
  pbsattn::Plan plan;
  pbsattn::Shape shape;
  pbsattn::DType dtype;
  std::vector<std::byte> workspace;
  pbsattn::Stats stats;
};

std::string last_error;

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char* bench_error() {
  return last_error.c_str();
}

// sizes: q_heads, kv_heads, tokens, head_dim. Null on failure.
__attribute__((visibility("default"))) void* bench_create(const char* method, float top_p, int dtype, int threads,
                                                          const std::int64_t* sizes) try {
  pbsattn::Options options = pbsattn::method(method);
  if (options.keep == pbsattn::KeepRule::top_p) options.top_p = top_p;
  const auto type = static_cast<pbsattn::DType>(dtype);
  if (type == pbsattn::DType::bf16) options.precision = pbsattn::Precision::bf16;
  const pbsattn::Shape shape{.batch = 1,
                             .q_heads = sizes[0],
                             .kv_heads = sizes[1],
                             .q_len = sizes[2],
                             .kv_len = sizes[2],
                             .head_dim = sizes[3]};
  auto plan = pbsattn::Plan::create(options, shape, pbsattn::Device::cpu(threads));
  std::vector<std::byte> workspace(plan.workspace_size());
  return new Bench{std::move(plan), shape, type, std::move(workspace), {}};
} catch (const std::exception& error) {
  last_error = error.what();
  return nullptr;
}

__attribute__((visibility("default"))) const char* bench_path(const void* bench) {
  static thread_local std::string path;
  path = static_cast<const Bench*>(bench)->plan.path();
  return path.c_str();
}

// Returns the density, or -1 on failure.
__attribute__((visibility("default"))) double bench_run(void* bench, const void* q, const void* k, const void* v,
                                                        void* out) try {
  auto& b = *static_cast<Bench*>(bench);
  const std::int64_t q_heads = b.shape.q_heads, kv_heads = b.shape.kv_heads;
  const std::int64_t dim = b.shape.head_dim, head = b.shape.q_len * dim;
  b.plan.run({{q, b.dtype, q_heads * head, head, dim},
              {k, b.dtype, kv_heads * head, head, dim},
              {v, b.dtype, kv_heads * head, head, dim}},
             {.out = {out, b.dtype, q_heads * head, head, dim}}, b.workspace, &b.stats);
  return b.stats.density();
} catch (const std::exception& error) {
  last_error = error.what();
  return -1;
}

// Runs two functions as sample() does. Fills seconds[i] with the median of what counts of function i, spreads[i] with
// its spread, and counts[i] with how many of its samples were undisturbed, how many were taken, and how many count.
__attribute__((visibility("default"))) void bench_sample(int runs, double limit, int threads, void (*a)(), void (*b)(),
                                                         double seconds[2], double spreads[2], int counts[2][3]) {
  const auto samples = bench::sample({.runs = runs, .limit = limit, .threads = threads}, {a, b});
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const auto counted = samples[i].counted();
    seconds[i] = bench::median(counted);
    spreads[i] = bench::spread(counted);
    counts[i][0] = samples[i].undisturbed();
    counts[i][1] = static_cast<int>(samples[i].seconds.size());
    counts[i][2] = static_cast<int>(counted.size());
  }
}

__attribute__((visibility("default"))) void bench_destroy(void* bench) {
  delete static_cast<Bench*>(bench);
}
}
