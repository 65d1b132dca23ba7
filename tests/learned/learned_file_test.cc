// The reader of a learned order's file: what it reads, and what it refuses by name.
#include "learned_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "support/learned.h"

namespace pbsattn::learned {
namespace {

using test::header_of;
using test::learned_metadata;
using test::Metadata;
using test::with_length;

constexpr std::size_t count = 2 * 2 * 12;

std::vector<float> counted() {
  std::vector<float> weights(count);
  std::iota(weights.begin(), weights.end(), 0.0F);
  return weights;
}

std::string good() {
  return test::learned_file(learned_metadata(), counted());
}

// Why a file is refused, or "".
std::string refusal(const std::string& contents) {
  try {
    static_cast<void>(parse(contents, "x.pbs"));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  return "";
}

// The same of a file with one text in its metadata set.
std::string refusal_with(const std::string& key, const std::string& value) {
  Metadata metadata = learned_metadata();
  metadata[key] = value;
  const std::string tensor = R"("dtype":"F32","shape":[2,2,12],"data_offsets":[0,192])";
  return refusal(with_length(header_of(metadata, tensor), std::string(4 * count, '\0')));
}

std::string refusal_of_tensor(const std::string& tensor) {
  return refusal(with_length(header_of(learned_metadata(), tensor), std::string(4 * count, '\0')));
}

void expect(const std::string& message, const std::string& part) {
  EXPECT_TRUE(message.starts_with("x.pbs: ")) << message;
  EXPECT_NE(message.find(part), std::string::npos) << message << "\nhas no: " << part;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

TEST(LearnedFile, SaysWhatIsInIt) {
  const File file = parse(good(), "x.pbs");
  EXPECT_EQ(file.name, "x.pbs");
  EXPECT_EQ(file.sizes.layers, 2);
  EXPECT_EQ(file.sizes.query_heads, 4);
  EXPECT_EQ(file.sizes.kv_heads, 2);
  EXPECT_EQ(file.sizes.head_dim, 8);
  EXPECT_EQ(file.sizes.features(), 12);
  EXPECT_EQ(file.pairs, RopePairs::halves);
  EXPECT_EQ(file.model, "tiny");
  EXPECT_EQ(file.fitted_on, "prose");
  EXPECT_EQ(file.settings, "{}");
  EXPECT_EQ(file.weights, counted());
  ASSERT_EQ(file.of_layer(1).size(), 24U);
  EXPECT_EQ(file.of_layer(1).front(), 24.0F);
  EXPECT_EQ(file.of_layer(1).back(), 47.0F);
}

TEST(LearnedFile, TextsOfNoMeaningAreLeft) {
  EXPECT_EQ(refusal_with("command", "learn --model tiny"), "");
}

TEST(LearnedFile, EveryTruncationIsRefused) {
  const std::string whole = good();
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_NE(refusal(whole.substr(0, size)), "") << size;
  expect(refusal(whole.substr(0, 5)), "5 bytes: shorter than the 8 of a header's length");
  expect(refusal(whole.substr(0, 100)), "in a file of 100: truncated");
  expect(refusal(whole.substr(0, whole.size() - 4)), "188 bytes after the header: order_weights has 192");
  expect(refusal(whole + "x"), "193 bytes after the header");
}

TEST(LearnedFile, HeadersAreJsonOfKnownMembers) {
  expect(refusal(std::string(8, '\xff') + "{}"), "a header of 18446744073709551615 bytes in a file of 10");
  expect(refusal(with_length("{\"a\": ", "")), "header: not JSON: ");
  expect(refusal(with_length("[1]", "")), "header: no JSON object");
  expect(refusal(with_length("{}", "")), "header: has no \"__metadata__\"");
  expect(refusal(with_length("{\"model.embed\\n\": {}}", "")),
         "tensor \"model.embed?\": pbsattn-learned-1 has no such");
  expect(refusal(with_length("{\"__metadata__\": {}, \"__metadata__\": {}}", "")),
         "\"__metadata__\" stands in it twice");
  expect(refusal(with_length("{\"__metadata__\": {\"format\": 1}}", "")),
         "__metadata__ \"format\": there is no such text");
  expect(refusal(std::string(largest_file + 1, ' ')), "over 64 MiB");
  const std::string nested(200'000, '[');
  expect(refusal(with_length(R"({"order_weights": {"dtype": )" + nested, "")), "header: JSON nested over 16 deep");
  expect(refusal_with("settings", R"({"0": )" + nested), "settings: JSON nested over 16 deep");
}

TEST(LearnedFile, MetadataIsOfThisFormat) {
  expect(refusal_with("format", "pbsattn-learned-2"),
         "format \"pbsattn-learned-2\": this pbsattn reads \"pbsattn-learned-1\"");
  expect(refusal_with("pairs", "thirds"), "pairs \"thirds\"");
  for (const std::string wrong : {"", "0", "-1", "2.0", " 2", "65537", "99999999999999999999", "two"})
    for (const std::string key : {"layers", "query_heads", "kv_heads", "head_dim"})
      expect(refusal_with(key, wrong), key + " \"" + wrong + "\": no whole number of 1 .. 65536");
  expect(refusal_with("query_heads", "5"), "query_heads 5: no multiple of kv_heads 2");
  expect(refusal_with("head_dim", "9"), "head_dim 9: odd");
  for (const std::string wrong : {"", "{", "[]", "3"})
    expect(refusal_with("settings", wrong), "settings \"" + wrong + "\"");
  for (const auto& [key, value] : learned_metadata()) {
    Metadata metadata = learned_metadata();
    metadata.erase(key);
    expect(refusal(with_length(header_of(metadata, ""), "")), "\"" + key + "\": there is no such text");
  }
}

TEST(LearnedFile, TheTensorIsTheMetadatas) {
  EXPECT_EQ(refusal_of_tensor(R"("dtype":"F32","shape":[2,2,12],"data_offsets":[0,192])"), "");
  expect(refusal_of_tensor(R"("dtype":"BF16","shape":[2,2,12],"data_offsets":[0,96])"), "dtype \"BF16\"");
  expect(refusal_of_tensor(R"("shape":[2,2,12],"data_offsets":[0,192])"), "dtype null");
  expect(refusal_of_tensor(R"("dtype":"F32","shape":[2,24],"data_offsets":[0,192])"),
         "shape [2,24]: layers, KV heads and");
  expect(refusal_of_tensor(R"("dtype":"F32","shape":[2,2,12],"data_offsets":[4,196])"), "data_offsets [4,196]");
  expect(refusal_of_tensor(R"("dtype":"F32","shape":[2,2,12],"data_offsets":[192,0])"), "data_offsets [192,0]");
  expect(refusal_with("layers", "3"), "shape [2,2,12]: layers, KV heads and 3 head_dim / 2 make [3,2,12]");
  expect(refusal(with_length(R"({"__metadata__":{"format":"pbsattn-learned-1"}})", "")), "\"pairs\"");
}

TEST(LearnedFile, WeightsAreFinite) {
  for (const float wrong : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    std::vector<float> weights = counted();
    weights[24 + 12 + 5] = wrong;
    expect(refusal(test::learned_file(learned_metadata(), weights)), "in layer 1, KV head 1, feature 5");
  }
}

TEST(LearnedFile, PairsAreConvertedAndBack) {
  const std::vector<float> weights = counted();
  const std::span<const float> layer = std::span(weights).first(24);
  const auto neighbours = in_pairs(layer, 8, RopePairs::halves, RopePairs::neighbours);
  EXPECT_EQ(neighbours, (std::vector<float>{0,  1,  2,  3,  4,  8,  5,  9,  6,  10, 7,  11,  //
                                            12, 13, 14, 15, 16, 20, 17, 21, 18, 22, 19, 23}));
  EXPECT_EQ(in_pairs(neighbours, 8, RopePairs::neighbours, RopePairs::halves), std::vector(layer.begin(), layer.end()));
  EXPECT_EQ(in_pairs(layer, 8, RopePairs::neighbours, RopePairs::neighbours), std::vector(layer.begin(), layer.end()));
}

TEST(LearnedFile, AnotherModelIsNamed) {
  const File file = parse(good(), "x.pbs");
  EXPECT_NO_THROW(require_model(file, file.sizes));
  const std::pair<Sizes, std::string> others[] = {
      {{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 8}, "with 2 layers, the model has 3"},
      {{.layers = 2, .query_heads = 6, .kv_heads = 2, .head_dim = 8}, "with 4 query heads, the model has 6"},
      {{.layers = 2, .query_heads = 4, .kv_heads = 1, .head_dim = 8}, "with 2 KV heads, the model has 1"},
      {{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64}, "with 8 numbers in a head, the model has 64"}};
  for (const auto& [sizes, part] : others) try {
      require_model(file, sizes);
      ADD_FAILURE() << "taken, but for: " << part;
    } catch (const Error& error) {
      expect(error.what(), part);
      expect(error.what(), "of tiny");
    }
}

TEST(LearnedFile, IsReadFromDisk) {
  const auto path = std::filesystem::path(testing::TempDir()) / "pbsattn-learned-file-test.pbs";
  std::ofstream(path, std::ios::binary) << good();
  EXPECT_EQ(read(path).weights, counted());
  EXPECT_EQ(read(path).name, path.string());
  std::filesystem::remove(path);
  for (const std::string wrong : {"/nowhere/x.pbs", "/"}) try {
      static_cast<void>(read(wrong));
      ADD_FAILURE() << "read, but for: " << wrong;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(wrong + ": can't be read ("), std::string::npos) << error.what();
    }
}

}  // namespace
}  // namespace pbsattn::learned
