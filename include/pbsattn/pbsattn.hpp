// Permuted Block-Sparse Attention (PBS-Attn) for the prefill of long prompts.
//
//     auto options = pbsattn::method("pbs");  // or, by text, parse_method("pbs:top_p=0.95") of options.hpp
//     pbsattn::Shape shape{.batch = 1, .q_heads = 32, .kv_heads = 8,
//                          .q_len = n, .kv_len = n, .head_dim = 128};
//     auto plan = pbsattn::Plan::create(options, shape, pbsattn::Device::cpu());
//     std::vector<std::byte> workspace(plan.workspace_size());
//     plan.run({.q = q, .k = k, .v = v}, {.out = out}, workspace);
//
// Plan::create is the only place that refuses a configuration; Plan::run checks pointers and strides.
// Errors are exceptions of type pbsattn::Error. The library never prints, exits or aborts.
//
// Source of the method: "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "pbsattn/kept.hpp"

// The library is compiled with hidden symbols; what stands in this header is not hidden.
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

namespace pbsattn {

// ---------------------------------------------------------------------------------------------- errors

enum class ErrorCode {
  invalid_argument,  // a value breaks a rule that holds everywhere
  unsupported,       // the rule is this device's; another device may take it
  out_of_memory,     // workspace smaller than planned, or a cap too small to plan in
  internal,          // a fault of this library
};

// what() names the value, the rule and the way out, in one line.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// ---------------------------------------------------------------------------------------------- shapes

enum class DType : std::uint8_t { f32, f16, bf16 };

// Sizes of one attention call. The queries are the last q_len of kv_len tokens, so q_len < kv_len is a
// chunk of a prefill, or a prefill after a cached prefix; query i sits at token kv_len - q_len + i and
// sees keys 0 .. kv_len - q_len + i.
struct Shape {
  std::int64_t batch = 1;
  std::int64_t q_heads = 1;
  std::int64_t kv_heads = 1;  // divides q_heads; query head h reads KV head h / (q_heads / kv_heads)
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;  // of values and outputs; 0 stands for head_dim
};

// A [batch][head][token][head_dim] tensor that somebody else owns, of values and outputs [head_dim_v]. Strides count
// elements; the last axis is contiguous. BSHD, BHSD and a KV cache's own layout are all just strides.
template <class Void>
struct BasicView {
  Void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};
using ConstView = BasicView<const void>;
using View = BasicView<void>;

// --------------------------------------------------------------------------------------------- methods

// How keys (and their values) move inside their segment before blocks are formed.
enum class Permutation : std::uint8_t {
  none,
  last_queries,  // descending mean attention weight of the last `block` queries (paper, section 3.2)
  learned,       // descending in what a linear model says of the key alone (OrderWeights); one order per KV head
  arrival,  // as last_queries, one order per KV head, which a segment keeps: it is that of the call that completes it
            // (KeyOrder), however many calls come after
};

// How many orders there are: one for each query head (paper), or one for each KV head, from the scores
// averaged over the query heads that share it.
enum class OrderScope : std::uint8_t { query_head, kv_head };

// Which estimate of a key block's attention mass the keep rule reads.
enum class BlockScore : std::uint8_t {
  none,
  mean_pool,  // softmax over blocks of mean(Q block) . mean(K block) * scale (paper, section 3.3)
  per_query,  // mean over the row's queries of softmax over all causal blocks of q . mean(K block) * scale: a pooled
              // query hides that its queries disagree. What is always kept counts first toward top_p.
  // XAttention's: each 8 x 8 patch of queries and keys scored by its antidiagonal's mean, softmax over the patches of a
  // row of patches, summed over blocks and averaged over the row. Over the blocks before the row's own segment (PBS+):
  antidiagonal,
  // or over all causal patches, the own segment's among them; what is always kept then counts first toward top_p.
  antidiagonal_causal,
  exact,  // the mean over the row's queries of their true attention mass on each block, the own segment's among them,
          // as above: what estimates are judged by, at the cost of attention itself
  mean_pool_causal,  // mean_pool over all causal blocks, which compete alike
  sampled,           // the mean of per_query and of exact by 8 of the row's queries, evenly spaced, the last among them
  // FlashPrefill's softmax energy: the sum over the row's queries of exp(q . mean(K block) * scale), not normalised by
  // query, over the causal blocks that the row sees whole.
  energy,
  dual_band,  // Prism's two scores, mean_pool_causal of RoPE's fast and of its slow frequencies, whose temperatures
              // follow from what pooling left of them; a block is kept that either score keeps
  vertical_slash,  // MInference's: of a head's last 64 queries the mass on each key (column) and on each distance
  flexible,  // FlexPrefill's, for each head one of two: pooled attention of all rows, or columns and distances of the
             // last block of queries, where these aren't what pooling predicts
  // In two steps, for KeepRule::threshold: per_query of `two_step_queries` of the row's queries; then, averaged with
  // it, the attention of `two_step_exact` of them to the own segment's keys, to those of blocks whose share is at least
  // threshold / `two_step_reach`, and to the other blocks' means.
  two_step,
};

// Which of the scored blocks are attended to.
enum class KeepRule : std::uint8_t {
  all,
  top_p,      // the highest scores up to and including the one that brings their sum to top_p
  threshold,  // every score of at least `threshold`, or of threshold_tokens / tokens where that is less; no fewer than
              // top-p at `floor_top_p` would keep
  relative,   // every score of at least `threshold` times the row's highest (FlashPrefill)
  top_k,      // the `top_k` highest scores
  density,    // the highest scores, as many as bring the row to `density` of its causal blocks with its own segment
  none,       // none: what is always kept has to do (StreamingLLM, MInference's A-shape)
  vertical_slash,  // of BlockScore::vertical_slash: blocks that hold one of the head's `vertical` heaviest columns or
                   // meet one of its `slash` heaviest diagonals
  coverage,        // of BlockScore::flexible: for each head as many as `top_p` of its attention takes
};

// What stands for the blocks that a row doesn't attend to.
enum class Correction : std::uint8_t {
  none,
  mean,  // each of them is one more key, its mean, with its mean value and the weight of all its keys (FlashPrefill V2)
};

// Two rules on which the paper and its reference code differ.
enum class Rules : std::uint8_t {
  reference_code,  // a row whose scores never sum to top_p keeps none; a tail block's pooled query is its sum / block
  paper,           // such a row keeps all of them; a tail block's pooled query is its mean
};

// Whether a plan may take full attention instead of the method.
enum class Fallback : std::uint8_t {
  never,
  when_faster,  // where the device's cost model expects full attention to be faster at the plan's shape, as it is for
                // short sequences. Plan::options() tells what was taken. The reference never falls back.
};

// What products of matrices are computed in. Accumulation and softmax are always float32.
enum class Precision : std::uint8_t {
  automatic,  // bf16 when q, k and v are all bf16 (their products are then exact), else f32
  f32,        // f32 whatever the inputs
  bf16,       // operands rounded to bf16 where the device multiplies bf16 faster than f32, else f32
};

// A method: permutation x block score x keep rule, and what is always kept. Besides what the rule keeps,
// every query block attends to its own segment (causally) and to the block that holds token 0. Of equal scores
// the lower block counts as the higher score.
struct Options {
  Permutation permutation = Permutation::none;
  OrderScope order_scope = OrderScope::query_head;
  BlockScore score = BlockScore::none;
  KeepRule keep = KeepRule::all;
  Correction correction = Correction::none;
  Rules rules = Rules::reference_code;
  Precision precision = Precision::automatic;
  Fallback fallback = Fallback::never;
  float top_p = 0.9F;       // of KeepRule::top_p and coverage, in (0, 1]; 1 keeps every block
  float threshold = 2e-3F;  // of KeepRule::threshold and relative, in [0, 1]; 0 keeps every block
  float floor_top_p = 0;    // of KeepRule::threshold, in [0, 1]; 0 turns it off, 1 keeps every block
  int top_k = 64;           // of KeepRule::top_k, 0 and up
  float density = 0.2F;     // of KeepRule::density, in [0, 1]; 1 keeps every block
  int vertical = 1000;      // of KeepRule::vertical_slash: columns that a head keeps, the first 30 always among them
  int slash = 6096;         // of KeepRule::vertical_slash: diagonals that a head keeps, the last 100 always among them
  float tau = 0.1F;  // of KeepRule::coverage, in [0, 1]: the distance of two distributions from which on a head goes
                     // by columns and distances
  int min_budget = 1024;    // of KeepRule::coverage: tokens of columns, and of distances, that a head keeps at least
  int block = 128;          // tokens of a query block and of a key block
  int segment = 256;        // tokens of a segment: a multiple of `block`, up to 2^30, the longest sequence
  int dense_last_rows = 0;  // the call's last query blocks that attend to every key block
  int sink_blocks = 0;      // the first blocks of the permuted sequence that every query block attends to
  int local_blocks = 0;     // the last blocks, up to its own, that every query block attends to
  float scale = 0.0F;       // factor on q . k; 0 stands for 1 / sqrt(head_dim)
  // Share of causal blocks that Fallback::when_faster reckons with, in [0, 1]; 0 stands for what was measured at the
  // sequence's length: of two-step scores 0.38 at 8K tokens and 0.12 from 128K on, of others (the paper) 0.58 and 0.22.
  float expected_density = 0.0F;
  // 0: none. Else c of logits c * tanh(q . k * scale / c) (Gemma 2), in attention and in the scores of keys and blocks
  // alike; a product of means, or the mean product of a patch, is capped as one of a query and a key.
  float softcap = 0.0F;
  // Tokens that a query sees, itself the last of them: a sliding window, from 1 up. Where the sequence is longer, a
  // plan computes exactly that window: keys stay where they are, and no score, keep rule, correction or block that is
  // always kept counts. The longest sequence's length, 2^30, hides nothing.
  int window = 1073741824;
  // Of KeepRule::threshold, from 0 up: the threshold of a row is at most this over the tokens up to its block's end, so
  // that it falls as a prompt goes on, however it is cut into chunks. 128, the block, is the mean share. 0 turns it
  // off.
  float threshold_tokens = 0;
  int two_step_queries = 16;  // of BlockScore::two_step: queries of a row in the first step, the last among them
  int two_step_exact = 4;     // and queries whose attention is exact in the second
  int two_step_reach = 4;     // and how far under the threshold a share may lie for its block to be read exactly
};

struct MethodInfo {
  std::string_view name;
  std::string_view summary;
  Options options;
};

// Returns the table of named methods, in the order in which programs list them.
std::span<const MethodInfo> methods();

// Returns the options of a named method. Throws invalid_argument, naming the nearest known name, if there is none.
Options method(std::string_view name);

// --------------------------------------------------------------------------------------------- devices

struct Device {
  enum class Kind : std::uint8_t { cpu, reference, cuda };
  Kind kind = Kind::cpu;
  int threads = 0;  // up to 8192; 0: one for each processor this process may use, by its affinity and by the CPU quota
                    // of its container
  int index = 0;    // of a CUDA device

