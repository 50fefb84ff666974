#include "engine/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/rope_table.h"
#include "nlohmann/json.hpp"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using absl::StatusCode;
using Json = nlohmann::json;

Json LlamaJson() {
  return Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
    "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 96,
    "initializer_range": 0.02, "intermediate_size": 256, "max_position_embeddings": 4096, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 6, "num_hidden_layers": 3, "num_key_value_heads": 2,
    "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "tie_word_embeddings": true,
    "transformers_version": "5.17.0", "use_cache": true, "vocab_size": 512})");
}

Json TransnormerJson() {
  return Json::parse(R"({
    "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "vocab_size": 257,
    "decoder_embed_dim": 96, "decoder_layers": 4, "decoder_attention_heads": 6, "hidden_dim": 96, "glu_dim": 160,
    "linear_use_lrpe_list": [1, 0, 0, 0], "linear_act_fun": "swish", "norm_type": "simplermsnorm",
    "no_scale_embedding": false, "add_bos_token": false, "bias": false, "init_std": 0.02, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": true, "torch_dtype": "bfloat16"})");
}

absl::StatusOr<ModelConfig> Parse(const Json& json, const std::string& rope = "") {
  return ParseModelConfig(json.dump(), rope);
}

void ExpectFault(const absl::Status& status, StatusCode code,
                 const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status;
  for (const std::string& part : parts)
    EXPECT_NE(status.message().find(part), std::string::npos) << part << ": " << status;
}

TEST(ModelConfigTest, ReadsLlama) {
  const auto config = Parse(LlamaJson());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, "llama");
  EXPECT_EQ(config->vocab_size, 512);
  EXPECT_EQ(config->d_model, 96);
  EXPECT_EQ(config->num_layers, 3);
  EXPECT_EQ(config->num_heads, 6);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->d_ff, 256);
  EXPECT_EQ(config->context_length, 4096);
  EXPECT_TRUE(config->tie_word_embeddings);
  EXPECT_FLOAT_EQ(config->norm_epsilon, 1e-5f);
  EXPECT_TRUE(config->norm_has_weight);
  EXPECT_EQ(config->gate_activation, Activation::kSilu);
  EXPECT_EQ(config->decay_rule, DecayRule::kNone);
  EXPECT_EQ(config->embedding_scale, 1);
  ASSERT_TRUE(config->rope.has_value());
  EXPECT_EQ(config->rope->type, "default");
  EXPECT_EQ(config->rope->theta, 500000);
  EXPECT_EQ(config->rope->rotary_dim, 16);
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{2}));
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_TRUE(config->add_bos);
}

TEST(ModelConfigTest, ReadsTransnormer) {
  const auto config = Parse(TransnormerJson());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, "transnormer");
  EXPECT_EQ(config->num_heads, 6);
  EXPECT_EQ(config->num_kv_heads, 6);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->d_ff, 160);
  EXPECT_EQ(config->context_length, 0);
  EXPECT_TRUE(config->tie_word_embeddings) << "the default of this family";
  EXPECT_FLOAT_EQ(config->embedding_scale, std::sqrt(96.0f));
  EXPECT_FLOAT_EQ(config->norm_epsilon, 1e-6f);
  EXPECT_FALSE(config->norm_has_weight);
  EXPECT_EQ(config->gate_activation, Activation::kNone);
  EXPECT_EQ(config->qk_activation, Activation::kSilu);
  EXPECT_EQ(config->decay_rule, DecayRule::kAlibiLayer);
  EXPECT_EQ(config->q_scale, 1);
  EXPECT_FALSE(config->rope.has_value());
  EXPECT_EQ(config->lrpe_layers, (std::vector<bool>{true, false, false, false}));
  EXPECT_FALSE(config->add_bos);
}

TEST(ModelConfigTest, TransnormerSpellings) {
  Json json = TransnormerJson();
  json["no_scale_embedding"] = true;
  json["linear_act_fun"] = "silu";
  json["tie_word_embeddings"] = false;
  json["hidden_dim"] = 240;                // wider than the model
  json["max_position_embeddings"] = 2048;  // says nothing about this family
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->embedding_scale, 1);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_EQ(config->head_dim, 40);
  EXPECT_EQ(config->context_length, 0);
}

