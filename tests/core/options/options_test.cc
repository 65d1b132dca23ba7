// Every option by every door of the library, from the table itself: what a row says is what holds.
#include "pbsattn/options.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "capi/abi_0_2.h"
#include "core/options/c_options.h"
#include "pbsattn/pbsattn.h"
#include "support/options.h"
#include "support/refusal.h"

namespace pbsattn {
namespace {

std::string refusal_of(std::string_view text) {
  return test::refusal_of([&] { parse_method(text); });
}

TEST(Options, EveryDoorSetsTheSame) {
  int options = 0;
  test::each_option_value([&](const OptionInfo& info, const std::string& value, const Options& expected) {
    ++options;
    const std::string text = fmt::format("pbs:{}={}", info.name, value);
    EXPECT_TRUE(test::same(parse_method(text), expected)) << text;

    pbsattn_options c = default_options, by_method = default_options;
    ASSERT_EQ(pbsattn_method("pbs", &c), PBSATTN_OK);
    ASSERT_EQ(pbsattn_set_option(&c, info.name.data(), value.c_str()), PBSATTN_OK) << pbsattn_last_error();
    ASSERT_EQ(pbsattn_method(text.c_str(), &by_method), PBSATTN_OK) << pbsattn_last_error();
    EXPECT_TRUE(test::same(to_cpp(c), expected)) << text;
    EXPECT_TRUE(test::same(to_cpp(by_method), expected)) << text;
  });
  EXPECT_GT(options, 24);
}

TEST(Options, EachConversionUndoesTheOther) {
  test::each_option_value([&](const OptionInfo& info, const std::string& value, const Options& options) {
    const pbsattn_options c = to_c(options);
    EXPECT_EQ(c.struct_size, sizeof c);
    EXPECT_TRUE(test::same(to_cpp(c), options)) << info.name << "=" << value;
    EXPECT_FALSE(test::same(options, method("pbs"))) << info.name << "=" << value << " is where pbs has another value";
  });
  // Byte by byte in the order of the header, whatever the bytes are.
  pbsattn_options c{};
  for (std::size_t at = sizeof c.struct_size; at < sizeof c; at += sizeof(std::int32_t)) {
    const std::int32_t number = at == offsetof(pbsattn_options, keep) ? 0x12345 : static_cast<std::int32_t>(at);
    std::memcpy(reinterpret_cast<char*>(&c) + at, &number, sizeof number);
  }
  const pbsattn_options back = to_c(to_cpp(c));
  EXPECT_EQ(back.keep, 0xFF) << "which validation refuses";
  EXPECT_EQ(back.segment, static_cast<std::int32_t>(offsetof(pbsattn_options, segment)));
  EXPECT_EQ(std::memcmp(&back.top_p, &c.top_p, sizeof c - offsetof(pbsattn_options, top_p)), 0);
}

TEST(Options, RowsNameTheirFields) {
  std::map<std::string_view, std::size_t> places;  // in the header of version 0.2, which the tests keep
#define PLACE(type, field) \
  if (#type == std::string_view("options")) places[#field] = offsetof(abi_0_2_##type, field);
  ABI_0_2_FIELDS(PLACE)
#undef PLACE
  const pbsattn_options c{};
  std::size_t found = 0;
  visit_option_rows(
      [&](const OptionInfo& info, const auto& field) {
        const auto place = places.find(info.name);
        if (place == places.end()) return;  // of a later version
        ++found;
        EXPECT_EQ(reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&c),
                  static_cast<std::ptrdiff_t>(place->second))
            << info.name;
      },
      c);
  EXPECT_EQ(found, places.size());
}

TEST(Options, RowsSayWhatPeopleNeed) {
  Options options;
  visit_option_rows(
      [](const OptionInfo& info, auto field) {
        EXPECT_FALSE(info.meaning.empty()) << info.name;
        if constexpr (std::is_enum_v<decltype(field)>) {
          if (info.rule.empty()) return;
          for (const std::string_view name : Names<decltype(field)>::values)
            EXPECT_NE(info.rule.find(name), std::string_view::npos) << info.name << " may be " << name;
        } else {
          EXPECT_TRUE(info.rule.starts_with(std::is_integral_v<decltype(field)> ? "a whole number" : "a number"))
              << info.name;
        }
      },
      options);
}

TEST(ParseMethod, AMethodAndItsOptionsInTheirOrder) {
  EXPECT_TRUE(test::same(parse_method("pbs"), method("pbs")));
  const Options options = parse_method("pbs+:top_p=0.95:segment=512:order_scope=kv_head:top_p=0.5");
  EXPECT_EQ(options.score, BlockScore::antidiagonal);
  EXPECT_EQ(options.top_p, 0.5F) << "the last one";
  EXPECT_EQ(options.segment, 512);
  EXPECT_EQ(options.order_scope, OrderScope::kv_head);
}

TEST(ParseMethod, PartsAreViewsWhateverTheirNames) {
  const MethodText parts = split_method("ggml:settings=a=b.json:x=");
  EXPECT_EQ(parts.name, "ggml");
  ASSERT_EQ(parts.options.size(), 2U);
  EXPECT_EQ(parts.options[0], (std::pair<std::string_view, std::string_view>("settings", "a=b.json")));
  EXPECT_EQ(parts.options[1], (std::pair<std::string_view, std::string_view>("x", "")));
}

TEST(ParseMethod, WhatIsWrongIsNamed) {
  EXPECT_NE(refusal_of("pbz:top_p=1").find("did you mean \"pbs\""), std::string::npos);
  EXPECT_EQ(refusal_of("pbs:top_p"), "pbs:top_p: \"top_p\" is no OPTION=VALUE; write, say, pbs:top_p=0.95");
  EXPECT_NE(refusal_of("pbs:").find("pbs:: \"\" is no OPTION=VALUE"), std::string::npos);
  EXPECT_NE(refusal_of("").find("no such method"), std::string::npos);
  EXPECT_NE(refusal_of(":top_p=1").find("method \"\": no such method"), std::string::npos);
  EXPECT_NE(refusal_of("pbs:=1").find("option \"\": no such option"), std::string::npos);
  EXPECT_NE(refusal_of("pbs:top_p=").find("top_p \"\": not a number"), std::string::npos);
  EXPECT_NE(refusal_of("pbs:top_p=1 ").find("top_p \"1 \": not a number"), std::string::npos);
  EXPECT_NE(refusal_of(std::string("pbs\0", 4)).find("method \"pbs?\""), std::string::npos);
  EXPECT_NE(refusal_of("pbs:a\nb").find("pbs:a?b: \"a?b\" is no"), std::string::npos);
  EXPECT_LT(refusal_of("pbs:" + std::string(1 << 20, ':')).size(), 300U) << "what is long is cut";
}

}  // namespace
}  // namespace pbsattn
