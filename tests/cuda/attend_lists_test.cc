// The attend stage over orders and lists of the test's own making, which no selection would give.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "cuda/attend/attend.h"
#include "cuda/device_run.h"
#include "reference/numbers.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

struct Case {
  std::string name;
  Shape shape;
  double density = 1;  // of the blocks before the own segment; below 0: one row with many, the others with few
  int segment = 256;
  bool shared_order = false;
  DType dtype = DType::bf16;
  TensorLayout layout = TensorLayout::bhsd;
  bool sinks = false;
  float softcap = 0;
  int window = Options{}.window;  // where it hides keys, nothing else is chosen
  bool nan_values = false;        // one in the middle of each block of V, each in a column of its own
  bool dense = false;             // without lists
  cuda::RowParts parts = {};      // those rows list every block

  bool listless(const Geometry& g) const { return dense || g.windowed(); }
};

void PrintTo(const Case& c, std::ostream* stream) {
  *stream << c.name;
}

// A random order inside each complete segment, and random lists with the own segment; without lists all blocks, or
// those of the window.
Trace random_trace(const Case& test, const Geometry& g, std::mt19937_64& random) {
  const Shape& s = g.shape;
  Trace trace{
      .first_row = g.first_row(), .rows = g.rows(), .blocks = g.blocks(), .order = {}, .row_start = {}, .block = {}};
  for (std::int64_t head = 0; head < s.batch * s.q_heads; ++head) {
    const auto begin = trace.order.size();
    if (test.listless(g)) {
      trace.order.resize(begin + s.kv_len);
      std::iota(trace.order.begin() + begin, trace.order.end(), 0);
    } else if (test.shared_order && head % g.group() != 0) {
      const std::vector<std::int32_t> same(trace.order.end() - s.kv_len, trace.order.end());
      trace.order.insert(trace.order.end(), same.begin(), same.end());
    } else {
      trace.order.resize(begin + s.kv_len);
      std::iota(trace.order.begin() + begin, trace.order.end(), 0);
      for (std::int64_t n = 0; n < g.permuted_len(); n += g.segment)
        std::shuffle(trace.order.begin() + begin + n, trace.order.begin() + begin + n + g.segment, random);
    }
    for (std::int64_t r = 0; r < g.rows(); ++r) {
      trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
      const double density = test.density >= 0 ? test.density : r == g.rows() / 2 ? 1 : 0.02;
      for (std::int64_t b = g.window_begin(r); b <= g.diagonal(r); ++b) {
        const bool kept = test.listless(g) || static_cast<double>(random() >> 11) * 0x1p-53 < density;
        if (b >= g.own_begin(r) || kept || r >= g.rows() - test.parts.rows)
          trace.block.push_back(static_cast<std::int32_t>(b));
      }
    }
  }
  trace.row_start.push_back(static_cast<std::int64_t>(trace.block.size()));
  return trace;
}

// K or V of each head with an order, its complete segments in that order.
std::vector<std::uint16_t> permuted(const Tensor& tensor, const Trace& trace, const Geometry& g,
                                    std::int64_t order_heads) {
  const Shape& s = g.shape;
  std::vector<std::uint16_t> result;
  for (std::int64_t batch = 0; batch < s.batch; ++batch) {
    for (std::int64_t h = 0; h < order_heads; ++h) {
      const std::int64_t q_head = h * (s.q_heads / order_heads);
      const std::int32_t* order = trace.order.data() + (batch * s.q_heads + q_head) * s.kv_len;
      for (std::int64_t slot = 0; slot < g.permuted_len(); ++slot) {
        for (std::int64_t d = 0; d < tensor.head_dim; ++d) {
          const double x = tensor.get(batch, g.kv_head(q_head), order[slot], d);
          result.push_back(tensor.dtype == DType::bf16 ? reference::to_bf16(x) : reference::to_f16(x));
        }
      }
    }
  }
  return result;
}