TEST(ModelConfigTest, LlamaDefaultsOfAbsentFields) {
  Json json = LlamaJson();
  for (const char* name :
       {"head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "hidden_act",
        "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "architectures"}) {
    json.erase(name);
  }
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->num_kv_heads, 6);
  EXPECT_EQ(config->rope->theta, 10000);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_TRUE(config->eos_token_ids.empty());
  EXPECT_FALSE(config->bos_token_id.has_value());
  EXPECT_FALSE(config->add_bos) << "there is no bos to add";
}

// --- Rope, in both spellings. ---

TEST(ModelConfigTest, RopeScalingAndRopeParametersSayTheSame) {
  Json older = LlamaJson();
  older.erase("rope_parameters");
  older["rope_theta"] = 10000.0;
  older["rope_scaling"] = {{"type", "linear"}, {"factor", 8.0}};
  Json newer = LlamaJson();
  newer["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 10000.0}};
  newer["rope_scaling"] = nullptr;
  for (const Json& json : {older, newer}) {
    const auto config = Parse(json);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->rope->type, "linear");
    EXPECT_EQ(config->rope->factor, 8);
    EXPECT_EQ(config->rope->theta, 10000);
    EXPECT_EQ(config->context_length, 4096) << "never multiplied";
  }
}

TEST(ModelConfigTest, TheRopeFlagReplacesTheTableOnly) {
  const auto config = Parse(LlamaJson(), R"({"type":"linear","factor":16})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope->type, "linear");
  EXPECT_EQ(config->rope->factor, 16);
  EXPECT_EQ(config->rope->theta, 500000) << "the checkpoint's";
  EXPECT_EQ(config->context_length, 4096);

  Json unknown = LlamaJson();
  unknown["rope_parameters"] = {{"rope_type", "xdrope"}, {"speed", 4.0}, {"rope_theta", 10000.0}};
  const auto replaced = Parse(unknown, R"({"rope_type":"default","rope_theta":20000})");
  ASSERT_TRUE(replaced.ok()) << replaced.status();
  EXPECT_EQ(replaced->rope->type, "default");
  EXPECT_EQ(replaced->rope->theta, 20000);
}

TEST(ModelConfigTest, BadRopeFlags) {
  ExpectFault(Parse(LlamaJson(), "linear").status(), StatusCode::kInvalidArgument,
              {"--rope", "not JSON"});
  ExpectFault(Parse(LlamaJson(), R"({"type":"linear"})").status(), StatusCode::kInvalidArgument,
              {"--rope", "factor"});
  ExpectFault(Parse(LlamaJson(), R"({"type":"linear","factor":0.5})").status(),
              StatusCode::kInvalidArgument, {"factor", "0.5"});
  ExpectFault(Parse(LlamaJson(), R"({"type":"linear","factor":2,"speed":3})").status(),
              StatusCode::kUnimplemented, {"speed"});
  ExpectFault(Parse(LlamaJson(), R"({"type":"xpos","factor":2})").status(),
              StatusCode::kUnimplemented, {"--rope", "'xpos'", "'yarn'"});
  for (const char* factor : {R"("8")", "null", "0.999", "-4", "true", "[4]", "1e7", "{}"}) {
    ExpectFault(
        Parse(LlamaJson(), absl::StrCat(R"({"type":"linear","factor":)", factor, "}")).status(),
        StatusCode::kInvalidArgument, {"--rope", "factor"});
  }
  ExpectFault(Parse(TransnormerJson(), R"({"type":"linear","factor":2})").status(),
              StatusCode::kInvalidArgument, {"--rope", "transnormer"});
}

TEST(ModelConfigTest, OtherRopeTypesAreRefusedByName) {
  for (const char* type : {"mrope", "xdrope", "dynamic-yarn", "deepseek_yarn", "telechat3-yarn",
                           "mllama4", "openpangu", "Yarn", "surprise"}) {
    Json json = LlamaJson();
    json["rope_parameters"] = {
        {"rope_type", type}, {"factor", 4.0}, {"original_max_position_embeddings", 64}};
    ExpectFault(Parse(json).status(), StatusCode::kUnimplemented,
                {"config.json: rope_parameters", std::string("'") + type + "'"});
  }
}

// Each type with all that it needs, for a model of head_dim 16 and 4096 positions.
Json CompleteRope(const std::string& type) {
  Json rope = {{"rope_type", type}, {"factor", 4.0}};
  if (type == "default" || type == "proportional") rope.erase("factor");
  if (type == "llama3") {
    rope["low_freq_factor"] = 1.0;
    rope["high_freq_factor"] = 4.0;
  }
  if (type == "yarn" || type == "llama3" || type == "longrope" || type == "su")
    rope["original_max_position_embeddings"] = 1024;
  if (type == "longrope" || type == "su") {
    rope["short_factor"] = std::vector<double>(8, 1.0);
    rope["long_factor"] = std::vector<double>(8, 4.0);
  }
  return rope;
}

const char* const kRopeTypes[] = {"default",  "linear",    "dynamic",      "yarn",
                                  "longrope", "su",        "llama3",       "proportional",
                                  "ntk",      "ntk-aware", "ntk-by-parts", "giraffe"};

TEST(ModelConfigTest, EveryRopeTypeInEverySpelling) {
  for (const std::string type : kRopeTypes) {
    SCOPED_TRACE(type);
    Json newer = LlamaJson();
    newer["rope_parameters"] = CompleteRope(type);
    newer["rope_parameters"]["rope_theta"] = 500000.0;
    Json by_layer = LlamaJson();
    by_layer["rope_parameters"] = {{"full_attention", newer["rope_parameters"]},
                                   {"sliding_attention", {{"rope_type", "default"}}}};
    Json older = LlamaJson();
    older.erase("rope_parameters");
    older["rope_theta"] = 500000.0;
    older["rope_scaling"] = CompleteRope(type);
    older["rope_scaling"]["type"] = type;
    older["rope_scaling"].erase("rope_type");
    for (const Json& json : {newer, by_layer, older}) {
      const auto config = Parse(json);
      ASSERT_TRUE(config.ok()) << config.status();
      EXPECT_EQ(config->rope->type, type);
      EXPECT_EQ(config->rope->theta, 500000);
      EXPECT_EQ(config->rope->factor, type == "default" || type == "proportional" ? 1 : 4);
    }
    // As --rope, over a checkpoint with another method.
    Json other = LlamaJson();
    other["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 20000.0}};
    const auto replaced = Parse(other, CompleteRope(type).dump());
    ASSERT_TRUE(replaced.ok()) << replaced.status();
    EXPECT_EQ(replaced->rope->type, type);
    EXPECT_EQ(replaced->rope->theta, 20000);
  }
}

TEST(ModelConfigTest, MalformedRopeFieldsAreNamed) {
  const auto fault = [](const std::string& type, const char* field, const Json& value) {
    Json json = LlamaJson();
    json["rope_parameters"] = CompleteRope(type);
    json["rope_parameters"][field] = value;
    return Parse(json).status();
  };
  for (const std::string type :
       {"linear", "dynamic", "yarn", "llama3", "ntk", "ntk-aware", "ntk-by-parts", "giraffe"}) {
    SCOPED_TRACE(type);
    for (const Json& value :
         {Json("4.0"), Json(0.5), Json(0), Json(-4), Json(true), Json({4.0}), Json(1e9)}) {
      ExpectFault(fault(type, "factor", value), StatusCode::kInvalidArgument,
                  {"config.json: rope_parameters: factor"});
    }
    ExpectFault(fault(type, "speed", 1), StatusCode::kUnimplemented, {"'speed'"});
    ExpectFault(fault(type, "rope_theta", "1e4"), StatusCode::kInvalidArgument, {"rope_theta"});
    ExpectFault(fault(type, "rope_theta", 0), StatusCode::kInvalidArgument, {"rope_theta"});
  }
  for (const std::string type : {"linear", "dynamic", "llama3", "ntk", "ntk-aware"}) {
    ExpectFault(fault(type, "factor", nullptr), StatusCode::kInvalidArgument,
                {"factor: required field is missing"});
  }
  for (const char* field :
       {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    ExpectFault(fault("llama3", field, nullptr), StatusCode::kInvalidArgument, {field, "missing"});
    ExpectFault(fault("llama3", field, "1"), StatusCode::kInvalidArgument, {field, "\"1\""});
  }
  ExpectFault(fault("llama3", "low_freq_factor", 4), StatusCode::kInvalidArgument,
              {"llama3", "not below"});
  for (const char* field : {"short_factor", "long_factor", "original_max_position_embeddings"}) {
    ExpectFault(fault("longrope", field, nullptr), StatusCode::kInvalidArgument,
                {field, "missing"});
  }
  for (const char* field : {"short_factor", "long_factor"}) {
    ExpectFault(fault("longrope", field, 1.0), StatusCode::kInvalidArgument, {field, "a list"});
    ExpectFault(fault("longrope", field, std::vector<double>(7, 1.0)), StatusCode::kInvalidArgument,
                {field, "expected 8 numbers, found 7"});
    ExpectFault(fault("longrope", field, {1, 1, 1, 0, 1, 1, 1, 1}), StatusCode::kInvalidArgument,
                {absl::StrCat(field, "[3]")});
  }
  ExpectFault(fault("yarn", "beta_fast", 0.5), StatusCode::kInvalidArgument, {"beta_slow"});
  ExpectFault(fault("yarn", "truncate", "false"), StatusCode::kInvalidArgument, {"truncate"});
  ExpectFault(fault("yarn", "attention_factor", 0), StatusCode::kInvalidArgument,
              {"attention_factor"});
  ExpectFault(fault("giraffe", "power", -1), StatusCode::kInvalidArgument, {"power"});
  ExpectFault(fault("giraffe", "power_first_index", 2), StatusCode::kInvalidArgument,
              {"power_first_index"});
  ExpectFault(fault("giraffe", "truncate_high", 1e-3), StatusCode::kInvalidArgument,
              {"truncate_low", "missing"});
  ExpectFault(fault("dynamic", "alpha", 0.5), StatusCode::kInvalidArgument, {"alpha"});
  for (const Json& share : {Json(0), Json(1.5), Json("0.5"), Json(0.05), Json(0.2)}) {
    ExpectFault(fault("default", "partial_rotary_factor", share), StatusCode::kInvalidArgument,
                {"partial_rotary_factor"});
  }
}

TEST(ModelConfigTest, PartialRotaryInBothPlaces) {
  Json json = LlamaJson();
  json["rope_parameters"]["partial_rotary_factor"] = 0.5;
  EXPECT_EQ(Parse(json)->rope->rotary_dim, 8);
  json = LlamaJson();
  json["partial_rotary_factor"] = 0.25;
  EXPECT_EQ(Parse(json)->rope->rotary_dim, 4);
  EXPECT_EQ(Parse(json, R"({"type":"linear","factor":2})")->rope->rotary_dim, 4);
  json["rope_parameters"]["rope_type"] = "proportional";
  EXPECT_EQ(Parse(json)->rope->rotary_dim, 16) << "its tail pairs stand still";
  EXPECT_EQ(Parse(json)->rope->rotated_share, 0.25);
}

// One file may leave the factor to its two lengths; an old one has no original length.
TEST(ModelConfigTest, YarnFillsInWhatOlderFilesLeaveOut) {
  Json json = LlamaJson();
  json["rope_parameters"] = {
      {"rope_type", "yarn"}, {"factor", nullptr}, {"original_max_position_embeddings", 1024}};
  EXPECT_EQ(Parse(json)->rope->factor, 4);
  json["rope_parameters"] = {{"rope_type", "yarn"}, {"factor", 2.5}};
  EXPECT_EQ(Parse(json)->rope->original_length, 4096);
  json["rope_parameters"] = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 8192}};
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"factor is missing", "8192"});
}