  // Names the processor: SIMD and multithreaded, its code path chosen from what it has when the plan is made.
  static Device cpu(int threads = 0) { return {Kind::cpu, threads}; }
  // Names the executable definition: naive loops in double precision, for tests and for reading.
  static Device reference() { return {Kind::reference, 1}; }
  // Names an NVIDIA GPU of compute capability 9.0 (H100, H200) by its CUDA index. Inputs, outputs, lse and workspace
  // are in its memory, f16 or bf16, with rows at 16-byte boundaries.
  static Device cuda(int index = 0) { return {Kind::cuda, 1, index}; }
};

// The queue of a device that a run joins: for CUDA a cudaStream_t, null for the default stream.
struct Stream {
  void* handle = nullptr;
};

struct DeviceInfo {
  std::string name;                // "cpu"
  std::string processor;           // the processor's own name
  int threads = 0;                 // processors this process may use, as Device::cpu() counts them
  std::vector<std::string> paths;  // code paths this machine can run, fastest first; where the system must permit one
                                   // (AMX), it is asked by the first plan that takes it, which may be refused
  std::string f32_path;            // the path f32 products take
  std::string bf16_path;           // the path bf16 products take
};

// Returns what Device::cpu() finds on this machine.
DeviceInfo describe_cpu();

// ------------------------------------------------------------------------------------------------ runs

// Which columns of a key RoPE turns together: i and i + head_dim / 2, as rotate_half has them, or 2i and 2i + 1, as
// GGUF's `llama` architectures have.
enum class RopePairs : std::uint8_t { halves, neighbours };

// What Permutation::learned goes by. A key's score is the sum of weight * feature; its features are the lengths
// sqrt(a^2 + b^2) of its head_dim / 2 pairs, in their order, and then its head_dim numbers. Keys of a segment stand in
// descending score, equal ones where they were, NaN last. A KV head whose weights are all 0 keeps its keys' order.
struct OrderWeights {
  std::span<const float> values = {};  // [kv_heads][head_dim / 2 + head_dim]; finite
  RopePairs pairs = RopePairs::halves;
};

// Where keys and values lie in a server's cache, in pages: token t at place t % size of page table[batch][t / size].
// Views of k and v are then [page][kv_head][place][head_dim or head_dim_v], batch_stride from page to page: heads or
// places first, keys and values apart or in one row are strides. On CUDA no run checks the table (docs/caches.md).
struct Pages {
  const std::int32_t* table = nullptr;  // [batch][ceil(kv_len / size)]; null with size 0: k and v lie contiguous
  std::int64_t batch_stride = 0;        // of the table, in entries
  std::int64_t size = 0, count = 0;     // tokens of a page, a multiple of 16; pages of the cache: 0 .. count - 1
};

struct Inputs {
  ConstView q;  // [batch][q_heads][q_len][head_dim]
  ConstView k;  // [batch][kv_heads][kv_len][head_dim], or pages
  ConstView v;  // [batch][kv_heads][kv_len][head_dim_v], or pages
  // [q_heads], or none: a learned logit of each query head (GPT-OSS), which enters every query's softmax as one more
  // key without a value, and the log-sum-exp. Scores of blocks leave it out. Finite ones beyond 2.3e38 count as that.
  // On CUDA in device memory.
  std::span<const float> sinks = {};
  OrderWeights order_weights = {};  // read where the plan's permutation is learned
  Pages pages = {};                 // of k and v
};

struct Outputs {
  View out;              // [batch][q_heads][q_len][head_dim_v]
  float* lse = nullptr;  // [batch][q_heads][q_len] contiguous, natural log-sum-exp of logits; optional
  KeyOrder order = {};   // read and written where the plan's permutation is arrival
  CacheUse cache = {};   // read and written
};
// A query whose every visible logit is -inf, and sink, gives output 0 and log-sum-exp -inf. A NaN or +inf in an input
// spoils (as NaN) the outputs that dense attention would spoil, and no others: a value that isn't finite, even with a
// weight of 0.

struct Stats {
  std::int64_t visited_blocks = 0;  // (query block, key block) pairs computed, over heads and batch
  std::int64_t causal_blocks = 0;   // pairs that dense causal attention computes, diagonal included
  double permute_seconds = 0;
  double select_seconds = 0;
  double attend_seconds = 0;

