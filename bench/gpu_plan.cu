// Times the CUDA backend's plan stage by stage, on random inputs with some keys that draw most queries.
//
//     gpu_plan [--json FILE] [--tokens N]... [--million]
//
// Stage times come from events on a stream that earlier runs keep busy; whole calls from replays of a CUDA graph.
// Inputs and outputs rotate among sets that together exceed the L2 cache several times.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "pbsattn/pbsattn.hpp"

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__device__ float uniform(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<float>((x ^ (x >> 31)) >> 40) * 0x1p-24F + 0x1p-25F;
}
__device__ float normal(std::uint64_t x) {
  return sqrtf(-2.0F * logf(uniform(2 * x + 1))) * cospif(2.0F * uniform(2 * x + 2));
}

// Normal elements, plus for each token a pull along a direction that all tokens share, log-normal in strength.
__global__ void fill(__nv_bfloat16* to, std::int64_t elements, int head_dim, float pull, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::uint64_t token = i / head_dim;
    const float strength = pull == 0 ? 0 : pull * expf(normal(seed * 0x9E3779B97F4A7C15ULL + token));
    to[i] = __float2bfloat16(normal(seed * 0xD1B54A32D192ED03ULL + 77 + i) + strength * normal(i % head_dim));
  }
}

class Tensor {
 public:
  Tensor(std::int64_t heads, std::int64_t tokens, std::int64_t head_dim, float pull, std::uint64_t seed)
      : view{.dtype = pbsattn::DType::bf16,
             .batch_stride = heads * tokens * head_dim,
             .head_stride = tokens * head_dim,
             .token_stride = head_dim} {
    check(cudaMalloc(&view.data, view.batch_stride * sizeof(__nv_bfloat16)));
    fill<<<4096, 256>>>(static_cast<__nv_bfloat16*>(view.data), view.batch_stride, static_cast<int>(head_dim), pull,
                        seed);
    check(cudaGetLastError());
  }
  ~Tensor() { cudaFree(view.data); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  pbsattn::ConstView input() const {
    return {view.data, view.dtype, view.batch_stride, view.head_stride, view.token_stride};
  }
  pbsattn::View view;
};

struct Set {
  Set(const pbsattn::Shape& s, std::uint64_t seed)
      : q(s.q_heads, s.q_len, s.head_dim, 0.5F, seed),
        k(s.kv_heads, s.kv_len, s.head_dim, 0.15F, seed + 100),
        v(s.kv_heads, s.kv_len, s.head_dim, 0.0F, seed + 200),
        out(s.q_heads, s.q_len, s.head_dim, 0.0F, seed + 300) {}
  pbsattn::Inputs inputs() const { return {.q = q.input(), .k = k.input(), .v = v.input()}; }
  pbsattn::Outputs outputs() const { return {.out = out.view}; }
  Tensor q, k, v, out;
};

struct Times {
  std::vector<double> values;
  double median() {
    std::ranges::sort(values);
    return values[values.size() / 2];
  }
  double spread() const { return values.back() / values.front() - 1; }
};

class Report {
 public:
  explicit Report(const char* path) : file_(path == nullptr ? nullptr : std::fopen(path, "w")) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0));
    device_ = properties.name;
    if (file_ != nullptr) std::fputs("[", file_);
    std::printf("%s\n%9s %-24s %8s %9s %9s %9s %9s %7s %9s\n", properties.name, "tokens", "case", "density", "permute",
                "select", "attend", "whole", "spread", "workspace");
  }
  ~Report() {
    if (file_ == nullptr) return;
    std::fputs("\n]\n", file_);
    std::fclose(file_);
  }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void add(const pbsattn::Shape& s, const char* name, const char* metric, double seconds, double density,
           std::size_t runs, double spread) {
    if (file_ == nullptr) return;
    std::fprintf(
        file_,
        "%s\n {\"suite\": \"gpu\", \"case\": \"%s\", \"params\": {\"n\": %lld, \"head_dim\": %lld, \"q_heads\": "
        "%lld, \"kv_heads\": %lld, \"dtype\": \"bf16\", \"density\": %.4f}, \"metric\": \"%s\", \"value\": "
        "%.6g, \"unit\": \"s\", \"peer\": null, \"peer_value\": null, \"ratio\": null, \"runs\": %zu, "
        "\"spread\": %.3f, \"device\": \"%s\"}",
        first_ ? "" : ",", name, static_cast<long long>(s.kv_len), static_cast<long long>(s.head_dim),
        static_cast<long long>(s.q_heads), static_cast<long long>(s.kv_heads), density, metric, seconds, runs, spread,
        device_.c_str());
    first_ = false;
  }

 private:
  std::FILE* file_;
  std::string device_;
  bool first_ = true;
};

