// pbsattn._core: options, plans and tables of the library for Python.
//
// It knows no framework. Tensors arrive as addresses and strides and the stream as a handle, so the module
// depends on no version of PyTorch; pbsattn/_op.py takes tensors apart.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "learned_file.h"
#include "pbsattn/options.hpp"
#include "pbsattn/pbsattn.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using pbsattn::Options;

// ------------------------------------------------------------------------------------------------ options

// Sets the fields that a dict names and gives a value other than None.
struct Setter {
  nb::dict overrides;
  std::size_t known = 0;  // of the overrides

  template <class T>
  void operator()(std::string_view name, T& field) {
    const nb::str key(name.data(), name.size());
    if (!overrides.contains(key)) return;
    ++known;
    const nb::object given = overrides[key];
    if (given.is_none()) return;
    if constexpr (std::is_enum_v<T>) {
      set_choice(name, given, field);
    } else if (!nb::try_cast(given, field)) {
      throw nb::type_error((std::string(name) + " " + nb::repr(given).c_str() + ": not " +
                            (std::is_integral_v<T> ? "an int of 32 bits" : "a float"))
                               .c_str());
    }
  }

  template <class Enum>
  static void set_choice(std::string_view name, const nb::object& given, Enum& field) {
    std::string choices;
    for (std::size_t i = 0; i < pbsattn::Names<Enum>::values.size(); ++i) {
      const std::string_view choice = pbsattn::Names<Enum>::values[i];
      if (nb::isinstance<nb::str>(given) && nb::cast<std::string_view>(given) == choice) {
        field = static_cast<Enum>(i);
        return;
      }
      choices += (i == 0 ? "\"" : ", \"") + std::string(choice) + "\"";
    }
    throw nb::value_error(
        (std::string(name) + " " + nb::repr(given).c_str() + ": no such value; there are " + choices).c_str());
  }
};

nb::dict to_dict(const Options& options) {
  nb::dict fields;
  pbsattn::visit_options(options, [&](std::string_view name, auto field) {
    fields[nb::str(name.data(), name.size())] = pbsattn::plain_value(field);
  });
  return fields;
}

Options make_options(const nb::object& method, const nb::kwargs& overrides) {
  std::string_view text;
  // Not by the signature, whose refusal has several lines.
  if (!nb::try_cast(method, text))
    throw nb::type_error(
        (std::string("method ") + nb::repr(method).c_str() + ": no text; pass, say, \"pbs\" or \"pbs:top_p=0.95\"")
            .c_str());
  Options options = pbsattn::parse_method(text);
  Setter setter{nb::borrow<nb::dict>(overrides)};
  pbsattn::visit_options(options, setter);
  if (setter.known != nb::len(setter.overrides)) {
    const nb::dict known = to_dict(options);
    for (const auto& [name, value] : overrides)
      if (!known.contains(name))
        throw nb::type_error((std::string("option ") + nb::repr(name).c_str() + ": no such option; there are " +
                              nb::repr(known.keys()).c_str())
                                 .c_str());
  }
  return options;
}

// -------------------------------------------------------------------------------------------------- plans

pbsattn::Device make_device(std::string_view kind, int index, int threads) {
  if (kind == "cpu") return pbsattn::Device::cpu(threads);
  if (kind == "reference") return pbsattn::Device::reference();
  if (kind == "cuda") return pbsattn::Device::cuda(index);
  throw pbsattn::Error(pbsattn::ErrorCode::unsupported,
                       "device \"" + std::string(kind) + "\": pbsattn computes on \"cpu\" and \"cuda\"");
}

// `options` are those of all heads, or a list of those of each.
pbsattn::Plan make_plan(const nb::object& options, std::string_view device, int index, int threads,
                        const std::array<std::int64_t, 7>& shape, std::optional<std::size_t> workspace_cap) {
  const auto [batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim_v] = shape;
  const pbsattn::Shape sizes{.batch = batch,
                             .q_heads = q_heads,
                             .kv_heads = kv_heads,
                             .q_len = q_len,
                             .kv_len = kv_len,
                             .head_dim = head_dim,
                             .head_dim_v = head_dim_v};
  const pbsattn::Device on = make_device(device, index, threads);
  const std::size_t cap = workspace_cap.value_or(pbsattn::Plan::no_cap);
  if (nb::isinstance<Options>(options)) {
    const auto all = nb::cast<Options>(options);
    const nb::gil_scoped_release unlocked;
    return pbsattn::Plan::create(all, sizes, on, cap);
  }
  const auto heads = nb::cast<std::vector<Options>>(options);
  const nb::gil_scoped_release unlocked;
  return pbsattn::Plan::create(heads, sizes, on, cap);
}

