// Structs that have grown, as those of pbsattn.h will: a version `Grown` of one that was first `First`.
#include "core/capi/sized_struct.h"

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "support/refusal.h"

namespace pbsattn {
namespace {

struct First {
  std::size_t struct_size;
  std::int64_t a, b;
};
struct Grown {
  std::size_t struct_size;
  std::int64_t a, b, c;
};
struct Later {
  std::size_t struct_size;
  std::int64_t a, b, c, d;
};
constexpr Grown defaults{.struct_size = sizeof(Grown), .a = 10, .b = 20, .c = 30};

}  // namespace
}  // namespace pbsattn

PBSATTN_SIZED_STRUCT(pbsattn::Grown, c, 24);

namespace pbsattn {
namespace {

// A caller's struct of whatever version, as the library gets it.
template <class Version>
Grown* as_grown(Version& version) {
  void* address = &version;
  return static_cast<Grown*>(address);
}

TEST(SizedStruct, OfAnOlderProgramReadsWithDefaults) {
  First old{.struct_size = sizeof old, .a = 1, .b = 2};
  const Grown read = read_struct(as_grown(old), "old", defaults);
  EXPECT_EQ(read.struct_size, sizeof(Grown));
  EXPECT_EQ(read.a, 1);
  EXPECT_EQ(read.b, 2);
  EXPECT_EQ(read.c, 30);
}

TEST(SizedStruct, OfThisVersionReadsWhole) {
  const Grown same{.struct_size = sizeof same, .a = 1, .b = 2, .c = 3};
  const Grown read = read_struct(&same, "same", defaults);
  EXPECT_EQ(read.c, 3);
}

TEST(SizedStruct, OfALaterProgramReadsWhereNothingNewIsSet) {
  Later later{.struct_size = sizeof later, .a = 1, .b = 2, .c = 3, .d = 0};
  const Grown read = read_struct(as_grown(later), "later", defaults);
  EXPECT_EQ(read.struct_size, sizeof(Grown));
  EXPECT_EQ(read.c, 3);
  later.d = std::int64_t{1} << 56;  // its last byte alone
  EXPECT_EQ(test::refusal_of([&] { read_struct(as_grown(later), "later"); }),
            "later: a field after c is set that pbsattn " + std::string(version()) +
                " doesn't know (byte 39 of 40); leave it zero, or use the library that your header came with");
}

TEST(SizedStruct, OfNoVersionIsRefused) {
  Later any{.struct_size = 0, .a = 1, .b = 2, .c = 3, .d = 0};
  for (const std::size_t size : {0UL, 16UL, 23UL, 33UL, 4104UL, ~0UL}) {
    any.struct_size = size;
    const std::string expected = "any.struct_size " + std::to_string(size) +
                                 ": no size that a pbsattn::Grown can have (24 to 4096, a multiple of 8); set it to "
                                 "sizeof(pbsattn::Grown)";
    EXPECT_EQ(test::refusal_of([&] { read_struct(as_grown(any), "any"); }), expected);
    EXPECT_EQ(test::refusal_of([&] { write_struct(as_grown(any), "any", defaults); }), expected);
    EXPECT_EQ(test::refusal_of([&] { write_settings(as_grown(any), "any", defaults, defaults); }), expected);
    EXPECT_EQ(any.a, 1);
  }
  EXPECT_EQ(test::refusal_of([] { read_struct<Grown>(nullptr, "any"); }), "any: null pointer");
}

TEST(SizedStruct, WritesWhatTheProgramKnows) {
  std::array<First, 2> old{{{.struct_size = sizeof(First), .a = 1, .b = 2}, {.struct_size = 5, .a = 6, .b = 7}}};
  write_struct(as_grown(old[0]), "old", defaults);
  EXPECT_EQ(old[0].struct_size, sizeof(First));
  EXPECT_EQ(old[0].a, 10);
  EXPECT_EQ(old[0].b, 20);
  EXPECT_EQ(old[1].struct_size, 5U) << "wrote beyond the caller's struct";

  Later later{.struct_size = sizeof later, .a = 1, .b = 2, .c = 3, .d = 4};
  write_struct(as_grown(later), "later", defaults);
  EXPECT_EQ(later.struct_size, sizeof(Later));
  EXPECT_EQ(later.c, 30);
  EXPECT_EQ(later.d, 0);
}

TEST(SizedStruct, SettingsAreNotCutOff) {
  First old{.struct_size = sizeof old, .a = 1, .b = 2};
  Grown settings = defaults;
  settings.a = 11;
  write_settings(as_grown(old), "old", settings, defaults);
  EXPECT_EQ(old.a, 11);
  settings.a = 12;
  settings.c = 31;
  EXPECT_EQ(test::refusal_of([&] { write_settings(as_grown(old), "old", settings, defaults); }),
            "old.struct_size 24: too small to hold these settings, which need 32; compile with the header of pbsattn " +
                std::string(version()));
  EXPECT_EQ(old.a, 11);
}

TEST(SizedStruct, ArraysHaveTheCallersStride) {
  std::vector<First> old{{sizeof(First), 1, 0}, {sizeof(First), 2, 0}, {sizeof(First), 3, 0}};
  const StructArray<Grown> short_ones(as_grown(old[0]), old.size(), "old");
  std::vector<Later> later{{sizeof(Later), 1, 0, 0, 0}, {sizeof(Later), 2, 0, 0, 0}, {sizeof(Later), 3, 0, 0, 0}};
  const StructArray<Grown> long_ones(as_grown(later[0]), later.size(), "later");
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(read_struct(short_ones[i], short_ones.name(i)).a, static_cast<std::int64_t>(i) + 1);
    EXPECT_EQ(read_struct(long_ones[i], long_ones.name(i)).a, static_cast<std::int64_t>(i) + 1);
  }
  later[2].struct_size = sizeof(Grown);
  EXPECT_EQ(test::refusal_of([&] { StructArray<Grown>(as_grown(later[0]), later.size(), "later"); }),
            "later[2].struct_size 32: not that of later[0], 40; set it to sizeof(pbsattn::Grown) in each");
}

}  // namespace
}  // namespace pbsattn
