#include "cuda/device_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace pbsattn::test {
namespace {

constexpr int nan_pattern = 0xFF;

template <class V>
V moved(V view, const Tensor& tensor, const DeviceMemory& memory) {
  const auto offset = static_cast<const std::byte*>(tensor.view().data) - tensor.bytes().data();
  view.data = memory.data() + offset;
  return view;
}

}  // namespace

void expect_success(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

DeviceMemory::DeviceMemory(std::size_t bytes) : bytes_(bytes) {
  expect_success(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes + 2 * guard));
  poison();
}
DeviceMemory::~DeviceMemory() {
  cudaFree(memory_);
}
void DeviceMemory::poison() {
  expect_success(cudaMemset(memory_, nan_pattern, bytes_ + 2 * guard));
  // It is the default stream's work, and streams that don't wait for that one may come first.
  expect_success(cudaDeviceSynchronize());
}
void DeviceMemory::upload(const void* from) {
  expect_success(cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice));
}
void DeviceMemory::download(void* to) const {
  expect_success(cudaMemcpy(to, data(), bytes_, cudaMemcpyDeviceToHost));
}
bool DeviceMemory::guards_intact() const {
  std::vector<std::byte> bytes(2 * guard);
  expect_success(cudaMemcpy(bytes.data(), memory_, guard, cudaMemcpyDeviceToHost));
  expect_success(cudaMemcpy(bytes.data() + guard, memory_ + guard + bytes_, guard, cudaMemcpyDeviceToHost));
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{nan_pattern}; });
}

DeviceProblem::DeviceProblem(const Problem& problem)
    : q_(problem.q.bytes().size()),
      k_(problem.k.bytes().size()),
      v_(problem.v.bytes().size()),
      out_(problem.out.bytes().size()),
      lse_(problem.lse.size() * sizeof(float)),
      order_weights_(problem.order_weights.size() * sizeof(float)),
      order_(problem.order.size() * sizeof(std::int32_t)),
      sinks_(problem.sinks.size() * sizeof(float)),
      inputs_{.q = moved(problem.q.view(), problem.q, q_),
              .k = moved(problem.k.view(), problem.k, k_),
              .v = moved(problem.v.view(), problem.v, v_),
              .sinks = {reinterpret_cast<const float*>(sinks_.data()), problem.sinks.size()}} {
  const ConstView out = problem.out.view();
  outputs_.out = {.data = nullptr,
                  .dtype = out.dtype,
                  .batch_stride = out.batch_stride,
                  .head_stride = out.head_stride,
                  .token_stride = out.token_stride};
  outputs_.out = moved(outputs_.out, problem.out, out_);
  outputs_.lse = reinterpret_cast<float*>(lse_.data());
  outputs_.order = problem.kept_order();
  if (!problem.order.empty()) outputs_.order.data = reinterpret_cast<std::int32_t*>(order_.data());
  inputs_.order_weights = {{reinterpret_cast<const float*>(order_weights_.data()), problem.order_weights.size()},
                           problem.pairs};
  order_.upload(problem.order.data());
  upload_inputs(problem);
  out_.upload(problem.out.bytes().data());  // with the poison between its rows
}
void DeviceProblem::upload_inputs(const Problem& problem) {
  q_.upload(problem.q.bytes().data());
  k_.upload(problem.k.bytes().data());
  v_.upload(problem.v.bytes().data());
  order_weights_.upload(problem.order_weights.data());
  sinks_.upload(problem.sinks.data());
}
void DeviceProblem::download_outputs(Problem& problem) const {
  const std::byte* first = problem.out.bytes().data();
  out_.download(const_cast<std::byte*>(first));  // the tensor is not const, only its bytes() is
  lse_.download(problem.lse.data());
  order_.download(problem.order.data());
  EXPECT_TRUE(problem.out.padding_intact());
  EXPECT_TRUE(out_.guards_intact());
  EXPECT_TRUE(lse_.guards_intact());
  EXPECT_TRUE(order_.guards_intact());
}
void DeviceProblem::poison_inputs() {
  for (DeviceMemory* memory : {&q_, &k_, &v_, &sinks_}) memory->poison();
}
void DeviceProblem::copy_inputs_slowly(const DeviceProblem& from, cudaStream_t stream) {
  copy_slowly(q_.data(), from.q_.data(), q_.size(), stream);
  copy_slowly(k_.data(), from.k_.data(), k_.size(), stream);
  copy_slowly(v_.data(), from.v_.data(), v_.size(), stream);
  copy_slowly(sinks_.data(), from.sinks_.data(), sinks_.size(), stream);
}
void DeviceProblem::copy_output_slowly(const DeviceMemory& to, cudaStream_t stream) const {
  copy_slowly(to.data(), out_.data(), out_.size(), stream);
}
void DeviceProblem::poison_outputs() {
  out_.poison();
  lse_.poison();
}

namespace {

RunResult run_on_device(const Plan& plan, Problem& problem, const DeviceRunOptions& how) {
  RunResult result = result_of(plan);
  EXPECT_LE(plan.workspace_size(), how.cap);
  problem.out.fill(std::nan(""));
  DeviceProblem device(problem);
  const DeviceMemory workspace(how.misalign + plan.workspace_size());
  plan.run(device.inputs(), device.outputs(), {workspace.data() + how.misalign, plan.workspace_size()}, Stream{},
           &result.stats, &result.trace);
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.guards_intact());
  device.download_outputs(problem);
  return result;
}

}  // namespace

RunResult run_on_device(const Options& options, Problem& problem, const DeviceRunOptions& how) {
  return run_on_device(Plan::create(options, problem.shape, Device::cuda(), how.cap), problem, how);
}

RunResult run_on_device(std::span<const Options> heads, Problem& problem, const DeviceRunOptions& how) {
  if (heads.size() == 1) return run_on_device(heads.front(), problem, how);
  return run_on_device(Plan::create(heads, problem.shape, Device::cuda(), how.cap), problem, how);
}

void forget_written(Problem& problem) {
  const std::int64_t heads = problem.shape.batch * problem.shape.kv_heads;
  const std::int64_t tokens = std::ssize(problem.order) / heads;
  for (std::int64_t i = 0; i < std::ssize(problem.order); ++i)
    if (i % tokens >= problem.known) problem.order[i] = -1;
}

}  // namespace pbsattn::test