TEST(ModelConfigTest, DynamicRefusesTwoLengths) {
  Json json = LlamaJson();
  json["rope_parameters"] = {
      {"rope_type", "dynamic"}, {"factor", 4}, {"original_max_position_embeddings", 1024}};
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"4096", "1024", "--rope"});
  const auto config =
      Parse(json, R"({"rope_type":"dynamic","factor":4,"original_max_position_embeddings":2048})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope->original_length, 2048);
  json["rope_parameters"].erase("original_max_position_embeddings");
  EXPECT_EQ(Parse(json)->rope->original_length, 4096);
}

// What published checkpoints state, and the limit that follows. Multiplying by the factor whenever
// there is one has made 8x tables of files that state the length after scaling.
TEST(ModelConfigTest, TheContextIsStatedNeverMultipliedSilently) {
  struct Row {
    const char* name;
    int64_t max_positions;
    Json rope;
    int64_t expected;
    const char* note;
  };
  const Json linear8 = {{"rope_type", "linear"}, {"factor", 8.0}};
  const Json yarn = {
      {"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  const Row rows[] = {
      {"Giraffe 70B, first revision", 4096, linear8, 4096, "--context-length 32768"},
      {"Giraffe 32k, later revision", 32768, linear8, 32768, "--context-length 262144"},
      {"Gemma 3", 131072, linear8, 131072, "131072"},
      {"Llama 3 Giraffe", 8192, {{"rope_type", "dynamic"}, {"factor", 4.0}}, 8192, "32768"},
      {"TeleChat 3", 32768, {{"rope_type", "linear"}, {"factor", 4.0}}, 32768, "131072"},
      {"Qwen with YaRN enabled", 32768, yarn, 131072, "32768 times rope factor 4"},
      {"YaRN after scaling", 131072, yarn, 131072, ""},
      {"Llama 3.1",
       131072,
       {{"rope_type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 1.0},
        {"high_freq_factor", 4.0},
        {"original_max_position_embeddings", 8192}},
       131072,
       ""},
      {"no scaling", 4096, {{"rope_type", "default"}}, 4096, ""}};
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    Json json = LlamaJson();
    json["max_position_embeddings"] = row.max_positions;
    json["rope_parameters"] = row.rope;
    const auto config = Parse(json);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->context_length, row.expected);
    EXPECT_EQ(config->context_note.empty(), *row.note == '\0') << config->context_note;
    EXPECT_NE(config->context_note.find(row.note), std::string::npos) << config->context_note;
  }
}

