#include "engine/json_object.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using absl::StatusCode;

JsonObject Parse(const std::string& text) {
  auto json = JsonObject::Parse(text, "t.json");
  EXPECT_TRUE(json.ok()) << json.status();
  return *std::move(json);
}

void ExpectFault(const absl::Status& status, StatusCode code, const std::string& message) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_NE(status.message().find(message), std::string::npos) << status;
}

TEST(JsonObjectTest, ReadsEveryType) {
  JsonObject json = Parse(
      R"({"i":3,"f":8192.0,"x":1e-5,"s":"silu","b":true,"n":null,"l":[1,0],"o":{"k":1},"one":7,"t":["a"]})");
  EXPECT_EQ(json.Int("i", 0, 10), 3);
  EXPECT_EQ(json.Int("f", 0, 10000), 8192);
  EXPECT_EQ(json.Number("x", 0, 1), 1e-5);
  EXPECT_EQ(json.String("s"), "silu");
  EXPECT_TRUE(json.BoolOr("b", false));
  EXPECT_EQ(json.IntOr("n", 0, 10, 5), 5);
  EXPECT_EQ(json.IntOr("absent", 0, 10, 6), 6);
  EXPECT_EQ(json.IntList("l", 0, 1, 4), (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(json.IntOrList("one", 0, 10, 4), (std::vector<int64_t>{7}));
  EXPECT_EQ(json.StringListOr("t", 4), (std::vector<std::string>{"a"}));
  EXPECT_FALSE(json.Has("n"));
  auto object = json.Object("o");
  ASSERT_TRUE(object.has_value());
  EXPECT_EQ(object->Int("k", 0, 1), 1);
  EXPECT_TRUE(object->Finish().ok());
  EXPECT_TRUE(json.Finish().ok()) << json.Finish();
}

TEST(JsonObjectTest, KeepsTheFirstFaultAndNamesFieldExpectedAndFound) {
  JsonObject json = Parse(R"({"i":-1,"s":3})");
  EXPECT_EQ(json.Int("i", 0, 10), 0);
  EXPECT_EQ(json.String("s"), "");
  ExpectFault(json.status(), StatusCode::kInvalidArgument,
              "t.json: i: expected a whole number in [0, 10], found -1");
}

TEST(JsonObjectTest, WrongTypesAreFaults) {
  const auto fault_of = [](const std::string& text, auto read) {
    JsonObject json = Parse(text);
    read(json);
    return json.status();
  };
  const auto read_int = [](JsonObject& json) { json.Int("x", 0, 1 << 20); };
  for (const char* value : {"\"3\"", "3.5", "1e300", "18446744073709551615", "-9223372036854775808",
                            "true", "[3]", "{}"}) {
    ExpectFault(fault_of(std::string("{\"x\":") + value + "}", read_int),
                StatusCode::kInvalidArgument, "x: expected a whole");
  }
  ExpectFault(fault_of("{}", read_int), StatusCode::kInvalidArgument,
              "x: required field is missing");
  ExpectFault(fault_of(R"({"x":null})", read_int), StatusCode::kInvalidArgument,
              "x: required field is missing");
  ExpectFault(fault_of(R"({"x":"a"})", [](JsonObject& json) { json.Number("x", 0, 1); }),
              StatusCode::kInvalidArgument, "a number in");
  ExpectFault(fault_of(R"({"x":1})", [](JsonObject& json) { json.BoolOr("x", false); }),
              StatusCode::kInvalidArgument, "true or false");
  ExpectFault(fault_of(R"({"x":[1,2]})", [](JsonObject& json) { json.IntList("x", 0, 9, 1); }),
              StatusCode::kInvalidArgument, "at most 1");
  ExpectFault(fault_of(R"({"x":[1,"a"]})", [](JsonObject& json) { json.IntList("x", 0, 9, 9); }),
              StatusCode::kInvalidArgument, "x[1]");
  ExpectFault(fault_of(R"({"x":[1]})", [](JsonObject& json) { json.StringListOr("x", 9); }),
              StatusCode::kInvalidArgument, "strings");
  ExpectFault(fault_of(R"({"x":1})", [](JsonObject& json) { json.Object("x"); }),
              StatusCode::kInvalidArgument, "an object");
  ExpectFault(fault_of(R"({"x":1})", [](JsonObject& json) { json.StringFields(); }),
              StatusCode::kInvalidArgument, "a string");
}

TEST(JsonObjectTest, UnreadFieldsAreRefusedUnlessOffOrPrivate) {
  ExpectFault(Parse(R"({"qk_norm":true})").Finish(), StatusCode::kUnimplemented,
              "field 'qk_norm' = true is not known");
  ExpectFault(Parse(R"({"scale":0})").Finish(), StatusCode::kUnimplemented, "'scale'");
  EXPECT_TRUE(Parse(R"({"qk_norm":false,"sink":null,"_name_or_path":"x"})").Finish().ok());
  JsonObject json = Parse(R"({"init":1})");
  json.Ignore({"init"});
  EXPECT_TRUE(json.Finish().ok());
}

TEST(JsonObjectTest, RefusesFeaturesByNameAndValue) {
  JsonObject json = Parse(R"({"bias":true})");
  json.MustBe("bias", false);
  ExpectFault(json.status(), StatusCode::kUnimplemented, "bias = true is not built in, only false");
  JsonObject number = Parse(R"({"p":0.5})");
  number.MustBe("p", 1.0);
  ExpectFault(number.status(), StatusCode::kUnimplemented, "p = 0.5 is not built in, only 1");
  JsonObject window = Parse(R"({"sliding_window":4096})");
  window.Refuse("sliding_window", "sliding-window attention");
  ExpectFault(window.status(), StatusCode::kUnimplemented,
              "sliding_window = 4096: sliding-window attention is not built in");
}

TEST(JsonObjectTest, BadTextIsAStatus) {
  const auto fault_of = [](const std::string& text) {
    return JsonObject::Parse(text, "t.json").status();
  };
  ExpectFault(fault_of(""), StatusCode::kInvalidArgument, "not JSON");
  ExpectFault(fault_of("{"), StatusCode::kInvalidArgument, "not JSON");
  ExpectFault(fault_of("{} x"), StatusCode::kInvalidArgument, "not JSON");
  ExpectFault(fault_of("{\"a\":\"\xff\"}"), StatusCode::kInvalidArgument, "not JSON");
  ExpectFault(fault_of("[]"), StatusCode::kInvalidArgument, "not a JSON object");
  ExpectFault(fault_of("null"), StatusCode::kInvalidArgument, "not a JSON object");
  ExpectFault(fault_of(R"({"a":1,"a":2})"), StatusCode::kInvalidArgument, "key 'a' is given twice");
  ExpectFault(fault_of(R"({"o":{"b":1,"b":1}})"), StatusCode::kInvalidArgument,
              "key 'b' is given twice");
  EXPECT_TRUE(fault_of(R"({"a":{"b":1},"c":{"b":1}})").ok());
  ExpectFault(fault_of("{\"a\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}"),
              StatusCode::kInvalidArgument, "nested deeper");
  ExpectFault(fault_of("{\"a\":" + std::string(100'000, '[')), StatusCode::kInvalidArgument,
              "nested deeper");
}

TEST(JsonObjectTest, FilesAreRegularAndBounded) {
  const TempFolder folder;
  EXPECT_EQ(*ReadTextFile(folder.Write("a", "hello"), 5), "hello");
  EXPECT_EQ(*ReadTextFile(folder.Write("empty", ""), 5), "");
  ExpectFault(ReadTextFile(folder.Write("b", "hello!"), 5).status(), StatusCode::kInvalidArgument,
              "6 bytes, the limit is 5");
  ExpectFault(ReadTextFile(folder.File("none"), 5).status(), StatusCode::kNotFound, "no such file");
  ExpectFault(ReadTextFile(folder.path(), 5).status(), StatusCode::kInvalidArgument,
              "not a regular file");
}

TEST(JsonObjectTest, MessagesAboutLongTextsAreShort) {
  EXPECT_EQ(Shown("short"), "short");
  EXPECT_EQ(Shown(std::string(81, 'x')), std::string(80, 'x') + "...");
  EXPECT_EQ(Shown("x" + std::string("\xe2\x82\xac") + std::string(80, 'x')).size(), 83u);
  std::string euros = "x";
  while (euros.size() < 200) euros += "\xe2\x82\xac";
  EXPECT_EQ(Shown(euros), euros.substr(0, 79) + "...") << "not within a character";
  const std::string text(100'000, 'x');
  EXPECT_LT(
      JsonObject::Parse("{\"" + text + "\":1,\"" + text + "\":2}", "t").status().message().size(),
      200u);
  auto json = JsonObject::Parse("{\"a\":1,\"" + text + "\":2}", "t");
  ASSERT_TRUE(json.ok());
  EXPECT_LT(json->Finish().message().size(), 300u);
  json->Fail(absl::InvalidArgumentError(text));
  EXPECT_LT(json->status().message().size(), 1100u);
}

}  // namespace
}  // namespace godwit
