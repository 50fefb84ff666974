// Speculation led by an acceptance head: where it stops, that it changes no token and no
// distribution, and what is recorded to train one.

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/acceptance_head.h"
#include "engine/offline.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/gpu.h"
#include "tests/engine/head_files.h"
#include "tests/engine/toy_texts.h"

namespace godwit {
namespace {

// That always says the logit `first` + place * `slope`.
HeadFiles ScriptedHead(HeadLabel label, int64_t hidden, float first, float slope) {
  HeadFiles files;
  const auto zeros = [](int64_t count) {
    return std::vector<float>(static_cast<size_t>(count), 0.0f);
  };
  if (label == HeadLabel::kPost) {
    files.json = HeadConfig("specdecpp", "post", hidden, ", \"num_layers\": 1");
    files.Add("model.0.linear.weight", {hidden, hidden}, zeros(hidden * hidden));
    files.Add("model.0.linear.bias", {hidden}, zeros(hidden));
    files.Add("model.1.weight", {2, hidden}, zeros(2 * hidden));
    files.Add("model.1.bias", {2}, {0, first});
  } else {
    files.json = HeadConfig("linear", "pre", hidden);
    files.Add("readout.weight", {1, hidden}, zeros(hidden));
    files.Add("readout.features", {1, kNumHeadFeatures}, {0, 0, 0, 0, slope});
    files.Add("readout.bias", {1}, {first});
  }
  return files;
}

// --- Where it stops

struct Round {
  int num_drafts = 0;
  std::optional<DraftStop> stop;
  std::vector<float> predicted;
};

// Of a greedy request that accepts all. No estimate chose the length of the first, and what it says
// of its drafts is the head's own word: nothing was observed before.
std::array<Round, 2> RunTwoRounds(const TinyModel& model, DraftPolicy policy, float threshold) {
  const auto engine = MakeEngine(model, {.draft_folder = model.folder(), .dtype = DType::kF32});
  CacheLease lease = *engine->caches().Reserve(100);
  const SamplingParams sampling = {.temperature = 0};
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  const std::vector<int32_t> prompt = {5, 6, 7, 8};
  BatchRow row = {.token_ids = prompt,
                  .prompt_length = 4,
                  .lease = &lease,
                  .outputs = std::span(&output, 1),
                  .max_draft_tokens = kMaxDraftTokens,
                  .draft_policy = policy,
                  .draft_threshold = threshold};
  std::array<Round, 2> rounds;
  for (int step = 0; step < 3; ++step) {
    const auto collected = engine->Collect(*engine->Submit(std::span(&row, 1)));
    EXPECT_TRUE(collected.ok());
    const RowResult& of = collected->rows[0];
    if (step > 0)
      rounds[static_cast<size_t>(step - 1)] = {of.num_drafts, of.draft_stop, of.predicted};
    row.token_ids = {};
    row.confirmed_position = lease.position();
  }
  return rounds;
}

// The smallest k with 1 - P_1 .. P_(k - lag) > threshold.
int PublishedLength(const std::vector<double>& p, int lag, double threshold) {
  double survival = 1;
  for (int k = 1; k <= kMaxDraftTokens; ++k) {
    if (k > lag) survival *= p[static_cast<size_t>(k - 1 - lag)];
    if (1 - survival > threshold) return k;
  }
  return kMaxDraftTokens;
}

// What the first round observes moves every P up: the second's length follows from those told.
TEST(SpecDecPPTest, StopsWhereTheScriptedProbabilitiesSay) {
  for (const HeadLabel label : {HeadLabel::kPre, HeadLabel::kPost}) {
    const int lag = label == HeadLabel::kPost ? 1 : 0;
    const TinyModel model;
    const float slope = lag == 1 ? 0 : -0.25f;
    ASSERT_TRUE(
        ScriptedHead(label, model.options().d_model, 2.2f, slope).Write(model.folder()).ok());
    std::vector<double> p;
    for (int place = 0; place < kMaxDraftTokens; ++place) {
      p.push_back(1 / (1 + std::exp(-(2.2 + static_cast<double>(slope) * place))));
    }
    for (const float threshold : {0.0f, 0.06f, 0.3f, 0.5f, 0.85f, 1.0f}) {
      SCOPED_TRACE(testing::Message() << "lag " << lag << ", threshold " << threshold);
      const auto [first, round] = RunTwoRounds(model, DraftPolicy::kSpecDecPP, threshold);
      for (size_t place = 0; place + lag < first.predicted.size(); ++place) {
        EXPECT_NEAR(static_cast<double>(first.predicted[place]), p[place], 1e-5) << place;
      }
      std::vector<double> told = p;
      std::copy(round.predicted.begin(), round.predicted.end(), told.begin());
      const int expected = PublishedLength(told, lag, static_cast<double>(threshold));
      EXPECT_EQ(round.num_drafts, expected);
      EXPECT_GE(round.num_drafts, 1 + lag);
      EXPECT_EQ(round.stop,
                expected == kMaxDraftTokens ? DraftStop::kMaxDraftTokens : DraftStop::kPolicy);
      ASSERT_EQ(round.predicted.size(), static_cast<size_t>(expected));
      for (size_t place = 0; place + lag < round.predicted.size(); ++place) {
        EXPECT_GT(static_cast<double>(round.predicted[place]), p[place]) << place;
      }
    }
  }
}

// The first round of a sequence, collected after that of `other` is submitted, if there is one.
std::vector<float> PredictedOfRound(const TinyModel& model, std::vector<int32_t> prompt,
                                    const std::vector<int32_t>& other) {
  const auto engine = MakeEngine(
      model, {.draft_folder = model.folder(), .dtype = DType::kF32, .max_steps_in_flight = 2});
  const SamplingParams sampling = {.temperature = 0};
  std::vector<std::vector<int32_t>> prompts = {std::move(prompt)};
  if (!other.empty()) prompts.push_back(other);
  std::vector<CacheLease> leases;
  std::vector<RowOutput> outputs(prompts.size());
  std::vector<BatchRow> rows;
  for (size_t index = 0; index < prompts.size(); ++index) {
    leases.push_back(*engine->caches().Reserve(100));
  }
  for (size_t index = 0; index < prompts.size(); ++index) {
    outputs[index] = {.lease = &leases[index], .sampling = &sampling};
    rows.push_back({.token_ids = prompts[index],
                    .prompt_length = static_cast<int32_t>(prompts[index].size()),
                    .lease = &leases[index],
                    .outputs = std::span(&outputs[index], 1),
                    .max_draft_tokens = 4,
                    .draft_policy = DraftPolicy::kSpecDecPP,
                    .draft_threshold = 1});
    EXPECT_TRUE(engine->Collect(*engine->Submit(std::span(&rows[index], 1))).ok());
    rows[index].token_ids = {};
    rows[index].confirmed_position = leases[index].position();
  }
  std::vector<StepId> steps;
  for (BatchRow& row : rows) steps.push_back(*engine->Submit(std::span(&row, 1)));
  std::vector<float> predicted;
  for (const StepId step : steps) {
    const auto collected = engine->Collect(step);
    EXPECT_TRUE(collected.ok());
    if (step == steps[0]) predicted = collected->rows[0].predicted;
  }
  return predicted;
}

// The passes of the next step write where those of a step in flight wrote.
TEST(SpecDecPPTest, ARoundInFlightKeepsWhatItsPassesShowed) {
  const TinyModel model;
  ASSERT_TRUE(RandomHead(HeadKind::kLinear, HeadLabel::kPre, model.options().d_model)
                  .Write(model.folder())
                  .ok());
  const std::vector<int32_t> prompt = {5, 6, 7, 8}, other = {11, 3};
  const std::vector<float> alone = PredictedOfRound(model, prompt, {});
  EXPECT_EQ(alone.size(), 4u);
  EXPECT_NE(alone, PredictedOfRound(model, other, {}));
  EXPECT_EQ(alone, PredictedOfRound(model, prompt, other));
}

TEST(SpecDecPPTest, WithoutAHeadTheCardSaysSo) {
  const TinyModel model;
  const auto engine = MakeEngine(model, {.draft_folder = model.folder(), .dtype = DType::kF32});
  EXPECT_FALSE(engine->card().has_acceptance_head);
  ASSERT_TRUE(
      ScriptedHead(HeadLabel::kPre, model.options().d_model, 1, 0).Write(model.folder()).ok());
  EXPECT_TRUE(MakeEngine(model, {.draft_folder = model.folder(), .dtype = DType::kF32})
                  ->card()
                  .has_acceptance_head);
}

TEST(SpecDecPPTest, AHeadOfAnotherSizeIsRefusedWhereTheDraftIsLoaded) {
  const TinyModel model;
  ASSERT_TRUE(ScriptedHead(HeadLabel::kPre, 48, 1, 0).Write(model.folder()).ok());
  const auto engine =
      Engine::Create({.model_folder = model.folder(), .draft_folder = model.folder()},
                     *CreateCpuBackend({.num_threads = 1}));
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(engine.status().message()),
              testing::HasSubstr("hidden_size is 48, expected 64"));
}

// --- That it changes nothing

struct Case {
  const char* name;
  HeadKind kind;
  HeadLabel label;
};
constexpr Case kCases[] = {{"Mlp", HeadKind::kMlp, HeadLabel::kPre},
                           {"SpecDecPPBefore", HeadKind::kSpecDecPP, HeadLabel::kPre},
                           {"SpecDecPPAfter", HeadKind::kSpecDecPP, HeadLabel::kPost}};

class HeadSpeculationTest : public testing::TestWithParam<Case> {};

using MakeBackend = std::function<std::unique_ptr<Backend, BackendDeleter>()>;

void ExpectTextsEqualNone(const Case& head, const MakeBackend& make_backend) {
  const TinyModel target, draft({.seed = 2, .d_model = 32, .num_layers = 2, .num_heads = 2});
  ASSERT_TRUE(RandomHead(head.kind, head.label, 32).Write(draft.folder()).ok());
  for (const int steps_in_flight : {1, 2}) {
    std::vector<DriverRequest> requests;
    for (uint64_t index = 0; index < 14; ++index) {
      requests.push_back(
          {.prompt = RandomTokens(index, 5 + 11 * static_cast<int64_t>(index), 320),
           .sampling = {.temperature = index % 2 == 0 ? 0.0f : 0.9f, .num_logprobs = 3},
           .seed = index,
           .max_tokens = 60 + static_cast<int64_t>(index),
           .draft_tokens = {index % 3 == 0 ? 15 : 6},
           .draft_policy = index % 4 == 3 ? DraftPolicy::kThroughput : DraftPolicy::kSpecDecPP,
           .draft_threshold = 0.15f * static_cast<float>(index % 6)});
      if (index % 5 == 0) requests.back().swap_after = 20;
    }
    std::vector<DriverRequest> plain = requests;
    for (DriverRequest& request : plain) request.draft_tokens.clear();
    const auto make = [&](const std::string& draft_folder) {
      return MakeEngine(target,
                        {.draft_folder = draft_folder,
                         .dtype = DType::kF32,
                         .max_sequences = 16,
                         .max_tokens_per_step = 2048,
                         .swap_bytes = 64 << 20,
                         .max_steps_in_flight = steps_in_flight,
                         .deterministic = true},
                        make_backend());
    };
    const std::vector<DriverOutput> expected = Drive(*make(""), steps_in_flight, plain);
    const auto engine = make(draft.folder());
    for (int run = 0; run < 2; ++run) {
      const std::vector<DriverOutput> outputs = Drive(*engine, steps_in_flight, requests);
      ASSERT_EQ(outputs.size(), expected.size());
      for (size_t index = 0; index < outputs.size(); ++index) {
        EXPECT_TRUE(outputs[index].SameBits(expected[index])) << index;
        // What pays is a matter of what steps took.
        if (requests[index].draft_policy == DraftPolicy::kThroughput) continue;
        EXPECT_GT(outputs[index].num_drafts, 0) << index;
      }
    }
  }
}

TEST_P(HeadSpeculationTest, GreedyAndSeededTextsEqualNone) {
  ExpectTextsEqualNone(GetParam(), [] { return *CreateCpuBackend({.num_threads = 2}); });
}

TEST_P(HeadSpeculationTest, GreedyAndSeededTextsEqualNoneOnTheGpu) {
  if (const absl::Status gpu = OpenGpu().status(); !gpu.ok()) GTEST_SKIP() << gpu.message();
  ExpectTextsEqualNone(GetParam(), [] { return *OpenGpu(); });
}

// Three-token texts of a pair with 8 tokens, sampled without a seed, follow the target; heads stop
// the drafts for what they see of them.
TEST_P(HeadSpeculationTest, SampledTextsFollowTheTarget) {
  const TinyModelOptions small = {.vocab_size = 8, .num_layers = 2, .scale = 1.0};
  TinyModelOptions other = small;
  other.seed = 5;
  const TinyModel target(small), draft(other);
  ASSERT_TRUE(
      RandomHead(GetParam().kind, GetParam().label, other.d_model).Write(draft.folder()).ok());
  const auto engine = MakeEngine(
      target, {.draft_folder = draft.folder(), .dtype = DType::kF32, .max_sequences = 256});
  const DriverRequest request = {
      .prompt = {3, 4, 5, 6, 7}, .max_tokens = 5, .draft_tokens = {3}, .coupled = false};
  ToyTexts texts(*engine, request);
  int64_t num_drafts = 0, num_accepted = 0;
  for (uint64_t run = 0; run < 20; ++run) {
    std::vector<DriverRequest> requests(256, request);
    for (size_t index = 0; index < requests.size(); ++index) {
      requests[index].seed = run;
      requests[index].output_index = static_cast<int32_t>(index);
      requests[index].draft_policy =
          index % 4 == 0 ? DraftPolicy::kThroughput : DraftPolicy::kSpecDecPP;
      requests[index].draft_threshold = 0.2f * static_cast<float>(index % 4);
    }
    for (const DriverOutput& output : Drive(*engine, 1, requests)) {
      texts.Count(output.ids());
      num_drafts += output.num_drafts;
      num_accepted += output.num_accepted;
    }
  }
  EXPECT_GT(texts.PValue(), 1e-6);
  EXPECT_GT(num_accepted, num_drafts / 10) << "something is accepted";
  EXPECT_LT(num_accepted, num_drafts * 9 / 10) << "and something rejected";
}

INSTANTIATE_TEST_SUITE_P(Heads, HeadSpeculationTest, testing::ValuesIn(kCases),
                         [](const testing::TestParamInfo<Case>& info) { return info.param.name; });

// --- What is recorded

std::vector<RecordedDraft> RecordTexts(const TinyModel& target, const TinyModel& draft,
                                       float temperature, int num_texts) {
  const auto engine = MakeEngine(target, {.draft_folder = draft.folder(),
                                          .dtype = DType::kF32,
                                          .max_sequences = 2,
                                          .records_rounds = true});
  std::vector<RecordedDraft> recorded;
  OfflineGenerateOptions options = {
      .max_tokens = 60, .ignore_eos = true, .max_draft_tokens = 6, .coupled = false};
  options.sampling.temperature = temperature;
  options.on_round = [&] {
    for (RecordedDraft draft_of_round : engine->recorded()) {
      double squares = 0;
      for (const float x : draft_of_round.hidden) squares += static_cast<double>(x * x);
      EXPECT_NEAR(squares / draft.options().d_model, 1, 1e-3) << "after the norm";
      draft_of_round.hidden = {};
      recorded.push_back(draft_of_round);
    }
  };
  for (int text = 0; text < num_texts; ++text) {
    options.seed = static_cast<uint64_t>(text);
    EXPECT_TRUE(GenerateOffline(*engine, RandomTokens(options.seed, 9, 320), options).ok());
  }
  return recorded;
}

TEST(RoundRecorderTest, AModelByItselfIsAlwaysAccepted) {
  const TinyModel model;
  const std::vector<RecordedDraft> recorded = RecordTexts(model, model, 1, 2);
  EXPECT_GT(recorded.size(), 80u);
  for (const RecordedDraft& draft : recorded) {
    EXPECT_NEAR(draft.before_draw, 1, 1e-4f);
    EXPECT_NEAR(draft.after_draw, 1, 1e-3f);
    EXPECT_EQ(draft.features[4], static_cast<float>(draft.place));
    EXPECT_EQ(draft.features[3], 1.0f);
  }
}

// What is said of a draft before and after it is drawn is how often it is accepted.
TEST(RoundRecorderTest, LabelsAreHowOftenDraftsAreAccepted) {
  const TinyModel target({.scale = 0.8}), draft({.seed = 2, .scale = 0.8});
  const std::vector<RecordedDraft> recorded = RecordTexts(target, draft, 0.9f, 60);
  double judged = 0, accepted = 0, before = 0, after = 0, variance = 0;
  for (const RecordedDraft& of : recorded) {
    EXPECT_TRUE(!of.accepted || of.alive);
    EXPECT_TRUE(of.alive || of.place > 0);
    if (!of.alive) continue;
    judged += 1;
    accepted += of.accepted ? 1 : 0;
    before += static_cast<double>(of.before_draw);
    after += static_cast<double>(of.after_draw);
    variance += static_cast<double>(of.before_draw * (1 - of.before_draw));
  }
  EXPECT_GT(judged, 1000);
  EXPECT_GT(accepted, judged / 20);
  EXPECT_NEAR(accepted, before, 5 * std::sqrt(variance));
  EXPECT_NEAR(accepted, after, 5 * std::sqrt(variance));
}

TEST(RoundRecorderTest, AGreedyDraftIsRightOrWrong) {
  const TinyModel target, draft({.seed = 2});
  int judged = 0;
  for (const RecordedDraft& of : RecordTexts(target, draft, 0, 4)) {
    EXPECT_EQ(of.before_draw, of.after_draw);
    if (!of.alive) continue;
    ++judged;
    EXPECT_EQ(of.after_draw, of.accepted ? 1.0f : 0.0f);
  }
  EXPECT_GT(judged, 100);
}

}  // namespace
}  // namespace godwit