TEST(ModelConfigTest, OneRequestMayReplaceTheMethodOnly) {
  Json json = LlamaJson();
  json["rope_parameters"]["partial_rotary_factor"] = 0.5;
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto rope = OverrideRope(*config, R"({"type":"yarn","factor":4})", "rope");
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_EQ(rope->type, "yarn");
  EXPECT_EQ(rope->theta, 500000);
  EXPECT_EQ(rope->rotary_dim, 8);
  EXPECT_EQ(rope->original_length, 4096);
  ExpectFault(OverrideRope(*config, R"({"partial_rotary_factor":0.25})", "rope").status(),
              StatusCode::kInvalidArgument, {"rope", "rotary width"});
  ExpectFault(OverrideRope(*config, R"({"interleaved":true})", "rope").status(),
              StatusCode::kInvalidArgument, {"pair layout"});
  ExpectFault(OverrideRope(*config, "linear", "rope").status(), StatusCode::kInvalidArgument,
              {"rope: not JSON"});
  ExpectFault(OverrideRope(*config, R"({"type":"linear","factor":"4"})", "rope").status(),
              StatusCode::kInvalidArgument, {"rope: factor", "\"4\""});
  ExpectFault(OverrideRope(*Parse(TransnormerJson()), R"({"type":"default"})", "rope").status(),
              StatusCode::kInvalidArgument, {"transnormer"});
}

