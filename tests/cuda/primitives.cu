#include "cuda/primitives.h"

#include "cuda/attend/consumer.cuh"
#include "cuda/attend/merger.cuh"
#include "cuda/device_run.h"
#include "cuda/permute/key_order.cuh"
#include "cuda/select/keep.cuh"
#include "cuda/select/scores/cut.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/online_sum.cuh"
#include "cuda/sm90/prologue.cuh"
#include "cuda/sm90/swizzled_tile.cuh"
#include "cuda/sm90/tensor_map.h"

namespace pbsattn::test {
namespace {

using namespace cuda;

// A host array's copy in device memory, with guards that are looked at.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : count_(values.size()), memory_(count_ * sizeof(T)) {
    memory_.upload(values.data());
  }
  explicit OnDevice(std::size_t count) : count_(count), memory_(count * sizeof(T)) {}
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> values() const {
    std::vector<T> result(count_);
    memory_.download(result.data());
    expect_success(memory_.guards_intact() ? cudaSuccess : cudaErrorIllegalAddress);
    return result;
  }

 private:
  std::size_t count_;
  DeviceMemory memory_;
};

void expect_launched() {
  expect_success(cudaGetLastError());
  expect_success(cudaDeviceSynchronize());
}

// ------------------------------------------------------------------------------------------------------------- cut

template <Measure measure>
__global__ void __launch_bounds__(cut_threads) cut(const float* values, int size, double limit, int* kept, int* count) {
  const Cut found = cut_within<measure>(limit, size, [&](int i) { return values[i]; });
  for (int i = threadIdx.x; i < size; i += cut_threads) kept[i] = cut_key(values[i], i) >= found.least;
  if (threadIdx.x == 0) *count = found.count;
}

// --------------------------------------------------------------------------------------------------------- keep rule

template <bool by_count>
__global__ void highest(const float* weights, int count, float target, int* length, std::int32_t* list) {
  const int lane = threadIdx.x;
  float largest = 0;
  for (int i = lane; i < count; i += 32) largest = fmaxf(largest, weights[i]);
  Taker taker{weights, find_highest<by_count>(weights, target, 0.0F, warp_max(largest), count, lane)};
  const unsigned lanes_below = (1U << lane) - 1;
  int taken = 0;
  for (int begin = 0; begin < count; begin += 32) {
    const bool takes = taker.takes(begin + lane, begin + lane < count, lanes_below);
    const unsigned lanes = __ballot_sync(~0U, takes);
    if (takes) list[taken + __popc(lanes & lanes_below)] = begin + lane;
    taken += __popc(lanes);
  }
  if (lane == 0) *length = taken;
}

// --------------------------------------------------------------------------------------------------------------- rank

constexpr int rank_threads = 256;

__global__ void __launch_bounds__(rank_threads) rank(const float* scores, int segment, int* from) {
  extern __shared__ int4 memory[];
  int* const score = reinterpret_cast<int*>(memory);
  for (int i = threadIdx.x; i < segment; i += rank_threads) score[i] = sortable(scores[i]);
  __syncthreads();
  rank_keys<rank_threads>(score, segment, threadIdx.x, from);
}

// ------------------------------------------------------------------------------------------------------------- product

constexpr int product_threads = 256;

template <int head_dim>
struct ProductTiles {
  alignas(1024) unsigned char a[SwizzledTile<head_dim>::bytes];
  alignas(1024) unsigned char b[SwizzledTile<head_dim>::bytes];
};

// Two warpgroups, 64 rows of `a` each. `rows_of_a` may be null.
template <int head_dim>
__global__ void __launch_bounds__(product_threads)
    multiply(const __half* a, const __half* b, int rows, const int* rows_of_a, float* product) {
  auto& tiles = aligned_shared<ProductTiles<head_dim>>();
  if (rows_of_a == nullptr)
    load_tile<__half, head_dim, product_threads>(tiles.a, a, head_dim, rows, threadIdx.x);
  else
    gather_tile<__half, head_dim, product_threads>(
        tiles.a, a, [&](int i) -> const __half* { return rows_of_a[i] < 0 ? nullptr : a + rows_of_a[i] * head_dim; });
  load_tile<__half, head_dim, product_threads>(tiles.b, b, head_dim, tile_tokens, threadIdx.x);
  commit_copies();
  wait_copies<0>();
  sm90::fence_async_shared();
  __syncthreads();
  const int first = threadIdx.x / 128 * 64;
  float s[64];
  start_product<__half, head_dim>(s, tiles.a, first, tiles.b);
  sm90::wgmma_wait<0>();
  sm90::pin(s);
  const int row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 64; ++i)
    product[(row + i / 2 % 2 * 8) * tile_tokens + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = s[i];
}