// (address, dtype, batch stride, head stride, token stride)
using ViewTuple = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t>;

// (address, count) of float32
using ArrayPair = std::pair<std::uintptr_t, std::size_t>;

// The same of the order's weights, and pbsattn::RopePairs
using WeightsTuple = std::tuple<std::uintptr_t, std::size_t, int>;

// (address of int32, batch stride, tokens of a page, pages of the cache), all 0 where keys and values lie contiguous
using PagesTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

template <class View>
View to_view(const ViewTuple& v) {
  return {.data = reinterpret_cast<decltype(View::data)>(std::get<0>(v)),
          .dtype = static_cast<pbsattn::DType>(std::get<1>(v)),
          .batch_stride = std::get<2>(v),
          .head_stride = std::get<3>(v),
          .token_stride = std::get<4>(v)};
}

void run_plan(const pbsattn::Plan& plan, const ViewTuple& q, const ViewTuple& k, const ViewTuple& v,
              const ViewTuple& out, std::uintptr_t lse, std::uintptr_t workspace, std::size_t workspace_size,
              std::uintptr_t stream, const ArrayPair& sinks, const WeightsTuple& weights, const PagesTuple& pages,
              const pbsattn::CacheUse& cache, pbsattn::Stats* stats, pbsattn::Trace* trace) {
  const nb::gil_scoped_release unlocked;
  plan.run({.q = to_view<pbsattn::ConstView>(q),
            .k = to_view<pbsattn::ConstView>(k),
            .v = to_view<pbsattn::ConstView>(v),
            .sinks = {reinterpret_cast<const float*>(sinks.first), sinks.second},
            .order_weights = {.values = {reinterpret_cast<const float*>(std::get<0>(weights)), std::get<1>(weights)},
                              .pairs = static_cast<pbsattn::RopePairs>(std::get<2>(weights))},
            .pages = {.table = reinterpret_cast<const std::int32_t*>(std::get<0>(pages)),
                      .batch_stride = std::get<1>(pages),
                      .size = std::get<2>(pages),
                      .count = std::get<3>(pages)}},
           {.out = to_view<pbsattn::View>(out), .lse = reinterpret_cast<float*>(lse), .cache = cache},
           {reinterpret_cast<std::byte*>(workspace), workspace_size}, pbsattn::Stream{reinterpret_cast<void*>(stream)},
           stats, trace);
}

std::optional<pbsattn::Stats> run(const pbsattn::Plan& plan, const ViewTuple& q, const ViewTuple& k, const ViewTuple& v,
                                  const ViewTuple& out, std::uintptr_t lse, std::uintptr_t workspace,
                                  std::size_t workspace_size, std::uintptr_t stream, const ArrayPair& sinks,
                                  const WeightsTuple& weights, const PagesTuple& pages, bool want_stats,
                                  pbsattn::SegmentCache* cache, std::int64_t cache_valid) {
  std::optional<pbsattn::Stats> stats;
  if (want_stats) stats.emplace();
  run_plan(plan, q, k, v, out, lse, workspace, workspace_size, stream, sinks, weights, pages,
           {.cache = cache, .valid = cache_valid}, want_stats ? &*stats : nullptr, nullptr);
  return stats;
}

std::tuple<pbsattn::Stats, pbsattn::Trace> trace(const pbsattn::Plan& plan, const ViewTuple& q, const ViewTuple& k,
                                                 const ViewTuple& v, const ViewTuple& out, std::uintptr_t lse,
                                                 std::uintptr_t workspace, std::size_t workspace_size,
                                                 std::uintptr_t stream, const ArrayPair& sinks,
                                                 const WeightsTuple& weights, const PagesTuple& pages) {
  std::tuple<pbsattn::Stats, pbsattn::Trace> made;
  run_plan(plan, q, k, v, out, lse, workspace, workspace_size, stream, sinks, weights, pages, {}, &std::get<0>(made),
           &std::get<1>(made));
  return made;
}