TEST(ModelConfigTest, RopeContradictionsAreRefused) {
  Json both = LlamaJson();
  both["rope_scaling"] = {{"type", "linear"}, {"factor", 8.0}};
  ExpectFault(Parse(both).status(), StatusCode::kInvalidArgument,
              {"rope_parameters and rope_scaling"});
  Json thetas = LlamaJson();
  thetas["rope_theta"] = 10000.0;
  ExpectFault(Parse(thetas).status(), StatusCode::kInvalidArgument,
              {"rope_theta", "10000", "500000"});
  Json types = LlamaJson();
  types["rope_parameters"] = {{"rope_type", "linear"}, {"type", "default"}, {"factor", 2}};
  ExpectFault(Parse(types).status(), StatusCode::kInvalidArgument,
              {"rope_type", "linear", "default"});
  Json by_layer = LlamaJson();
  by_layer["rope_parameters"] = {{"full_attention", {{"rope_type", "default"}}},
                                 {"moon_attention", {{"rope_type", "default"}}}};
  ExpectFault(Parse(by_layer).status(), StatusCode::kUnimplemented, {"moon_attention"});
  by_layer["rope_parameters"] = {{"full_attention", {{"rope_type", "linear"}}}};
  ExpectFault(Parse(by_layer).status(), StatusCode::kInvalidArgument,
              {"rope_parameters: full_attention", "factor"});
  Json text = LlamaJson();
  text["rope_parameters"] = "linear";
  ExpectFault(Parse(text).status(), StatusCode::kInvalidArgument, {"rope_parameters", "an object"});
}

