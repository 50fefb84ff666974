#include "engine/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/engine/golden_data.h"

namespace godwit {
namespace {

using absl::StatusCode;
using Json = nlohmann::json;

// A model of head_dim 128 and max_position_embeddings `length` with this dictionary.
absl::StatusOr<ModelConfig> Parse(const Json& rope, int64_t length = 4096,
                                  const std::string& rope_override = "") {
  const Json json = {{"model_type", "llama"},    {"vocab_size", 32},
                     {"hidden_size", 256},       {"num_hidden_layers", 1},
                     {"num_attention_heads", 2}, {"intermediate_size", 64},
                     {"rms_norm_eps", 1e-5},     {"max_position_embeddings", length},
                     {"rope_parameters", rope}};
  return ParseModelConfig(json.dump(), rope_override);
}

RopeTable Table(const Json& rope, int64_t num_positions = 0) {
  const auto config = Parse(rope);
  EXPECT_TRUE(config.ok()) << config.status();
  if (!config.ok()) return {};
  const auto table = MakeRopeTable(*config->rope, num_positions);
  EXPECT_TRUE(table.ok()) << table.status();
  return table.ok() ? *table : RopeTable{};
}

void ExpectNear(const std::vector<double>& table, const std::vector<double>& expected) {
  ASSERT_EQ(table.size(), expected.size());
  for (size_t pair = 0; pair < table.size(); ++pair) {
    EXPECT_NEAR(table[pair], expected[pair], 1e-12 * expected[pair]) << "pair " << pair;
  }
}

// --- Against tables computed by another implementation. ---

struct Golden {
  Json rope;
  int64_t num_positions = 0;
};

// What a config.json says for a case of rope_golden.json, by its name and parameters.
Golden GoldenRope(const std::string& name, const Json& params) {
  const auto starts = [&](const char* prefix) { return name.starts_with(prefix); };
  Golden golden = {.rope = {{"rope_theta", params.value("rope_theta", 10000.0)}}};
  Json& rope = golden.rope;
  const auto copy = [&](const char* from, const char* to) {
    if (params.contains(from)) rope[to] = params[from];
  };
  copy("factor", "factor");
  copy("scale", "factor");
  copy("k", "power");
  copy("T", "truncate_length");
  copy("partial_rotary_factor", "partial_rotary_factor");
  for (const char* field : {"mixed_b", "low_freq_factor", "high_freq_factor", "beta_fast",
                            "beta_slow", "truncate", "alpha", "beta"}) {
    copy(field, field);
  }
  rope["rope_type"] = starts("linear")         ? "linear"
                      : starts("giraffe")      ? "giraffe"
                      : starts("ntk_aware")    ? "ntk-aware"
                      : starts("ntk_vllm")     ? "ntk"
                      : starts("dynamic")      ? "dynamic"
                      : starts("by_parts")     ? "ntk-by-parts"
                      : starts("yarn")         ? "yarn"
                      : starts("longrope")     ? "longrope"
                      : starts("llama3")       ? "llama3"
                      : starts("proportional") ? "proportional"
                                               : "default";
  if (starts("giraffe_power1based")) rope["power_first_index"] = 1;
  if (!starts("dynamic")) copy("L", "original_max_position_embeddings");
  golden.num_positions = params.value("seq_len", starts("longrope_long") ? 4097 : 4096);
  if (starts("longrope")) {
    rope["short_factor"] = std::vector<double>(64, 2.0);
    for (int pair = 1; pair <= 64; ++pair) rope["long_factor"].push_back(pair);
  }
  return golden;
}

TEST(RopeTableTest, EveryMethodMatchesTheGoldenTables) {
  if (TestDataFolder().empty()) GTEST_SKIP() << "GODWIT_TEST_DATA names no folder with refs/";
  std::ifstream file(TestDataFolder() + "/refs/rope_golden.json");
  const Json golden = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(golden.is_object());
  std::set<std::string> types;
  for (const auto& [name, method] : golden["methods"].items()) {
    SCOPED_TRACE(name);
    const Golden declared = GoldenRope(name, method["params"]);
    const RopeTable table = Table(declared.rope, declared.num_positions);
    ExpectNear(table.inv_freq, method["inv_freq"]);
    EXPECT_NEAR(table.attention_factor, method["attention_factor"].get<double>(), 1e-14);
    types.insert(declared.rope["rope_type"]);
  }
  EXPECT_EQ(types.size(), 11u) << "every type but the older name of longrope";
}

TEST(RopeTableTest, YarnAttentionFactorsMatchTheGoldenOnes) {
  if (TestDataFolder().empty()) GTEST_SKIP() << "GODWIT_TEST_DATA names no folder with refs/";
  std::ifstream file(TestDataFolder() + "/refs/rope_golden.json");
  const Json golden = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  Json rope = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 4096}};
  for (const auto& [factor, expected] : golden["scalars"]["yarn_attention_factor"].items()) {
    rope["factor"] = std::stod(factor);
    EXPECT_NEAR(Table(rope).attention_factor, expected.get<double>(), 1e-14) << factor;
  }
  rope["factor"] = 40;
  rope["mscale"] = rope["mscale_all_dim"] = 0.707;
  EXPECT_EQ(Table(rope).attention_factor, 1) << "the pair cancels";
  rope["mscale"] = 1.414;
  EXPECT_NEAR(Table(rope).attention_factor,
              (0.1414 * std::log(40.0) + 1) / (0.0707 * std::log(40.0) + 1), 1e-14);
  rope["attention_factor"] = 1.25;
  EXPECT_EQ(Table(rope).attention_factor, 1.25) << "wins when it is stated";
}