// A vector of an object as an array that keeps the object alive.
template <class T>
auto array_of(std::vector<T>& values) {
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(values.data(), {values.size()}, nb::handle());
}

// ---------------------------------------------------------------------------------------- learned orders

pbsattn::learned::File in_pairs(pbsattn::learned::File file, std::string_view pairs) {
  namespace learned = pbsattn::learned;
  pbsattn::RopePairs to = pbsattn::RopePairs::halves;
  if (pairs == learned::name_of(pbsattn::RopePairs::neighbours))
    to = pbsattn::RopePairs::neighbours;
  else if (pairs != learned::name_of(to))
    throw nb::value_error(("pairs \"" + std::string(pairs) + "\": there are \"halves\" and \"neighbours\"").c_str());
  file.weights = learned::in_pairs(file.weights, file.sizes.head_dim, file.pairs, to);
  file.pairs = to;
  return file;
}

void add_learned(nb::module_& module) {
  namespace learned = pbsattn::learned;
  using learned::File;
  module.attr("learned_method") = std::string(learned::method);
  module.attr("largest_learned") = learned::largest_file;
  module.def(
      "parse_learned",
      [](const nb::bytes& contents, const std::string& name) {
        return learned::parse({static_cast<const char*>(contents.data()), contents.size()}, name);
      },
      "contents"_a, "name"_a, "What a file of a learned order says; `name` is what messages call it.");
  nb::class_<File>(module, "LearnedFile", "A learned order's file; see pbsattn::learned::File.")
      .def_ro("name", &File::name)
      .def_ro("model", &File::model)
      .def_ro("fitted_on", &File::fitted_on)
      .def_ro("settings", &File::settings)
      .def_prop_ro("layers", [](const File& file) { return file.sizes.layers; })
      .def_prop_ro("query_heads", [](const File& file) { return file.sizes.query_heads; })
      .def_prop_ro("kv_heads", [](const File& file) { return file.sizes.kv_heads; })
      .def_prop_ro("head_dim", [](const File& file) { return file.sizes.head_dim; })
      .def_prop_ro("pairs", [](const File& file) { return std::string(learned::name_of(file.pairs)); })
      .def_prop_ro(
          "weights", [](File& file) { return array_of(file.weights); }, nb::rv_policy::reference_internal)
      .def("in_pairs", &in_pairs, "pairs"_a)
      .def(
          "require_model",
          [](const File& file, std::int64_t layers, std::int64_t query_heads, std::int64_t kv_heads,
             std::int64_t head_dim) {
            learned::require_model(file, {layers, query_heads, kv_heads, head_dim});
          },
          "layers"_a, "query_heads"_a, "kv_heads"_a, "head_dim"_a);
}

void translate(const std::exception_ptr& thrown, void* /*unused*/) {
  try {
    std::rethrow_exception(thrown);
  } catch (const pbsattn::Error& error) {
    PyObject* type = PyExc_RuntimeError;
    if (error.code() == pbsattn::ErrorCode::invalid_argument) type = PyExc_ValueError;
    if (error.code() == pbsattn::ErrorCode::unsupported) type = PyExc_NotImplementedError;
    if (error.code() == pbsattn::ErrorCode::out_of_memory) type = PyExc_MemoryError;
    PyErr_SetString(type, error.what());
  }
}

}  // namespace

