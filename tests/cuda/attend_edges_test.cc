// Keys that stand out at each place of a block: where a tile's first weights go by a few columns' maxima, where a half
// of its first block is masked for one consumer alone, and where a window's edge hides keys before they are weighed.
#include <gtest/gtest.h>

#include "cuda/device_run.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

class CudaEdges : public testing::TestWithParam<cuda::Widths> {};

TEST_P(CudaEdges, GreatKeysAtEachPlaceOfABlock) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const std::int64_t place : {0, 1, 7, 8, 62, 63, 64, 65, 72, 127})
      for (const int window : {Options{}.window, 300, 128, 70}) {
        SCOPED_TRACE("place " + std::to_string(place) + ", window " + std::to_string(window) +
                     (dtype == DType::f16 ? ", f16" : ""));
        Problem problem(alike(with_widths(shape_of(330, 330), GetParam()), dtype));
        for (std::int64_t token = place; token < 330; token += 128)
          for (std::int64_t d = 0; d < GetParam().keys; ++d)
            problem.k.set(0, 0, token, d, 40 * problem.k.get(0, 0, token, d));
        Options options = method("full");
        options.window = window;
        expect_right(problem, run_on_device(options, problem), dtype);
      }
}

INSTANTIATE_TEST_SUITE_P(Widths, CudaEdges, testing::ValuesIn(cuda::widths),
                         [](const auto& test) { return "dim" + name_of(test.param); });

}  // namespace
}  // namespace pbsattn::test