// --- Token ids. ---

TEST(ModelConfigTest, EosIsOneAListOrNull) {
  Json json = LlamaJson();
  json["eos_token_id"] = {2, 5, 511};
  EXPECT_EQ(Parse(json)->eos_token_ids, (std::vector<int32_t>{2, 5, 511}));
  json["eos_token_id"] = nullptr;
  EXPECT_TRUE(Parse(json)->eos_token_ids.empty());
  json["eos_token_id"] = 512;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument,
              {"eos_token_id", "[0, 511]", "512"});
  json["eos_token_id"] = {2, -1};
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"eos_token_id[1]"});
  json["eos_token_id"] = std::vector<int>(65, 1);
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"eos_token_id", "at most 64"});
  json = LlamaJson();
  json["bos_token_id"] = nullptr;
  json["add_bos_token"] = true;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument,
              {"add_bos_token", "bos_token_id"});
}

TEST(ModelConfigTest, NeighbourFilesAddEosAndBos) {
  const TempFolder folder;
  folder.Write("config.json", LlamaJson().dump());
  EXPECT_EQ(ReadModelConfig(folder.path(), "")->eos_token_ids, (std::vector<int32_t>{2}));
  folder.Write("generation_config.json",
               R"({"eos_token_id":[7,8],"temperature":0.6,"anything":1})");
  folder.Write("tokenizer_config.json",
               R"({"add_bos_token":false,"added_tokens_decoder":{"0":{"content":"<unk>"}}})");
  const auto config = ReadModelConfig(folder.path(), "");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{7, 8}));
  EXPECT_FALSE(config->add_bos);

  folder.Write("generation_config.json", R"({"eos_token_id":999})");
  ExpectFault(ReadModelConfig(folder.path(), "").status(), StatusCode::kInvalidArgument,
              {"generation_config.json", "999"});
  folder.Write("generation_config.json", "{");
  ExpectFault(ReadModelConfig(folder.path(), "").status(), StatusCode::kInvalidArgument,
              {"generation_config.json", "not JSON"});
}

TEST(ModelConfigTest, TheConfigsOwnAddBosWinsOverTheTokenizers) {
  const TempFolder folder;
  folder.Write("config.json", TransnormerJson().dump());
  folder.Write("tokenizer_config.json",
               R"({"add_bos_token":true})");  // as Baichuan's, whose bos this family never adds
  EXPECT_FALSE(ReadModelConfig(folder.path(), "")->add_bos);
}

TEST(ModelConfigTest, AFolderWithoutConfigIsNotFound) {
  const TempFolder folder;
  ExpectFault(ReadModelConfig(folder.path(), "").status(), StatusCode::kNotFound, {"config.json"});
}

// --- Refusals. ---

TEST(ModelConfigTest, RequiredFieldsAreNamed) {
  for (const char* name :
       {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps"}) {
    Json json = LlamaJson();
    json.erase(name);
    ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {name, "missing"});
  }
  for (const char* name :
       {"vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads",
        "hidden_dim", "glu_dim", "linear_use_lrpe_list"}) {
    Json json = TransnormerJson();
    json.erase(name);
    ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {name, "missing"});
  }
}

TEST(ModelConfigTest, NumbersOutOfRangeAreNamed) {
  for (const char* name :
       {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "intermediate_size", "max_position_embeddings", "head_dim"}) {
    for (const Json& value : {Json(0), Json(-1), Json(int64_t{1} << 62), Json("8"), Json(1.5),
                              Json(true), Json(1e30)}) {
      Json json = LlamaJson();
      json[name] = value;
      ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {name});
    }
  }
  for (const char* name : {"vocab_size", "decoder_embed_dim", "decoder_layers",
                           "decoder_attention_heads", "hidden_dim", "glu_dim"}) {
    for (const Json& value :
         {Json(0), Json(-1), Json(int64_t{1} << 62), Json("8"), Json(nullptr)}) {
      Json json = TransnormerJson();
      json[name] = value;
      ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {name});
    }
  }
  Json json = LlamaJson();
  for (const Json& value : {Json(0), Json(-1e-5), Json(2), Json("1e-5")}) {
    json["rms_norm_eps"] = value;
    ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"rms_norm_eps"});
  }
}