  // Returns the share of dense attention's pairs that were computed, in [0, 1]; 1 where there are none.
  double density() const {
    return causal_blocks == 0 ? 1.0 : static_cast<double>(visited_blocks) / static_cast<double>(causal_blocks);
  }
  // Returns the time of all stages, in seconds.
  double seconds() const { return permute_seconds + select_seconds + attend_seconds; }
};

// What a call decided, for inspection. Query rows are blocks of `block` tokens aligned to token 0; row r
// of a call holds the queries of token block first_row + r.
struct Trace {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t blocks = 0;  // key blocks: ceil(kv_len / block)
  // [batch][q_heads][kv_len]: the token whose key stands at each slot of the permuted sequence. Where a plan keeps
  // every block, a device may leave keys where they are.
  std::vector<std::int32_t> order;
  // CSR over [batch][q_heads][rows]: key blocks each row attends to, ascending. A block of the row's own
  // segment means the tokens in their original order; any other, slots of the permuted sequence.
  std::vector<std::int64_t> row_start;
  std::vector<std::int32_t> block;
};

namespace detail {
class Executor;
}

// A checked configuration, ready to run on inputs of one shape any number of times.
class Plan {
 public:
  static constexpr std::size_t no_cap = static_cast<std::size_t>(-1);

  // Checks and plans. Throws Error if options, shape and device don't go together, or no workspace of at most
  // workspace_cap bytes suffices. Under a cap the plan works KV head by KV head, or query head by query head.
  static Plan create(const Options& options, const Shape& shape, const Device& device = Device::cpu(),
                     std::size_t workspace_cap = no_cap);

