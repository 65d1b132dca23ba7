// Two attentions over given lists: the exact one, and a plain one in a backend's precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "reference/definition.h"
#include "reference/numbers.h"
#include "support/judge.h"

namespace pbsattn::test {
namespace {

float to_operand(DType products, double x) {
  return static_cast<float>(reference::round_to(products, x));
}

// Returns one head's rows as floats ready to multiply.
std::vector<float> operands(const reference::Matrix& matrix, DType products) {
  std::vector<float> result;
  result.reserve(matrix.values.size());
  for (const double x : matrix.values) result.push_back(to_operand(products, x));
  return result;
}

// Whether the key in a slot of block b is one that the query sees, and which token it is.
struct Visible {
  const Geometry& geometry;
  const std::vector<std::int32_t>& order;
  std::int64_t token;

  std::int64_t key(std::int64_t b, std::int64_t slot) const {
    return b / (geometry.segment / geometry.block) < token / geometry.segment ? order[slot] : slot;
  }
};

// Attends one query. Keys of index `many` and up count for `block` keys each.
void attend_plain_query(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                        std::int64_t dim, std::int64_t dim_v, const Options& options, DType products,
                        const std::vector<std::int64_t>& keys, std::int64_t many, int block, float sink,
                        std::vector<float>& out, float& lse) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> weight;
  float max = sink;
  for (const std::int64_t n : keys) {
    float s = 0;
    for (std::int64_t d = 0; d < dim; ++d) s += q[d] * k[n * dim + d];
    s *= options.scale;
    weight.push_back(options.softcap == 0 ? s : options.softcap * std::tanh(s / options.softcap));
    max = std::max(max, weight.back());
  }
  out.assign(dim_v, 0.0F);
  lse = -infinity;
  if (max == -infinity && std::ranges::none_of(weight, [](float s) { return std::isnan(s); })) {
    for (const std::int64_t n : keys)
      for (std::int64_t d = 0; d < dim_v; ++d) out[d] += 0.0F * v[n * dim_v + d];
    return;
  }
  // An online softmax measures from a maximum so far, not from the last one. So where weights are rounded the
  // largest is not to be the 1 that 16 bits happen to hold.
  if (products != DType::f32) max += 0.3F;
  float sum = sink == -infinity ? 0 : std::exp(sink - max);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const float p =
        to_operand(products, std::exp(weight[i] - max)) * (keys[i] < many ? 1.0F : static_cast<float>(block));
    sum += p;
    for (std::int64_t d = 0; d < dim_v; ++d) out[d] += p * v[keys[i] * dim_v + d];
  }
  for (float& x : out) x /= sum;
  lse = max + std::log(sum);
}

template <class Body>
void for_each_query(const Problem& problem, const Options& options, const Trace& trace, Body&& body) {
  const Geometry geometry = geometry_of(options, problem.shape);
  for (std::int64_t flat = 0; flat < problem.shape.batch * problem.shape.q_heads; ++flat) {
    const auto head =
        reference::load_head(problem.inputs(), geometry, flat / problem.shape.q_heads, flat % problem.shape.q_heads);
    const auto order = head_order(trace, flat, problem.shape.kv_len);
    body(geometry, head, order, [&](std::int64_t query) {
      return row_list(trace, flat, (geometry.q_offset() + query) / geometry.block - geometry.first_row());
    });
  }
}

std::optional<reference::PooledBlocks> pooled_blocks(const Options& options, const reference::Head& head,
                                                     const Geometry& geometry, const std::vector<std::int32_t>& order) {
  if (options.correction == Correction::none) return std::nullopt;
  return reference::PooledBlocks{reference::pool_keys(head, geometry, order),
                                 reference::pool_values(head, geometry, order)};
}

}  // namespace

Values attend_exact(const Problem& problem, const Options& options, const Trace& trace) {
  Values values;
  for_each_query(problem, options, trace,
                 [&](const Geometry& geometry, const auto& head, const auto& order, auto list) {
                   const auto pooled = pooled_blocks(options, head, geometry, order);
                   for (std::int64_t query = 0; query < problem.shape.q_len; ++query) {
                     const auto result = reference::attend_query(head, geometry, reference::Logits(options), query,
                                                                 order, list(query), pooled ? &*pooled : nullptr);
                     values.out.insert(values.out.end(), result.out.begin(), result.out.end());
                     values.lse.push_back(result.lse);
                   }
                 });
  return values;
}

Values attend_plain(const Problem& problem, const Options& options, const Trace& trace, DType products) {
  Values values;
  for_each_query(
      problem, options, trace, [&](const Geometry& geometry, const auto& head, const auto& order, auto list) {
        const auto q = operands(head.q, products);
        auto k = operands(head.k, products);
        auto v = operands(head.v, products);
        if (const auto pooled = pooled_blocks(options, head, geometry, order)) {
          for (const float x : operands(pooled->k, products)) k.push_back(x);
          for (const float x : operands(pooled->v, products)) v.push_back(x);
        }
        const std::int64_t dim = problem.shape.head_dim;
        const std::int64_t many = problem.shape.kv_len;
        std::vector<float> out;
        float lse = 0;
        for (std::int64_t query = 0; query < problem.shape.q_len; ++query) {
          const Visible visible{geometry, order, geometry.q_offset() + query};
          std::vector<std::int64_t> keys;
          const auto blocks = list(query);
          for (const std::int32_t b : blocks)
            for (std::int64_t slot = std::int64_t{b} * geometry.block; slot < (b + 1LL) * geometry.block; ++slot)
              if (slot <= visible.token && slot > visible.token - options.window) keys.push_back(visible.key(b, slot));
          const std::int64_t far = visible.token / geometry.segment * geometry.segment / geometry.block;
          for (std::int64_t b = 0; b < far && options.correction == Correction::mean; ++b)
            if (!std::ranges::binary_search(blocks, b)) keys.push_back(many + b);
          attend_plain_query({q.begin() + query * dim, q.begin() + (query + 1) * dim}, k, v, dim, head.v.columns,
                             options, products, keys, many, geometry.block, static_cast<float>(head.sink), out, lse);
          for (const float x : out) values.out.push_back(reference::round_to(problem.out.dtype, x));
          values.lse.push_back(lse);
        }
      });
  return values;
}

}  // namespace pbsattn::test
