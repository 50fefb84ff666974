// Speculation without a seed leaves the distribution of the target alone, through the whole engine:
// three-token texts of a toy pair, drafted for by every policy in one batch, against their exact
// probabilities. And the test can see: mistakes that implementations have made are planted below
// the engine, and found.

#include <algorithm>
#include <string>
#include <vector>

#include "engine/draft_policy.h"
#include "gtest/gtest.h"
#include "tests/chi_square.h"
#include "tests/engine/toy_pair.h"
#include "tests/engine/toy_texts.h"

namespace godwit {
namespace {

// Texts that follow the target are below this once in a million runs, those of any of the mistakes
// are below 1e-25.
constexpr double kAlpha = 1e-6;
constexpr int kMostDrafts = 3;

using Policies = std::vector<DraftPolicy>;

// Runs of as many texts by each of some policies.
class Runs {
 public:
  Runs(const ToyPairOptions& options, const Policies& policies)
      : policies_(policies),
        pair_(options),
        texts_(pair_.engine(), ToyRequest()),
        totals_(policies.size()) {}

  // Of the texts of so many runs, each with a seed of its own.
  double PValue(uint64_t first_seed, uint64_t num_runs) {
    for (uint64_t run = 0; run < num_runs; ++run) Run(first_seed + run);
    return texts_.PValue();
  }

  // So that a p-value says something, each policy has drafts that stand and drafts that do not.
  void ExpectMixedDrafts() const {
    for (size_t policy = 0; policy < policies_.size(); ++policy) {
      SCOPED_TRACE(std::string(DraftPolicyName(policies_[policy])));
      const Totals& totals = totals_[policy];
      EXPECT_GT(totals.accepted, totals.drafts / 4);
      EXPECT_LT(totals.accepted, totals.drafts * 3 / 4);
      EXPECT_EQ(totals.dropped > 0, policies_[policy] == DraftPolicy::kThroughput);
    }
  }

 private:
  struct Totals {
    int64_t drafts = 0, accepted = 0, dropped = 0;
  };

  // A request for each policy and number of drafts, with many outputs.
  void Run(uint64_t seed) {
    std::vector<DriverRequest> requests(policies_.size() * kMostDrafts, ToyRequest());
    const auto num_outputs = static_cast<int>(ToyPair::kMaxSequences / std::ssize(requests));
    for (size_t index = 0; index < requests.size(); ++index) {
      requests[index].seed = seed;
      requests[index].output_index = static_cast<int32_t>(index) * num_outputs;
      requests[index].num_outputs = num_outputs;
      requests[index].draft_policy = policies_[index / kMostDrafts];
      requests[index].draft_tokens = {1 + static_cast<int>(index % kMostDrafts)};
    }
    const std::vector<DriverOutput> outputs = Drive(pair_.engine(), 1, requests);
    for (size_t index = 0; index < outputs.size(); ++index) {
      texts_.Count(outputs[index].ids());
      Totals& totals = totals_[index * policies_.size() / outputs.size()];
      totals.drafts += outputs[index].num_drafts;
      totals.accepted += outputs[index].num_accepted;
      totals.dropped += outputs[index].num_dropped;
    }
  }

  const Policies policies_;
  ToyPair pair_;
  ToyTexts texts_;
  std::vector<Totals> totals_;  // by policy
};

class LosslessEngineTest : public testing::TestWithParam<TinyFamily> {
 protected:
  Runs AllPolicies(Mistake mistake) const {
    return {{.target = GetParam(), .with_head = true, .mistake = mistake},
            {DraftPolicy::kFixed, DraftPolicy::kMargin, DraftPolicy::kThroughput,
             DraftPolicy::kSpecDecPP}};
  }
  // What a policy sees is the margin, where there is no head; beside rows that need it throughput
  // looks at it too.
  Runs ThroughputByMargins(bool shows_draws) const {
    return {{.target = GetParam(), .shows_draws = shows_draws},
            {DraftPolicy::kFixed, DraftPolicy::kMargin, DraftPolicy::kThroughput}};
  }
};

// Each of the texts of 6 runs. Reached: 0.065 and 0.17; 0.23 and 0.68 over 1000 seeds.
TEST_P(LosslessEngineTest, PValuesAreUniformOverSeeds) {
  Runs runs = AllPolicies(Mistake::kNone);
  std::vector<double> p_values;
  for (uint64_t seed = 0; seed < 200; ++seed) p_values.push_back(runs.PValue(6 * seed, 6));
  EXPECT_GT(UniformPValue(p_values), 1e-3);
  runs.ExpectMixedDrafts();
}

TEST_P(LosslessEngineTest, PlantedMistakesAreFound) {
  constexpr uint64_t kRuns = 100;
  EXPECT_GT(AllPolicies(Mistake::kNone).PValue(1, kRuns), kAlpha);
  for (const Mistake mistake : kPlantedMistakes) {
    EXPECT_LT(AllPolicies(mistake).PValue(1, kRuns), kAlpha) << static_cast<int>(mistake);
  }
}

// A draft may be dropped for the distribution that it was drawn from, not for what was drawn.
// Either way about two in three of those that throughput chooses are dropped.
TEST_P(LosslessEngineTest, APolicyThatSeesWhatWasDrawnIsFound) {
  constexpr uint64_t kRuns = 500;
  Runs right = ThroughputByMargins(false);
  EXPECT_GT(right.PValue(1, kRuns), kAlpha);
  right.ExpectMixedDrafts();
  EXPECT_LT(ThroughputByMargins(true).PValue(1, kRuns), kAlpha);
}

// Alone it also plans rounds before they begin, by what became of earlier ones.
TEST_P(LosslessEngineTest, ThroughputAloneIsLossless) {
  Runs runs({.target = GetParam(), .with_head = true},
            {DraftPolicy::kFixed, DraftPolicy::kThroughput});
  EXPECT_GT(runs.PValue(1, 500), kAlpha);
}

INSTANTIATE_TEST_SUITE_P(Targets, LosslessEngineTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                         [](const testing::TestParamInfo<TinyFamily>& info) {
                           return info.param == TinyFamily::kLlama ? "Llama" : "Transnormer";
                         });

}  // namespace
}  // namespace godwit