// --- Each method, by what it is known for. ---

TEST(RopeTableTest, DefaultIsThetaToTheMinusTwoIOverD) {
  const auto table = MakeRopeTable({.theta = 10000, .rotary_dim = 16});
  ASSERT_TRUE(table.ok()) << table.status();
  ASSERT_EQ(table->inv_freq.size(), 8u);
  for (int pair = 0; pair < 8; ++pair) {
    EXPECT_DOUBLE_EQ(table->inv_freq[static_cast<size_t>(pair)],
                     std::pow(10000.0, -2.0 * pair / 16))
        << pair;
  }
  EXPECT_EQ(table->attention_factor, 1);
  EXPECT_EQ(table->pair_layout, PairLayout::kHalfSplit);
}

TEST(RopeTableTest, LinearDividesEveryFrequency) {
  const auto plain = MakeRopeTable({.theta = 500000, .rotary_dim = 32});
  const auto linear =
      MakeRopeTable({.type = "linear", .theta = 500000, .factor = 5, .rotary_dim = 32});
  ASSERT_TRUE(plain.ok() && linear.ok());
  for (size_t pair = 0; pair < plain->inv_freq.size(); ++pair) {
    EXPECT_DOUBLE_EQ(linear->inv_freq[pair], plain->inv_freq[pair] / 5);
  }
}

TEST(RopeTableTest, TheFactorCountsForLinearOnly) {
  const auto table = MakeRopeTable({.type = "default", .factor = 8, .rotary_dim = 4});
  ASSERT_TRUE(table.ok());
  EXPECT_EQ(table->inv_freq.front(), 1);
}

TEST(RopeTableTest, Llama3IsNtkByPartsWithItsFactorsAsAlphaAndBeta) {
  const Json llama3 = {{"rope_type", "llama3"}, {"factor", 8},
                       {"low_freq_factor", 1},  {"high_freq_factor", 4},
                       {"rope_theta", 500000},  {"original_max_position_embeddings", 8192}};
  const Json by_parts = {{"rope_type", "ntk-by-parts"},
                         {"factor", 8},
                         {"alpha", 1},
                         {"beta", 4},
                         {"rope_theta", 500000},
                         {"original_max_position_embeddings", 8192}};
  EXPECT_EQ(Table(llama3).regime, Table(by_parts).regime);
}

