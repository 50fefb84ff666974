#include "engine/round_ways.h"

#include <array>
#include <random>

#include "gtest/gtest.h"

namespace godwit {
namespace {

// Steps of ways whose gains are these; how many took each.
std::array<int, kNumRoundWays> TakeSteps(RoundWays& ways, const RoundWays::Gains& gains,
                                         int num_steps, double spread, double pace = 1) {
  std::mt19937 random(5);
  std::normal_distribution<double> noise(0, spread);
  std::array<int, kNumRoundWays> taken{};
  for (int step = 0; step < num_steps; ++step) {
    const RoundWay way = ways.Next();
    const auto index = static_cast<size_t>(way);
    ++taken[index];
    ways.Observe(way, pace * (gains[index] + noise(random)), pace);
  }
  return taken;
}

constexpr RoundWays::Gains kAlike = {1, 1, 1};

TEST(RoundWaysTest, TakesTheOneThatGainsMost) {
  for (size_t best = 0; best < kNumRoundWays; ++best) {
    RoundWays ways(kAlike, 32);
    RoundWays::Gains gains = {0.9, 0.9, 0.9};
    gains[best] = 1.05;
    TakeSteps(ways, gains, 400, 0.1);
    const auto taken = TakeSteps(ways, gains, 4000, 0.1);
    EXPECT_GT(taken[best], 3800) << best;
    EXPECT_NEAR(ways.gain(static_cast<RoundWay>(best)), 1.05, 0.02);
  }
}

// One sequence gains one token or six: it takes many steps to tell, and the prior serves until
// then.
TEST(RoundWaysTest, NoiseOfOneSequenceDoesNotMislead) {
  RoundWays right({0.96, 1, 1.03}, 1), wrong({1.03, 1, 0.96}, 1);
  const RoundWays::Gains gains = {0.95, 1, 1.1};
  EXPECT_GT(TakeSteps(right, gains, 2000, 0.6)[2], 1700);
  TakeSteps(wrong, gains, 4000, 0.6);
  EXPECT_GT(TakeSteps(wrong, gains, 4000, 0.6)[2], 3000);
}

TEST(RoundWaysTest, AWayThatIsNotThereIsNeverTaken) {
  RoundWays ways({1, 1, 0}, 4);
  EXPECT_EQ(TakeSteps(ways, {0.9, 0.8, 5}, 20'000, 0.1)[2], 0);
}

// All of its first rounds were bad, with no spread.
TEST(RoundWaysTest, ABadBeginningIsForgiven) {
  RoundWays ways({1, 0.9, 0}, 128);
  int step = 0;
  const auto run = [&](int num_steps) {
    int taken = 0;
    for (int end = step + num_steps; step < end; ++step) {
      const RoundWay way = ways.Next();
      taken += way == RoundWay::kPlanned;
      ways.Observe(way, way == RoundWay::kMargins ? 0.95 : step < 40 ? 0.8 : 1, 1);
    }
    return taken;
  };
  EXPECT_LT(run(100), 60);
  run(500);
  EXPECT_GT(run(1000), 950);
}

TEST(RoundWaysTest, WhatBecomesBetterIsFound) {
  RoundWays ways({1, 0.95, 0}, 64);
  TakeSteps(ways, {1, 0.8, 0}, 6000, 0.05);
  TakeSteps(ways, {1, 1.2, 0}, 12'000, 0.05);
  EXPECT_GT(TakeSteps(ways, {1, 1.2, 0}, 1000, 0.05)[1], 900);
}

// Ten times as many tokens a step for a while: an easy text, met in one way only.
TEST(RoundWaysTest, AnEasyTextFavoursNone) {
  RoundWays ways({1, 1, 0}, 16);
  const RoundWays::Gains gains = {1, 1.1, 0};
  TakeSteps(ways, gains, 1000, 0.1);
  const double before = ways.gain(RoundWay::kMargins);
  TakeSteps(ways, gains, 1000, 0.1, 10);
  EXPECT_NEAR(ways.gain(RoundWay::kMargins), before, 0.02);
  EXPECT_GT(TakeSteps(ways, gains, 1000, 0.1)[1], 900);
}

}  // namespace
}  // namespace godwit
