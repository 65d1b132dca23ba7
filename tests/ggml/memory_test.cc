// Where the process can have no more memory. A program of its own without threads, for each of which malloc sets memory
// aside.
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>

#include "attention_graph.h"
#include "interface.h"

namespace pbsattn::ggml::test {
namespace {

// Sanitizers reserve address space of their own, which a limit would take from them.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// Lets the process have `room` more bytes.
void limit_memory(rlim_t room, const rlimit& before) {
  std::int64_t pages = 0;
  ASSERT_TRUE(std::ifstream("/proc/self/statm") >> pages);
  const rlimit tight{static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + room, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
}

TEST(Memory, WorkspaceThatCannotBeHadLeavesTheOpToGgml) {
  Config config = default_config();
  ASSERT_EQ(pbsattn_method("pbs", &config.options), PBSATTN_OK);
  ASSERT_TRUE(configure(config)) << ggml_backend_pbsattn_last_error();
  ggml_backend_pbsattn_stats_reset();

  // What is freed goes back at once, so that the workspace, 34 MB of keys and values, is no memory that is still there.
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  malloc_trim(0);
  const AttentionGraph graph({.head_dim = 64, .q_heads = 48, .kv_heads = 48, .n_q = 512, .n_kv = 4096, .offset = 3584});
  const auto expected = graph.compute(Backends(false, 1).all());
  static rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  // The observer is called when an op is taken, before it is computed.
  constexpr rlim_t room = rlim_t{8} << 20;
  ggml_backend_pbsattn_set_observer([](void*, std::int32_t, const pbsattn_shape*, const pbsattn_view*,
                                       const pbsattn_view*, const pbsattn_view*) { limit_memory(room, before); },
                                    nullptr);
  const auto result = graph.compute(Backends(true, 1).all());
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  ggml_backend_pbsattn_set_observer(nullptr, nullptr);

  EXPECT_EQ(result.status, GGML_STATUS_SUCCESS);
  EXPECT_EQ(result.values, expected.values);
  const auto layers = layer_stats();
  ASSERT_EQ(layers.size(), 1U);
  EXPECT_EQ(layers[0].reasons[GGML_PBSATTN_RUN_FAILED], 1);
}

#endif

}  // namespace
}  // namespace pbsattn::ggml::test