// The paper's ramp is linear in turns, that of every implementation in the pair index.
TEST(RopeTableTest, YarnHasTheRampOfTheCodeNotOfThePaper) {
  const Json yarn = {
      {"rope_type", "yarn"}, {"factor", 8}, {"original_max_position_embeddings", 4096}};
  EXPECT_NEAR(Table(yarn).inv_freq[32], 5.96e-3, 1e-5);
  Json by_parts = yarn;
  by_parts["rope_type"] = "ntk-by-parts";
  EXPECT_NEAR(Table(by_parts).inv_freq[32], 2.81e-3, 1e-5);
}

TEST(RopeTableTest, GiraffeTakesThePapersThreeFrequenciesToo) {
  constexpr double kB = 2 * 3.14159265358979323846 / 2048;
  const Json repository = {{"rope_type", "giraffe"}, {"factor", 4}, {"truncate_length", 2048}};
  const Json paper = {{"rope_type", "giraffe"},
                      {"factor", 4},
                      {"truncate_high", kB},
                      {"truncate_low", kB / 8},
                      {"truncate_value", kB / 16}};
  ExpectNear(Table(paper).inv_freq, Table(repository).inv_freq);
  const RopeTable all =
      Table({{"rope_type", "giraffe"}, {"factor", 2}, {"power", 0.5}, {"truncate_length", 4096}});
  EXPECT_EQ(all.inv_freq.front(), 0.5);
  EXPECT_EQ(all.inv_freq.back(), 0) << "no rotation at all";
}

TEST(RopeTableTest, DynamicWithAlphaHasOneTableForAllLengths) {
  const Json rope = {{"rope_type", "dynamic"}, {"alpha", 1000.0}};
  EXPECT_EQ(Table(rope, 1).regime, Table(rope, 1 << 20).regime);
  EXPECT_FALSE(DependsOnLength(*Parse(rope)->rope));
  Json ntk = {{"rope_type", "ntk-aware"}, {"factor", 1000.0}};
  EXPECT_EQ(Table(rope).regime, Table(ntk).regime);
}

// Other servers form alpha from factor alone, so that short prompts pay for long ones.
TEST(RopeTableTest, DynamicIsUntouchedWithinTheTrainedLength) {
  const Json rope = {{"rope_type", "dynamic"}, {"factor", 4}};
  const RopeRegime plain = Table({{"rope_type", "default"}}).regime;
  for (const int64_t length : {0, 1, 4095, 4096}) EXPECT_EQ(Table(rope, length).regime, plain);
  EXPECT_NE(Table(rope, 4097).regime, plain);
  EXPECT_NE(Table(rope, 4097).regime, Table(rope, 4098).regime) << "exact, not in steps";
}

// YaRN too: a short text in a deployment with YaRN rotates as a long one (docs/long-context.md).
TEST(RopeTableTest, OnlyDynamicAndLongRopeDependOnLength) {
  for (const std::string type : {"default", "linear", "yarn", "llama3", "proportional", "giraffe",
                                 "ntk-aware", "ntk", "ntk-by-parts"}) {
    SCOPED_TRACE(type);
    Json rope = {{"rope_type", type}};
    if (type != "default" && type != "proportional") rope["factor"] = 4;
    if (type == "yarn" || type == "llama3" || type == "ntk-by-parts") {
      rope["original_max_position_embeddings"] = 1024;
    }
    if (type == "llama3") rope.update({{"low_freq_factor", 1}, {"high_freq_factor", 4}});
    EXPECT_FALSE(DependsOnLength(*Parse(rope)->rope));
    EXPECT_EQ(Table(rope, 1).regime, Table(rope, 1 << 20).regime);
  }
}