template <class T>
std::unique_ptr<DeviceMemory> on_device(const std::vector<T>& values) {
  auto memory = std::make_unique<DeviceMemory>(std::max<std::size_t>(16, values.size() * sizeof(T)));
  if (!values.empty()) cudaMemcpy(memory->data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return memory;
}

template <class T>
T* pointer(const std::unique_ptr<DeviceMemory>& memory) {
  return reinterpret_cast<T*>(memory->data());
}

class CudaAttend : public testing::TestWithParam<Case> {};

TEST_P(CudaAttend, OutputsAreRightAndTheSameEachTime) {
  const Case& test = GetParam();
  std::mt19937_64 random(11);
  ProblemSpec spec = alike(test.shape, test.dtype, test.layout);
  spec.sinks = test.sinks;
  Problem problem(spec);
  if (test.nan_values) {
    for (std::int64_t h = 0; h < test.shape.kv_heads; ++h)
      for (std::int64_t b = 0; b < test.shape.kv_len / 128; ++b) problem.v.set(0, h, 128 * b + 64, b, std::nan(""));
  }
  Options options = method("pbs");
  options.segment = test.segment;
  options.window = test.window;
  options.softcap = test.softcap;
  options = resolved(options, test.shape);
  const Geometry g = geometry_of(options, test.shape);
  const Trace trace = random_trace(test, g, random);
  const std::int64_t order_heads = test.shared_order ? test.shape.kv_heads : test.shape.q_heads;

  const auto k = on_device(permuted(problem.k, trace, g, order_heads));
  const auto v = on_device(permuted(problem.v, trace, g, order_heads));
  std::vector<std::int32_t> count;
  for (std::size_t i = 0; i + 1 < trace.row_start.size(); ++i)
    count.push_back(static_cast<std::int32_t>(trace.row_start[i + 1] - trace.row_start[i]));
  const auto row_start = on_device(trace.row_start);
  const auto row_count = on_device(count);
  const auto block = on_device(trace.block);
  DeviceMemory scratch(cuda::attend_scratch_size(g, test.parts));
  const cuda::BlockLists lists{pointer<std::int64_t>(row_start), pointer<std::int32_t>(row_count),
                               pointer<std::int32_t>(block)};
  const cuda::Permuted moved{.order_heads = order_heads, .slots = g.permuted_len(), .k = k->data(), .v = v->data()};
  const bool listless = test.listless(g);

  DeviceProblem device(problem);
  const cuda::AttendArgs args{.geometry = g,
                              .scale = options.scale,
                              .softcap = options.softcap,
                              .inputs = device.inputs(),
                              .permuted = listless ? cuda::Permuted{.order_heads = test.shape.kv_heads} : moved,
                              .lists = listless ? cuda::BlockLists{} : lists,
                              .outputs = device.outputs(),
                              .lse_batch_stride = test.shape.q_heads * test.shape.q_len,
                              .parts = test.parts,
                              .scratch = scratch.data()};
  std::vector<std::byte> first;
  for (int run = 0; run < 20; ++run) {
    device.poison_outputs();
    scratch.poison();
    poison_shared_memory();
    expect_success(cuda::attend(args, nullptr));
    expect_success(cudaDeviceSynchronize());
    device.download_outputs(problem);
    if (run == 0) first = problem.out.bytes();
    ASSERT_EQ(problem.out.bytes(), first) << "run " << run;
  }
  EXPECT_TRUE(scratch.guards_intact());
  expect_output(problem, options, trace, test.dtype);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const cuda::Widths widths : cuda::widths) {
    const auto name = [&](const char* rest) { return rest + std::string("_d") + name_of(widths); };
    const auto shape_of = [&](std::int64_t q_len, std::int64_t kv_len, auto... heads) {
      return with_widths(test::shape_of(q_len, kv_len, widths.keys, heads...), widths);
    };
    all.push_back({name("own_segment_alone"), shape_of(900, 900), 0});
    all.push_back({name("half"), shape_of(1500, 1500, 4, 2, 2), 0.5});
    all.push_back({name("one_heavy_row"), shape_of(3000, 3000, 2, 2), -1});
    all.push_back({name("more_tiles_than_processors"), shape_of(2048, 2048, 12, 2), 0.2});
    if (widths.keys == 64)
      all.push_back({name("too_many_tiles_to_sort"), shape_of(1536, 1536, 64, 8, 6), -1, 128, true});
    all.push_back({name("segment_of_block"), shape_of(700, 700), 0.5, 128});
    all.push_back({name("long_segment"), shape_of(1300, 1300), 0.5, 512});
    all.push_back({name("chunk_inside_a_block"), shape_of(300, 1337), 0.5});
    all.push_back({name("one_query"), shape_of(1, 1000), 0.5});
    all.push_back({name("shared_order"), shape_of(1000, 1000, 4, 2), 0.5, 256, true});
    all.push_back({.name = name("nan_in_each_block_of_values"),
                   .shape = shape_of(2048, 2048, 12, 2),
                   .density = 0.2,
                   .nan_values = true});
    all.push_back({.name = name("sinks"), .shape = shape_of(1000, 1000, 12, 2), .density = 0.3, .sinks = true});
    for (const int window : {60, 128, 300})
      for (const bool nan_values : {false, true})
        all.push_back({.name = name(nan_values ? "nan_values_window" : "window") + "_" + std::to_string(window),
                       .shape = shape_of(2048, 2048, 12, 2),
                       .sinks = true,
                       .window = window,
                       .nan_values = nan_values});
    // Few dense tiles are dealt out in turns, here in three, more of them by a counter. They may have one block, or
    // begin inside of one.
    const auto add_dense = [&](const std::string& label, const Shape& shape, bool sinks = false,
                               int window = Options{}.window) {
      for (const bool nan_values : {false, true})
        all.push_back({.name = (nan_values ? "nan_values_" : "") + label,
                       .shape = shape,
                       .sinks = sinks,
                       .window = window,
                       .nan_values = nan_values,
                       .dense = true});
    };
    for (const auto& [label, q_heads] : {std::pair{"dense_in_turns", 32}, {"dense_counted", 48}}) {
      add_dense(name(label), shape_of(384, 384, q_heads, 8, 4));
      add_dense(name(label) + "_sinks", shape_of(384, 384, q_heads, 8, 4), true);
      add_dense(name(label) + "_chunk", shape_of(300, 500, q_heads, 8, 4));
      add_dense(name(label) + "_one_block", shape_of(128, 128, q_heads, 8, 12));
      for (const int window : {100, 200})
        add_dense(name(label) + "_window_" + std::to_string(window), shape_of(384, 384, q_heads, 8, 4), true, window);
    }
    if (cuda::takes_parts(widths.keys)) {
      const auto add_parts = [&](const char* label, const Shape& shape, cuda::RowParts parts, Case rest = {}) {
        rest.name = name(label);
        rest.shape = shape;
        rest.density = 0.3;
        rest.parts = parts;
        all.push_back(rest);
      };
      add_parts("in_two_parts", shape_of(2048, 2048, 12, 2), {1, 2});
      add_parts("rows_in_three_parts", shape_of(700, 2000, 4, 2, 2), {3, 3});
      add_parts("parts_of_a_block", shape_of(300, 1337, 4, 2), {1, 11}, {.shared_order = true});
      add_parts("parts_of_one_row", shape_of(100, 1300, 2, 1, 2), {1, 5},
                {.dtype = DType::f16, .layout = TensorLayout::bshd});
      add_parts("parts_with_sinks", shape_of(300, 2000, 6, 2), {2, 4}, {.sinks = true});
      add_parts("parts_of_nan_values", shape_of(300, 2000, 6, 2), {2, 4}, {.nan_values = true});
      add_parts("parts_with_sinks_of_nan_values", shape_of(300, 2000, 6, 2), {2, 4},
                {.sinks = true, .nan_values = true});
      if (cuda::takes_caps(widths.keys))
        add_parts("capped_parts", shape_of(300, 1500, 4, 2), {1, 3}, {.sinks = true, .softcap = 8});
    }
    all.push_back(
        {name("f16_tokens_first"), shape_of(777, 777, 4, 2, 2), 0.5, 256, false, DType::f16, TensorLayout::bshd});
    if (!cuda::takes_caps(widths.keys)) continue;
    // Far below most logits, amid them, above all, and so far above that its polynomial has no terms left.
    for (const float softcap : {0.5F, 8.0F, 50.0F, 1e4F, 1e8F})
      for (const auto& [type, dtype] : {std::pair{"f16", DType::f16}, {"bf16", DType::bf16}})
        all.push_back({.name = name(type) + "_capped_" + std::to_string(static_cast<int>(10 * softcap)),
                       .shape = shape_of(1000, 1000, 4, 2),
                       .density = 0.5,
                       .dtype = dtype,
                       .softcap = softcap});
    all.push_back({.name = name("capped_window_nan_values"),
                   .shape = shape_of(2048, 2048, 12, 2),
                   .sinks = true,
                   .softcap = 20,
                   .window = 300,
                   .nan_values = true});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Lists, CudaAttend, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace pbsattn::test
