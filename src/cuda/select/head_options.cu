#include "cuda/select/head_options.h"

#include <algorithm>

#include "cuda/sm90/launch.h"

namespace pbsattn::cuda {
namespace {

struct Params {
  static constexpr int most = 48;  // a launch's parameters are 4 KB at most
  HeadOptions options[most];
  int count;
  HeadOptions* to;
};
static_assert(sizeof(Params) <= 4096);

__global__ void __launch_bounds__(Params::most) copy_head_options(const __grid_constant__ Params p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.count) p.to[i] = p.options[i];
}

}  // namespace

cudaError_t write_head_options(std::span<const Options> heads, HeadOptions* to, cudaStream_t stream) {
  for (std::size_t first = 0; first < heads.size(); first += Params::most) {
    Params p{.options = {},
             .count = static_cast<int>(std::min<std::size_t>(heads.size() - first, Params::most)),
             .to = to + first};
    for (int i = 0; i < p.count; ++i) p.options[i] = head_options_of(heads[first + static_cast<std::size_t>(i)]);
    const cudaError_t error =
        launch(copy_head_options, dim3(1), Params::most, 0, stream, Start::after_earlier_kernels, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pbsattn::cuda