template <int head_dim>
void launch_multiply(const __half* a, const __half* b, int rows, const int* rows_of_a, float* product) {
  constexpr int bytes = aligned_bytes<ProductTiles<head_dim>>;
  expect_success(cudaFuncSetAttribute(multiply<head_dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  multiply<head_dim><<<1, product_threads, bytes>>>(a, b, rows, rows_of_a, product);
}

// ------------------------------------------------------------------------------------------------- attend's tiles

template <int keys, int values>
using Step = attention::Shared<__half, keys, values, 1, true>;

template <class Tile, int width, int rows, int panel>
__global__ void __launch_bounds__(128)
    copy_step(const __grid_constant__ CUtensorMap map, int first, int bytes, float* to) {
  struct Memory {
    alignas(1024) Tile tile;
    sm90::Barrier full;
  };
  auto& memory = aligned_shared<Memory>();
  if (threadIdx.x == 0) {
    memory.full.init(1);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    memory.full.arrive_expecting(bytes);
    sm90::tma_load(&memory.tile, map, memory.full, 0, first, 0, 0, 0);
  }
  memory.full.wait(0);
  for (int i = threadIdx.x; i < rows * width; i += 128) {
    const int row = i / width;
    const int column = i % width;
    const int place = swizzled<panel>(column % panel / 8, row) * 8 + column % 8;
    to[i] = __half2float(memory.tile[column / panel][row][place]);
  }
}

// One warpgroup. V is written where the copy engine would, and ones as attend does.
template <int keys, int values>
__global__ void __launch_bounds__(128) sum_weighted(const __half* weights, const __half* v, float* sums) {
  using Shared = Step<keys, values>;
  constexpr int step = Shared::step;
  constexpr int panel = Shared::panel_v;
  constexpr int panel_bytes = step * panel * 2;
  struct Memory {
    alignas(1024) typename Shared::VStage stage;
  };
  auto& memory = aligned_shared<Memory>();
  for (int i = threadIdx.x; i < step * values; i += 128) {
    const int column = i % values;
    const int row = i / values;
    memory.stage.tile[column / panel][row][swizzled<panel>(column % panel / 8, row) * 8 + column % 8] = v[i];
  }
  for (int i = threadIdx.x; i < step * 8; i += 128)
    memory.stage.ones[i / 8][swizzled<panel>(0, i / 8) * 8 + i % 8] = __half(1.0F);
  sm90::fence_async_shared();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int column = threadIdx.x % 4 * 2;
  std::uint32_t packed[step / 4];
#pragma unroll
  for (int i = 0; i < step / 4; ++i)
    packed[i] = *reinterpret_cast<const std::uint32_t*>(weights + (row + i % 2 * 8) * 128 + i / 2 * 8 + column);
  float o[values / 2 + 4];
#pragma unroll
  for (float& x : o) x = NAN;  // which the first product doesn't add to
  const std::uint64_t operand = sm90::operand<panel>(&memory.stage, panel_bytes);
  sm90::pin(o);
  sm90::wgmma_fence();
#pragma unroll
  for (int key = 0; key < step; key += 16)
    attention::multiply_values<__half, panel>(o, packed + key / 4, sm90::advance(operand, key * panel * 2), panel_bytes,
                                              key > 0);
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::pin(o);
#pragma unroll
  for (int i = 0; i < values / 2 + 4; ++i)
    sums[(row + i / 2 % 2 * 8) * (values + 8) + i / 4 * 8 + column + i % 2] = o[i];
}

// ------------------------------------------------------------------------------------------------------ lanes, places

__global__ void reduce(const float* lanes, float* reduced) {
  const float x = lanes[threadIdx.x];
  float* const to = reduced + threadIdx.x;
  to[0] = warp_sum(x);
  to[32] = warp_max(x);
  to[64] = quad_sum(x);
  to[96] = quad_max(x);
}

// Lanes of a quad fold every fourth product; they merge at the end.
__global__ void log_sum(const float* products, int count, float scale_log2, float* result) {
  Statistics total;
  for (int i = threadIdx.x % 4; i < count; i += 4) total.merge({products[i], 1}, scale_log2);
  total.merge_across_lanes(scale_log2);
  if (threadIdx.x == 0) *result = total.max * scale_log2 + log2f(total.sum);
}

__global__ void merge(float lse_a, float lse_b, float* merged) {
  const Merger merger(lse_a, lse_b);
  merged[0] = merger.a;
  merged[1] = merger.b;
  merged[2] = merger.lse;
}

constexpr int head = 3;

PBSATTN_DEVICE RowPlace place_of(const RowGrid& grid, int row) {
  const int diagonal = grid.diagonal(row);
  const Span queries = grid.queries_of(diagonal);
  return {grid.own_begin(diagonal), grid.first_query(diagonal), queries.begin, queries.end, grid.list_start(head, row)};
}

__global__ void find_places(const __grid_constant__ RowGrid grid, RowPlace* places) {
  for (int row = threadIdx.x; row < grid.rows; row += blockDim.x) places[row] = place_of(grid, row);
}

}  // namespace

CutResult run_cut(const std::vector<float>& values, double limit, bool by_sum) {
  const OnDevice<float> on_device(values);
  const OnDevice<int> kept(values.size()), count(1);
  const auto kernel = by_sum ? cut<Measure::sum> : cut<Measure::number>;
  kernel<<<1, cut_threads>>>(on_device.data(), static_cast<int>(values.size()), limit, kept.data(), count.data());
  expect_launched();
  const std::vector<int> flags = kept.values();
  return {{flags.begin(), flags.end()}, count.values()[0]};
}

std::vector<std::int32_t> run_find_highest(const std::vector<float>& weights, float target, bool by_count) {
  const OnDevice<float> on_device(weights);
  const OnDevice<std::int32_t> list(weights.size());
  const OnDevice<int> length(1);
  const auto kernel = by_count ? highest<true> : highest<false>;
  kernel<<<1, 32>>>(on_device.data(), static_cast<int>(weights.size()), target, length.data(), list.data());
  expect_launched();
  std::vector<std::int32_t> taken = list.values();
  taken.resize(length.values()[0]);
  return taken;
}

std::vector<int> run_rank_keys(const std::vector<float>& scores) {
  const OnDevice<float> on_device(scores);
  const OnDevice<int> from(scores.size());
  const auto segment = static_cast<int>(scores.size());
  rank<<<1, rank_threads, segment * sizeof(int)>>>(on_device.data(), segment, from.data());
  expect_launched();
  return from.values();
}

std::vector<float> run_product(const std::vector<float>& a, const std::vector<float>& b, int head_dim, int rows,
                               const std::vector<int>* rows_of_a) {
  const OnDevice<__half> device_a(std::vector<__half>(a.begin(), a.end())),
      device_b(std::vector<__half>(b.begin(), b.end()));
  const OnDevice<int> device_rows(rows_of_a == nullptr ? std::vector<int>(1) : *rows_of_a);
  const OnDevice<float> product(tile_tokens * tile_tokens);
  expect_success(dispatch(DType::f16, head_dim, [&]<class T, int dim>(T, std::integral_constant<int, dim>) {
    launch_multiply<dim>(device_a.data(), device_b.data(), rows, rows_of_a == nullptr ? nullptr : device_rows.data(),
                         product.data());
    return cudaSuccess;
  }));
  expect_launched();
  return product.values();
}

std::vector<float> run_step_copy(const std::vector<float>& rows, Widths widths, bool values, int stride, int tokens,
                                 int first) {
  const OnDevice<__half> device_rows(std::vector<__half>(rows.begin(), rows.end()));
  std::vector<float> copied;
  const Shape shape{.head_dim = widths.keys, .head_dim_v = widths.values};
  expect_success(dispatch(DType::f16, shape, [&](auto, auto keys, auto of_values) {
    using OfTile = Step<keys(), of_values()>;
    const auto copy = [&]<class Tile, int width, int panel>(std::type_identity<Tile>,
                                                            std::integer_sequence<int, width, panel>) {
      const OnDevice<float> to(OfTile::step * width);
      CUtensorMap map;
      if (!make_tensor_map(map, device_rows.data(), DType::f16, 0, 0, stride, 1, 1, tokens, width,
                           Box{.tokens = OfTile::step, .columns = width, .panel = panel}))
        return cudaErrorInvalidValue;
      constexpr int bytes = sizeof(Tile) + 2 * shared_alignment;
      const auto kernel = copy_step<Tile, width, OfTile::step, panel>;
      expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      kernel<<<1, 128, bytes>>>(map, first, sizeof(Tile), to.data());
      expect_launched();
      copied = to.values();
      return cudaSuccess;
    };
    return values ? copy(std::type_identity<typename OfTile::VTile>{},
                         std::integer_sequence<int, of_values(), OfTile::panel_v>{})
                  : copy(std::type_identity<typename OfTile::KTile>{},
                         std::integer_sequence<int, keys(), OfTile::panel>{});
  }));
  return copied;
}

WeightedSums run_weighted_sums(const std::vector<float>& weights, const std::vector<float>& v, Widths widths) {
  const OnDevice<__half> device_weights(std::vector<__half>(weights.begin(), weights.end())),
      device_v(std::vector<__half>(v.begin(), v.end()));
  const OnDevice<float> sums(64 * (widths.values + 8));
  int step = 0;
  const Shape shape{.head_dim = widths.keys, .head_dim_v = widths.values};
  expect_success(dispatch(DType::f16, shape, [&](auto, auto keys, auto values) {
    using OfTile = Step<keys(), values()>;
    step = OfTile::step;
    constexpr int bytes = sizeof(typename OfTile::VStage) + 2 * shared_alignment;
    const auto kernel = sum_weighted<keys(), values()>;
    expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<1, 128, bytes>>>(device_weights.data(), device_v.data(), sums.data());
    expect_launched();
    return cudaSuccess;
  }));
  return {step, sums.values()};
}

Reduced run_reductions(const std::vector<float>& lanes) {
  const OnDevice<float> on_device(lanes), reduced(4 * 32);
  reduce<<<1, 32>>>(on_device.data(), reduced.data());
  expect_launched();
  const std::vector<float> all = reduced.values();
  const auto part = [&](int i) { return std::vector<float>(all.begin() + i * 32, all.begin() + (i + 1) * 32); };
  return {part(0), part(1), part(2), part(3)};
}

float run_log_sum(const std::vector<float>& products, float scale_log2) {
  const OnDevice<float> on_device(products), result(1);
  // A whole warp, as the exchange between lanes names all of them; the other quads do the first's work again.
  log_sum<<<1, 32>>>(on_device.data(), static_cast<int>(products.size()), scale_log2, result.data());
  expect_launched();
  return result.values()[0];
}

Merged run_merger(float lse_a, float lse_b) {
  const OnDevice<float> merged(3);
  merge<<<1, 1>>>(lse_a, lse_b, merged.data());
  expect_launched();
  const std::vector<float> all = merged.values();
  return {all[0], all[1], all[2]};
}

std::vector<RowPlace> run_row_grid(const RowGrid& grid) {
  const OnDevice<RowPlace> places(grid.rows);
  find_places<<<1, 256>>>(grid, places.data());
  expect_launched();
  return places.values();
}

std::vector<RowPlace> row_places(const RowGrid& grid) {
  std::vector<RowPlace> places;
  for (int row = 0; row < grid.rows; ++row) places.push_back(place_of(grid, row));
  return places;
}

}  // namespace pbsattn::test