TEST(ModelConfigTest, NumbersThatDoNotFitTogether) {
  Json json = LlamaJson();
  json["num_key_value_heads"] = 4;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument,
              {"num_key_value_heads", "6", "4"});
  json = LlamaJson();
  json.erase("head_dim");
  json["hidden_size"] = 100;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument,
              {"num_attention_heads", "hidden_size 100"});
  json = LlamaJson();
  json["head_dim"] = 15;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"head_dim", "even"});
  json["head_dim"] = 1024;
  json["num_attention_heads"] = 4096;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"heads * head_dim"});
  json = TransnormerJson();
  json["hidden_dim"] = 100;
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"hidden_dim", "6 heads", "100"});
  json = TransnormerJson();
  json["decoder_layers"] = 1;
  json["linear_use_lrpe_list"] = {1};
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"decoder_layers", "[2,"});
  json = TransnormerJson();
  for (const Json& list : {Json::array(), Json{1, 0}, Json{1, 0, 0, 0, 0}}) {
    json["linear_use_lrpe_list"] = list;
    ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument,
                {"linear_use_lrpe_list", "4 layers"});
  }
  json["linear_use_lrpe_list"] = {1, 0, 0, 2};
  ExpectFault(Parse(json).status(), StatusCode::kInvalidArgument, {"linear_use_lrpe_list[3]"});
}

TEST(ModelConfigTest, OtherFeaturesAreRefusedByName) {
  const std::vector<std::pair<std::string, Json>> llama = {
      {"attention_bias", true},
      {"mlp_bias", true},
      {"sliding_window", 4096},
      {"use_sliding_window", true},
      {"hidden_act", "gelu"},
      {"quantization_config", {{"bits", 4}}},
      {"layer_types", {"full_attention", "sliding_attention", "full_attention"}},
      {"logit_scale", 0.5},
      {"num_local_experts", 8},
      {"final_logit_softcapping", 30.0},
      {"qk_norm", true},
      {"embedding_multiplier", 12},
      {"is_encoder_decoder", true},
      {"clip_qkv", 8},
      {"some_future_field", "on"}};
  for (const auto& [name, value] : llama) {
    Json json = LlamaJson();
    json[name] = value;
    ExpectFault(Parse(json).status(), StatusCode::kUnimplemented, {name});
  }
  const std::vector<std::pair<std::string, Json>> transnormer = {
      {"gate_dim", 16},
      {"linear_act_fun", "relu"},
      {"linear_act_fun", "1+elu"},
      {"norm_type", "layernorm"},
      {"bias", true},
      {"rope_scaling", {{"type", "linear"}, {"factor", 2}}},
      {"use_softmax", true},
      {"quantization_config", {{"bits", 4}}}};
  for (const auto& [name, value] : transnormer) {
    Json json = TransnormerJson();
    json[name] = value;
    ExpectFault(Parse(json).status(), StatusCode::kUnimplemented, {name});
  }
}

TEST(ModelConfigTest, OtherModelsAreRefusedByName) {
  Json json = LlamaJson();
  for (const char* type : {"mistral", "minimax", "bailing_moe_linear", "Llama", ""}) {
    json["model_type"] = type;
    ExpectFault(Parse(json).status(), StatusCode::kUnimplemented,
                {std::string("'") + type + "'", "'llama', 'transnormer'"});
  }
  json = LlamaJson();
  json["architectures"] = {"LlamaForSequenceClassification"};
  ExpectFault(Parse(json).status(), StatusCode::kUnimplemented,
              {"architectures", "LlamaForSequenceClassification"});
}

