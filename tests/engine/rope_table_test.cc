#include "engine/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace godwit {
namespace {

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

TEST(RopeTableTest, KnownValuesOfPublishedModels) {
  const auto llama2 = MakeRopeTable({.theta = 10000, .rotary_dim = 128});
  ASSERT_TRUE(llama2.ok());
  EXPECT_DOUBLE_EQ(llama2->inv_freq.front(), 1);
  EXPECT_NEAR(llama2->inv_freq.back(), 1.1547819846894583e-4, 1e-18);  // 10000^(-126/128)
  const auto giraffe =
      MakeRopeTable({.type = "linear", .theta = 10000, .factor = 8, .rotary_dim = 128});
  ASSERT_TRUE(giraffe.ok());
  EXPECT_DOUBLE_EQ(giraffe->inv_freq.front(), 0.125);
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

TEST(RopeTableTest, UnknownTypesAreRefusedByName) {
  for (const char* type : {"yarn", "dynamic", "llama3", "longrope", "Linear", ""}) {
    const auto table = MakeRopeTable({.type = type, .rotary_dim = 16});
    EXPECT_EQ(table.status().code(), absl::StatusCode::kUnimplemented) << type;
    EXPECT_NE(table.status().message().find(std::string("'") + type + "'"), std::string::npos)
        << table.status();
  }
}

TEST(RopeTableTest, RefusesWidthsAndNumbersThatMakeNoTable) {
  for (const int64_t width : {int64_t{0}, int64_t{-2}, int64_t{1}, int64_t{15}}) {
    EXPECT_EQ(MakeRopeTable({.rotary_dim = width}).status().code(),
              absl::StatusCode::kInvalidArgument)
        << width;
  }
  EXPECT_FALSE(MakeRopeTable({.theta = 0, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.theta = NAN, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "linear", .factor = 0.5, .rotary_dim = 8}).ok());
  EXPECT_FALSE(MakeRopeTable({.type = "linear", .factor = NAN, .rotary_dim = 8}).ok());
}

}  // namespace
}  // namespace godwit