NB_MODULE(_core, module) {
  module.doc() = "The pbsattn library: options, plans and tables. Tensors are addresses and strides.";
  nb::register_exception_translator(translate);

  module.def("version", [] { return std::string(pbsattn::version()); });
#ifdef PBSATTN_PYTHON_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.def(
      "methods",
      [] {
        std::vector<std::tuple<std::string, std::string>> table;
        for (const pbsattn::MethodInfo& info : pbsattn::methods()) table.emplace_back(info.name, info.summary);
        return table;
      },
      "Names and summaries of the methods.");

  nb::class_<pbsattn::DeviceInfo>(module, "DeviceInfo")
      .def_ro("name", &pbsattn::DeviceInfo::name)
      .def_ro("processor", &pbsattn::DeviceInfo::processor)
      .def_ro("threads", &pbsattn::DeviceInfo::threads)
      .def_ro("paths", &pbsattn::DeviceInfo::paths)
      .def_ro("f32_path", &pbsattn::DeviceInfo::f32_path)
      .def_ro("bf16_path", &pbsattn::DeviceInfo::bf16_path);
  module.def("describe_cpu", &pbsattn::describe_cpu);

  nb::class_<Options>(module, "Options", "A method's settings; see pbsattn::Options.")
      .def("as_dict", &to_dict)
      .def("__repr__",
           [](const Options& options) { return "Options(**" + std::string(nb::repr(to_dict(options)).c_str()) + ")"; });

  module.def("options", &make_options, "method"_a.none(), "overrides"_a,
             "Options of a method, \"pbs\" or \"pbs:top_p=0.95\", with those of `overrides` that are not None.");

  nb::class_<pbsattn::Stats>(module, "Stats", "What one run did.")
      .def_ro("visited_blocks", &pbsattn::Stats::visited_blocks)
      .def_ro("causal_blocks", &pbsattn::Stats::causal_blocks)
      .def_ro("permute_seconds", &pbsattn::Stats::permute_seconds)
      .def_ro("select_seconds", &pbsattn::Stats::select_seconds)
      .def_ro("attend_seconds", &pbsattn::Stats::attend_seconds)
      .def_prop_ro("density", &pbsattn::Stats::density)
      .def_prop_ro("seconds", &pbsattn::Stats::seconds)
      .def("__repr__", [](const pbsattn::Stats& stats) {
        return "Stats(density=" + std::to_string(stats.density()) + ", seconds=" + std::to_string(stats.seconds()) +
               ")";
      });

  nb::class_<pbsattn::Trace>(module, "Trace", "What one run decided; see pbsattn::Trace.")
      .def_ro("first_row", &pbsattn::Trace::first_row)
      .def_ro("rows", &pbsattn::Trace::rows)
      .def_ro("blocks", &pbsattn::Trace::blocks)
      .def_prop_ro(
          "order", [](pbsattn::Trace& trace) { return array_of(trace.order); }, nb::rv_policy::reference_internal)
      .def_prop_ro(
          "row_start", [](pbsattn::Trace& trace) { return array_of(trace.row_start); },
          nb::rv_policy::reference_internal)
      .def_prop_ro(
          "block", [](pbsattn::Trace& trace) { return array_of(trace.block); }, nb::rv_policy::reference_internal);

  nb::class_<pbsattn::SegmentCache>(module, "SegmentCache", "In memory of the caller's; see pbsattn::SegmentCache.")
      .def(
          "__init__",
          [](pbsattn::SegmentCache* made, std::uintptr_t memory, std::size_t size) {
            new (made) pbsattn::SegmentCache({reinterpret_cast<std::byte*>(memory), size});
          },
          "memory"_a, "size"_a)
      .def_prop_ro("tokens", &pbsattn::SegmentCache::tokens)
      .def("clear", &pbsattn::SegmentCache::clear);

  nb::class_<pbsattn::Plan>(module, "Plan", "A checked configuration; see pbsattn::Plan.")
      .def(nb::new_(&make_plan), "options"_a, "device"_a, "index"_a, "threads"_a, "shape"_a,
           "workspace_cap"_a = nb::none())
      .def_prop_ro("workspace_size", &pbsattn::Plan::workspace_size)
      .def_prop_ro("path", [](const pbsattn::Plan& plan) { return std::string(plan.path()); })
      .def_prop_ro("options", [](const pbsattn::Plan& plan) { return plan.options(); })
      .def("run", &run, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "workspace"_a, "workspace_size"_a, "stream"_a, "sinks"_a,
           "order_weights"_a, "pages"_a, "stats"_a, "cache"_a.none() = nb::none(), "cache_valid"_a = 0)
      .def("cache_size", &pbsattn::Plan::cache_size, "tokens"_a)
      .def("trace", &trace, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "workspace"_a, "workspace_size"_a, "stream"_a,
           "sinks"_a, "order_weights"_a, "pages"_a, "A run that waits for its work and tells what it did and decided.");

  add_learned(module);
}