TEST(ModelConfigTest, FieldsAtTheirDefaultAreFine) {
  Json json = LlamaJson();
  json.update(Json::parse(
      R"({"attention_bias":false,"mlp_bias":false,"sliding_window":null,"use_sliding_window":false,
    "quantization_config":null,"partial_rotary_factor":1.0,"layer_types":["full_attention","full_attention","full_attention"],
    "qk_norm":false,"_name_or_path":"x","is_decoder":true,"temperature":0.7,"some_future_field":false})"));
  EXPECT_TRUE(Parse(json).ok()) << Parse(json).status();
}

TEST(ModelConfigTest, TextThatIsNoConfig) {
  for (const char* text : {"", "{", "[]", "null", "3", "{\"model_type\":3}", "{}",
                           "{\"model_type\":\"llama\",\"model_type\":\"llama\"}"}) {
    EXPECT_EQ(ParseModelConfig(text, "").status().code(), StatusCode::kInvalidArgument) << text;
  }
}

// One to four edits of a text, at random.
std::string Mutated(std::string text, std::mt19937& random) {
  const auto below = [&](size_t limit) {
    return std::uniform_int_distribution<size_t>(0, limit - 1)(random);
  };
  for (size_t edit = 0, count = 1 + below(4); edit < count && !text.empty(); ++edit) {
    const size_t at = below(text.size());
    switch (below(4)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text.insert(at, 1 + below(3), "0123456789[]{},:\".-e"[below(20)]);
        break;
      case 2:
        text.erase(at, 1 + below(4));
        break;
      default:
        text[at] = "0123456789[]{},:\".-e"[below(20)];
        break;
    }
  }
  return text;
}

TEST(ModelConfigTest, SurvivesMutations) {
  constexpr uint32_t kSeed = 7;
  std::mt19937 random(kSeed);
  for (const std::string& original : {LlamaJson().dump(), TransnormerJson().dump()}) {
    for (int variant = 0; variant < 2000; ++variant) {
      const auto config = ParseModelConfig(Mutated(original, random), "");
      EXPECT_EQ(config.ok(), config.status().message().empty())
          << "seed " << kSeed << ", variant " << variant;
    }
  }
}

// What is accepted of a damaged rope makes finite tables at every length.
TEST(ModelConfigTest, DamagedRopesAreRefusedOrMakeTables) {
  constexpr uint32_t kSeed = 9;
  std::mt19937 random(kSeed);
  const ModelConfig model = *Parse(LlamaJson());
  int num_accepted = 0;
  for (const std::string type : kRopeTypes) {
    const std::string original = CompleteRope(type).dump();
    for (int variant = 0; variant < 1000; ++variant) {
      const std::string text = Mutated(original, random);
      const auto rope = OverrideRope(model, text, "rope");
      if (!rope.ok()) continue;
      ++num_accepted;
      for (const int64_t length : {int64_t{0}, int64_t{1}, int64_t{5000}, int64_t{1} << 40}) {
        const auto table = MakeRopeTable(*rope, length);
        ASSERT_TRUE(table.ok()) << text << ": " << table.status();
        for (const double frequency : table->inv_freq)
          ASSERT_TRUE(std::isfinite(frequency) && frequency >= 0) << text;
        ASSERT_TRUE(std::isfinite(table->attention_factor) && table->attention_factor > 0) << text;
      }
    }
  }
  EXPECT_GT(num_accepted, 100) << "the edits leave some valid";
}

// The configs of published models, where the test data is there.
TEST(ModelConfigTest, ReadsPublishedConfigs) {
  const char* data = std::getenv("GODWIT_TEST_DATA");
  if (data == nullptr) GTEST_SKIP() << "GODWIT_TEST_DATA names no folder with assets/";
  const auto read = [&](const std::string& name) {
    std::ifstream file(std::string(data) + "/assets/configs/" + name);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const auto llama = ParseModelConfig(read("llama-2-7b-hf-config.json"), "");
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(llama->head_dim, 128);
  EXPECT_EQ(llama->rope->theta, 10000);
  EXPECT_EQ(ParseModelConfig(read("minimax-m1-config.json"), "").status().code(),
            StatusCode::kUnimplemented);
  // The class defaults have no list of LRPE layers: no checkpoint runs without one.
  ExpectFault(ParseModelConfig(read("transnormer-class-defaults.json"), "").status(),
              StatusCode::kInvalidArgument, {"linear_use_lrpe_list", "24 layers", "0 entries"});
}

}  // namespace
}  // namespace godwit
