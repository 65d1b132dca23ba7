// Merges two partial attentions by their log-sum-exps:
//     lse = log(exp(lse_a) + exp(lse_b))     out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attend/attend.h"
#include "cuda/attend/merge.cuh"

namespace pbsattn::cuda {
namespace {

constexpr int lanes = 16;  // of a row: each moves 16 bytes at a time
constexpr int threads = 256;
constexpr int elements = 8;  // in 16 bytes

struct Rows {
  std::int64_t count, heads, tokens;
  int head_dim;
};

__device__ float2 widen(__nv_bfloat162 x) {
  return __bfloat1622float2(x);
}
__device__ float2 widen(__half2 x) {
  return __half22float2(x);
}
__device__ void narrow(float2 x, __nv_bfloat162& to) {
  to = __float22bfloat162_rn(x);
}
__device__ void narrow(float2 x, __half2& to) {
  to = __float22half2_rn(x);
}

template <class Pair>
__global__ void __launch_bounds__(threads) merge_rows(Rows rows, ConstView a, const float* a_lse, ConstView b,
                                                      const float* b_lse, View into, float* into_lse) {
  using Vector = struct alignas(16) { Pair pair[elements / 2]; };
  const std::int64_t row = (blockIdx.x * std::int64_t{threads} + threadIdx.x) / lanes;
  if (row >= rows.count) return;
  const int lane = threadIdx.x % lanes;
  const std::int64_t token = row % rows.tokens;
  const std::int64_t head = row / rows.tokens % rows.heads;
  const std::int64_t batch = row / rows.tokens / rows.heads;
  const auto vector = [&](const auto& view, int d) {
    const std::int64_t at = batch * view.batch_stride + head * view.head_stride + token * view.token_stride + d;
    return at / 2;  // in pairs
  };

  const Merger merger(a_lse[row], b_lse[row]);
  for (int d = lane * elements; d < rows.head_dim; d += lanes * elements) {
    const auto x = *reinterpret_cast<const Vector*>(static_cast<const Pair*>(a.data) + vector(a, d));
    const auto y = *reinterpret_cast<const Vector*>(static_cast<const Pair*>(b.data) + vector(b, d));
    Vector z;
    for (int i = 0; i < elements / 2; ++i) {
      const float2 p = widen(x.pair[i]);
      const float2 q = widen(y.pair[i]);
      // A part without weight adds nothing, whatever stands in it.
      const auto mix = [&](float u, float v) {
        return (merger.a == 0 ? 0 : merger.a * u) + (merger.b == 0 ? 0 : merger.b * v);
      };
      narrow({mix(p.x, q.x), mix(p.y, q.y)}, z.pair[i]);
    }
    *reinterpret_cast<Vector*>(static_cast<Pair*>(into.data) + vector(into, d)) = z;
  }
  __syncwarp(__activemask());  // all lanes of the row have read its sums, which may lie where the new one goes
  if (lane == 0) into_lse[row] = merger.lse;
}

}  // namespace

cudaError_t merge(const Partial& a, const Partial& b, const View& into, float* into_lse, std::int64_t batch,
                  std::int64_t heads, std::int64_t tokens, std::int64_t head_dim, cudaStream_t stream) {
  const Rows rows{batch * heads * tokens, heads, tokens, static_cast<int>(head_dim)};
  const auto blocks = static_cast<unsigned>(ceil_div(rows.count * lanes, threads));
  const auto read = [](const View& view) {
    return ConstView{view.data, view.dtype, view.batch_stride, view.head_stride, view.token_stride};
  };
  const auto kernel = into.dtype == DType::bf16 ? merge_rows<__nv_bfloat162> : merge_rows<__half2>;
  kernel<<<blocks, threads, 0, stream>>>(rows, read(a.out), a.lse, read(b.out), b.lse, into, into_lse);
  return cudaGetLastError();
}

}  // namespace pbsattn::cuda
