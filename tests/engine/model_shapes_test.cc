#include "engine/model_shapes.h"

#include <gtest/gtest.h>

#include "engine/model_config.h"

namespace godwit {
namespace {

// Products and tables; norms are left out.
int64_t Parameters(const ModelConfig& config) {
  const int64_t width = config.num_heads * config.head_dim, d = config.d_model;
  const int64_t layer =
      4 * d * width + (config.family == "transnormer" ? width * d : 0) + 3 * d * config.d_ff;
  return config.num_layers * layer +
         (config.tie_word_embeddings ? 1 : 2) * config.vocab_size * config.d_model;
}

TEST(ModelShapesTest, KnownShapesAreThoseOfTheModels) {
  const auto parameters = [](const char* name) {
    const auto text = ConfigOfShape(name);
    EXPECT_TRUE(text.ok()) << text.status();
    const auto config = ParseModelConfig(*text, "");
    EXPECT_TRUE(config.ok()) << config.status();
    return Parameters(*config);
  };
  EXPECT_EQ(parameters("tnl-1b"), 1'020'264'448);
  EXPECT_EQ(parameters("tnl-7b"), 6'836'715'520);
  EXPECT_EQ(parameters("llama-2-7b"), 6'738'149'376);    // 6,738,415,616 with norms
  EXPECT_EQ(parameters("llama-2-13b"), 13'015'449'600);  // 13,015,864,320
}

TEST(ModelShapesTest, AllParse) {
  for (const std::string& name : ShapeNames()) {
    EXPECT_TRUE(ParseModelConfig(*ConfigOfShape(name), "").ok()) << name;
  }
}

TEST(ModelShapesTest, OthersAreRefusedWithTheKnownOnes) {
  const absl::Status status = ConfigOfShape("gpt-2").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("tnl-1b, tnl-7b"), std::string::npos) << status;
}

}  // namespace
}  // namespace godwit
