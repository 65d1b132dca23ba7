// Sparse attention on a stream, then as a CUDA graph that is replayed with other contents. Needs a Hopper GPU.
#include <cuda_runtime_api.h>
#include <pbsattn/pbsattn.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <vector>

namespace {

// Ends the program where a call of CUDA's fails.
void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
T* device_memory(std::size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  return static_cast<T*>(memory);
}

// Random bf16 numbers around 0, as the high halves of floats.
std::vector<std::uint16_t> random_bf16(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> noise;
  std::vector<std::uint16_t> values(count);
  for (std::uint16_t& value : values) {
    const float x = noise(random);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    value = static_cast<std::uint16_t>(bits >> 16);
  }
  return values;
}

}  // namespace

int main() {
  const pbsattn::Shape shape{.batch = 1, .q_heads = 8, .kv_heads = 2, .q_len = 8192, .kv_len = 8192, .head_dim = 128};
  const std::size_t q_size = shape.q_heads * shape.q_len * shape.head_dim;
  const std::size_t kv_size = shape.kv_heads * shape.kv_len * shape.head_dim;
  std::uint16_t* q = device_memory<std::uint16_t>(q_size);
  std::uint16_t* k = device_memory<std::uint16_t>(kv_size);
  std::uint16_t* v = device_memory<std::uint16_t>(kv_size);
  std::uint16_t* out = device_memory<std::uint16_t>(q_size);
  const auto fill = [](std::uint16_t* to, std::size_t count, unsigned seed) {
    check(cudaMemcpy(to, random_bf16(count, seed).data(), 2 * count, cudaMemcpyHostToDevice));
  };
  fill(q, q_size, 1);
  fill(k, kv_size, 2);
  fill(v, kv_size, 3);

  const std::int64_t head = shape.q_len * shape.head_dim;  // elements: tensors are [head][token][head_dim]
  const auto input = [&](const std::uint16_t* data) {
    return pbsattn::ConstView{
        .data = data, .dtype = pbsattn::DType::bf16, .head_stride = head, .token_stride = shape.head_dim};
  };
  const pbsattn::Inputs inputs{.q = input(q), .k = input(k), .v = input(v)};
  const pbsattn::Outputs outputs{
      .out = {.data = out, .dtype = pbsattn::DType::bf16, .head_stride = head, .token_stride = shape.head_dim}};

  try {
    const auto plan = pbsattn::Plan::create(pbsattn::method("pbs"), shape, pbsattn::Device::cuda(0));
    std::byte* memory = device_memory<std::byte>(plan.workspace_size());
    const std::span<std::byte> workspace(memory, plan.workspace_size());
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream));

    // With statistics a run waits for its work; without it enqueues and returns.
    pbsattn::Stats stats;
    plan.run(inputs, outputs, workspace, pbsattn::Stream{stream}, &stats);
    std::printf("density %.3f, %.3f ms\n", stats.density(), 1e3 * stats.seconds());

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    plan.run(inputs, outputs, workspace, pbsattn::Stream{stream});
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&replay, graph, 0));
    for (unsigned prompt = 0; prompt < 3; ++prompt) {
      fill(k, kv_size, 10 + prompt);  // other contents, in the same memory
      check(cudaGraphLaunch(replay, stream));
      check(cudaStreamSynchronize(stream));
      std::uint16_t first = 0;
      check(cudaMemcpy(&first, out, sizeof first, cudaMemcpyDeviceToHost));
      std::printf("prompt %u: first output 0x%04x (bf16)\n", prompt, static_cast<unsigned>(first));
    }
    check(cudaGraphExecDestroy(replay));
    check(cudaGraphDestroy(graph));
    check(cudaStreamDestroy(stream));
    check(cudaFree(memory));
  } catch (const pbsattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (std::uint16_t* tensor : {q, k, v, out}) check(cudaFree(tensor));
}