// Position L is the first that the short table has never seen.
TEST(RopeTableTest, LongRopeIsLongFromOneBeyondTheOriginalLength) {
  const Json rope = {{"rope_type", "longrope"},
                     {"short_factor", std::vector<double>(64, 1.0)},
                     {"long_factor", std::vector<double>(64, 4.0)},
                     {"original_max_position_embeddings", 1024}};
  EXPECT_EQ(Table(rope, 1024).inv_freq[0], 1);
  EXPECT_EQ(Table(rope, 1025).inv_freq[0], 0.25);
  EXPECT_EQ(Table(rope, 1025).regime, Table(rope, 1 << 20).regime);
  EXPECT_EQ(Parse(rope)->rope->factor, 4) << "max_position_embeddings over the original";
  EXPECT_NEAR(Table(rope, 0).attention_factor, std::sqrt(1 + std::log(4.0) / std::log(1024.0)),
              1e-15);
}

// They scale magnitudes; one server multiplies angles.
TEST(RopeTableTest, LongRopeMscalesAreAttentionFactors) {
  Json rope = {{"rope_type", "longrope"},
               {"short_factor", std::vector<double>(64, 1.0)},
               {"long_factor", std::vector<double>(64, 4.0)},
               {"short_mscale", 1.1},
               {"long_mscale", 1.3},
               {"original_max_position_embeddings", 1024}};
  EXPECT_EQ(Table(rope, 1).attention_factor, 1.1);
  EXPECT_EQ(Table(rope, 2000).attention_factor, 1.3);
  EXPECT_EQ(Table(rope, 2000).inv_freq[0], 0.25);
  rope["type"] = "su";
  rope.erase("rope_type");
  EXPECT_EQ(Table(rope, 1).attention_factor, 1.1) << "the older name";
}

// --- Regimes. ---

TEST(RopeTableTest, RegimesAreEqualExactlyWhenTablesAre) {
  const Json variants[] = {
      {{"rope_type", "default"}},
      {{"rope_type", "default"}, {"rope_theta", 10001}},
      {{"rope_type", "default"}, {"interleaved", true}},
      {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}},
      {{"rope_type", "linear"}, {"factor", 2}},
      {{"rope_type", "yarn"}, {"factor", 2}, {"original_max_position_embeddings", 4096}},
      {{"rope_type", "yarn"},
       {"factor", 2},
       {"original_max_position_embeddings", 4096},
       {"attention_factor", 1}}};
  std::set<std::string> texts;
  for (const Json& rope : variants) {
    texts.insert(Table(rope).regime.ToString());
    EXPECT_EQ(Table(rope).regime, Table(rope).regime);
  }
  EXPECT_EQ(texts.size(), std::size(variants));
  EXPECT_EQ(Table({{"rope_type", "linear"}, {"factor", 1}}).regime, Table(variants[0]).regime);
  EXPECT_EQ(RopeRegime{}.ToString(), std::string(32, '0'));
}

// --- Refusals. ---

TEST(RopeTableTest, UnknownTypesAreRefusedByName) {
  for (const char* type : {"xpos", "mrope", "dynamic-yarn", "deepseek_yarn", "Linear", ""}) {
    const auto table = MakeRopeTable({.type = type, .rotary_dim = 16});
    EXPECT_EQ(table.status().code(), StatusCode::kUnimplemented) << type;
    EXPECT_NE(table.status().message().find(std::string("'") + type + "'"), std::string::npos)
        << table.status();
  }
}

TEST(RopeTableTest, RefusesWidthsAndNumbersThatMakeNoTable) {
  for (const int64_t width : {int64_t{0}, int64_t{-2}, int64_t{1}, int64_t{15}}) {
    EXPECT_EQ(MakeRopeTable({.rotary_dim = width}).status().code(), StatusCode::kInvalidArgument)
        << width;
  }
  EXPECT_FALSE(MakeRopeTable({.theta = 0, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.theta = NAN, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "linear", .factor = 0.5, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "linear", .factor = NAN, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "ntk-aware", .factor = 2, .rotary_dim = 2}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "yarn", .factor = 2, .rotary_dim = 8}).ok()) << "no L";
}

}  // namespace
}  // namespace godwit