  // Plans with options of each query head, which all batch entries share. Heads may differ in the keep rule and its
  // numbers (top_p to min_budget) and in what is always kept (dense_last_rows, sink_blocks, local_blocks). options()
  // gives the first head's.
  static Plan create(std::span<const Options> heads, const Shape& shape, const Device& device = Device::cpu(),
                     std::size_t workspace_cap = no_cap);

  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;
  ~Plan();

  // Tell what was planned: the options with scale and fallback resolved, the shape, the bytes of workspace that a run
  // needs at any alignment, and the code path of inputs that are not all bf16, e.g. "avx512_f32".
  const Options& options() const noexcept;
  const Shape& shape() const noexcept;
  std::size_t workspace_size() const noexcept;
  std::string_view path() const noexcept;

  // Returns the bytes of a SegmentCache that serves this plan and those of other q_len and kv_len up to `tokens`; 0 of
  // plans that use none. Of `auto`, which is full attention for short ones, ask the plan of the longest. Throws Error
  // for tokens outside 0 .. 2^30.
  std::size_t cache_size(std::int64_t tokens) const;

  // Computes. Throws Error when a pointer is null, the workspace is too small, or what is written - out, lse, the cache
  // and workspace_size() bytes of the workspace - shares memory with the rest or out with itself; tensors may lie
  // between each other's rows, as slices of a packed one. Throws nothing but Error, also when memory is out.
  // Calls from several threads are safe when each brings its own workspace and cache.
  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stats* stats = nullptr,
           Trace* trace = nullptr) const;

  // Computes on a stream of the plan's device: enqueues and returns, without allocation or synchronisation, so it
  // can be captured in a CUDA graph. Buffers must live until the work is done. With stats or trace it waits for its
  // work and reads them back, which a capture can't hold. A CUDA error pending from earlier work is thrown.
  void run(const Inputs& inputs, const Outputs& outputs, std::span<std::byte> workspace, Stream stream,
           Stats* stats = nullptr, Trace* trace = nullptr) const;

 private:
  explicit Plan(std::unique_ptr<detail::Executor> executor);
  std::unique_ptr<detail::Executor> executor_;
};

// Returns the library's version, "major.minor.patch".
std::string_view version();

}  // namespace pbsattn

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
