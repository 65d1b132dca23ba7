// Throws names and values at pbsattn_set_option, and text at pbsattn_method: a first byte chooses a name, the rest is
// text.
#include <cstring>
#include <string>
#include <vector>

#include "bytes.h"
#include "expect.h"
#include "pbsattn/options.hpp"
#include "sized.h"

namespace {

using namespace pbsattn::fuzz;

Share taken("values that pbsattn_set_option takes", 0.005);
Share parsed("methods that pbsattn_method takes", 0.002);

std::vector<std::string> option_names() {
  std::vector<std::string> names;
  pbsattn::Options options;
  pbsattn::visit_options(options, [&](std::string_view name, auto) { names.emplace_back(name); });
  return names;
}

bool same(const pbsattn_options& a, const pbsattn_options& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Any text as a method with options of its own, which C++ reads alike.
void parse(const std::string& text, const pbsattn_options& before) {
  pbsattn_options options = before;
  const pbsattn_status status = pbsattn_method(text.c_str(), &options);
  parsed.count(status == PBSATTN_OK ? 1 : 0);
  if (status != PBSATTN_OK) {
    require(status == PBSATTN_INVALID_ARGUMENT, "a wrong method is an invalid argument");
    require_line(pbsattn_last_error());
    require(same(options, before), "a refused method changes nothing");
    return;
  }
  const pbsattn::MethodText parts = pbsattn::split_method(text.c_str());
  auto by_parts = sized<pbsattn_options>();
  require(pbsattn_method(std::string(parts.name).c_str(), &by_parts) == PBSATTN_OK, "its name is a method's");
  for (const auto& [name, value] : parts.options)
    require(pbsattn_set_option(&by_parts, std::string(name).c_str(), std::string(value).c_str()) == PBSATTN_OK,
            "its parts are options");
  require(same(options, by_parts), "a method is what its parts are");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<std::string> names = option_names();
  Bytes bytes(data, size);
  const std::size_t choice = bytes.take<std::uint8_t>();
  std::string text(bytes.rest());
  std::string name;
  if (choice < 0xF0) {
    name = names[choice % names.size()];
  } else {  // any name, up to a "="
    const std::size_t end = text.find('=');
    name = text.substr(0, end);
    text = end == std::string::npos ? "" : text.substr(end + 1);
  }

  auto options = sized<pbsattn_options>();
  require(pbsattn_method("pbs", &options) == PBSATTN_OK, "pbs is a method");
  const pbsattn_options before = options;
  parse(std::string(bytes.rest()), before);
  parse("pbs:" + name + "=" + text, before);

  const pbsattn_status status = pbsattn_set_option(&options, name.c_str(), text.c_str());
  taken.count(status == PBSATTN_OK ? 1 : 0);
  if (status != PBSATTN_OK) {
    require(status == PBSATTN_INVALID_ARGUMENT, "a wrong option is an invalid argument");
    require_line(pbsattn_last_error());
    require(same(options, before), "a refused value changes nothing");
    return 0;
  }
  pbsattn_options again = before;
  require(pbsattn_set_option(&again, name.c_str(), text.c_str()) == PBSATTN_OK && same(options, again),
          "a value means the same each time");
  auto shape = sized<pbsattn_shape>();
  shape.batch = shape.q_heads = shape.kv_heads = 1;
  shape.q_len = shape.kv_len = 512;
  shape.head_dim = 64;
  const auto device = sized<pbsattn_device>();
  pbsattn_plan* plan = nullptr;
  require(pbsattn_plan_create(&options, &shape, &device, SIZE_MAX, &plan) != PBSATTN_INTERNAL,
          "options are planned or refused");
  pbsattn_plan_destroy(plan);
  return 0;
}