void measure(Report& report, const char* name, const pbsattn::Options& options, const pbsattn::Shape& shape,
             const std::vector<std::unique_ptr<Set>>& sets, std::size_t cap, int repeats) {
  const auto plan = pbsattn::Plan::create(options, shape, pbsattn::Device::cuda(), cap);
  void* memory = nullptr;
  check(cudaMalloc(&memory, plan.workspace_size()));
  const std::span<std::byte> workspace(static_cast<std::byte*>(memory), plan.workspace_size());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  const pbsattn::Stream on{stream};
  Times permute, select, attend, whole;
  double density = 1;
  for (int i = 0; i < repeats; ++i) {
    const Set& set = *sets[i % sets.size()];
    plan.run(set.inputs(), set.outputs(), workspace, on);  // keeps the device busy while the next run is enqueued
    pbsattn::Stats stats;
    plan.run(set.inputs(), set.outputs(), workspace, on, &stats);
    if (i == 0 && repeats > 1) continue;
    permute.values.push_back(stats.permute_seconds);
    select.values.push_back(stats.select_seconds);
    attend.values.push_back(stats.attend_seconds);
    density = stats.density();
  }

  std::vector<cudaGraphExec_t> graphs;
  for (const auto& set : sets) {
    if (repeats == 1) {  // too long to repeat
      whole.values.push_back(permute.values[0] + select.values[0] + attend.values[0]);
      break;
    }
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    plan.run(set->inputs(), set->outputs(), workspace, on);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&graphs.emplace_back(), graph, 0));
    check(cudaGraphDestroy(graph));
  }
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < repeats && !graphs.empty(); ++i) {
    constexpr int replays = 4;
    check(cudaGraphLaunch(graphs[i % graphs.size()], stream));
    check(cudaEventRecord(begin, stream));
    for (int r = 0; r < replays; ++r) check(cudaGraphLaunch(graphs[(i + r) % graphs.size()], stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    whole.values.push_back(milliseconds * 1e-3 / replays);
  }
  const double medians[] = {permute.median(), select.median(), attend.median(), whole.median()};
  std::printf("%9lld %-24s %8.4f %7.3fms %7.3fms %7.3fms %7.3fms %6.1f%% %6.0fMiB\n",
              static_cast<long long>(shape.kv_len), name, density, medians[0] * 1e3, medians[1] * 1e3, medians[2] * 1e3,
              medians[3] * 1e3, whole.spread() * 100, static_cast<double>(plan.workspace_size()) / (1 << 20));
  report.add(shape, name, "permute", medians[0], density, permute.values.size(), permute.spread());
  report.add(shape, name, "select", medians[1], density, select.values.size(), select.spread());
  report.add(shape, name, "attend", medians[2], density, attend.values.size(), attend.spread());
  report.add(shape, name, "whole", medians[3], density, whole.values.size(), whole.spread());
  for (const auto graph : graphs) check(cudaGraphExecDestroy(graph));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaStreamDestroy(stream));
  check(cudaFree(memory));
}

pbsattn::Shape shape_of(std::int64_t tokens) {
  return {.batch = 1, .q_heads = 32, .kv_heads = 8, .q_len = tokens, .kv_len = tokens, .head_dim = 128};
}

}  // namespace

int main(int argc, char** argv) try {
  const char* json = nullptr;
  bool million = false;
  std::vector<std::int64_t> lengths;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json" && i + 1 < argc) {
      json = argv[++i];
    } else if (argument == "--tokens" && i + 1 < argc) {
      lengths.push_back(std::atoll(argv[++i]));
    } else if (argument == "--million") {
      million = true;
    } else {
      std::fprintf(stderr, "usage: gpu_plan [--json FILE] [--tokens N]... [--million]\n");
      return 2;
    }
  }
  if (lengths.empty()) lengths = {8192, 32'768, 131'072};
  Report report(json);
  constexpr std::size_t mib = std::size_t{1} << 20;
  const pbsattn::Options pbs = pbsattn::method("pbs");
  pbsattn::Options shared_order = pbs;
  shared_order.order_scope = pbsattn::OrderScope::kv_head;
  for (const std::int64_t tokens : lengths) {
    const pbsattn::Shape shape = shape_of(tokens);
    std::vector<std::unique_ptr<Set>> sets;
    const int count = tokens <= 8192 ? 4 : tokens <= 32'768 ? 2 : 1;
    for (int i = 0; i < count; ++i) sets.push_back(std::make_unique<Set>(shape, i + 1));
    const int repeats = tokens <= 32'768 ? 15 : 5;
    measure(report, "full", pbsattn::method("full"), shape, sets, pbsattn::Plan::no_cap, repeats);
    measure(report, "pbs", pbs, shape, sets, pbsattn::Plan::no_cap, repeats);
    measure(report, "pbs, shared order", shared_order, shape, sets, pbsattn::Plan::no_cap, repeats);
    if (tokens >= 131'072) measure(report, "pbs, 512 MiB cap", pbs, shape, sets, 512 * mib, repeats);
  }
  if (million) {
    const pbsattn::Shape shape = shape_of(1 << 20);
    std::vector<std::unique_ptr<Set>> sets;
    sets.push_back(std::make_unique<Set>(shape, 1));
    pbsattn::Options sparse = pbs;
    sparse.top_p = 0.1F;
    measure(report, "pbs, top_p .1, 1 GiB cap", sparse, shape, sets, 1024 * mib, 1);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
