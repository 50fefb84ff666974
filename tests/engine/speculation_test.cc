// Speculation changes no token: with any draft model, any number of drafts and any batch, the
// tokens, log-probabilities and the state afterwards have the bits of decoding one by one
// (docs/architecture.md section 3.2).

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "engine/speculative_decoder.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/toy_texts.h"

namespace godwit {
namespace {

// What the draft model is: the target itself, which is nearly always right, or another.
enum class DraftKind { kSame, kOther, kOtherFamily };

using Case = std::tuple<TinyFamily, DType, DraftKind, std::string>;  // on which device

TinyFamily OtherFamily(TinyFamily family) {
  return family == TinyFamily::kLlama ? TinyFamily::kTransnormer : TinyFamily::kLlama;
}

TinyModelOptions DraftOptions(TinyFamily family, DraftKind kind) {
  if (kind == DraftKind::kSame) return {.family = family};
  // As little alike as two models can be: hardly a draft is accepted.
  return {.family = kind == DraftKind::kOther ? family : OtherFamily(family),
          .seed = 99,
          .d_model = 32,
          .num_layers = 2,
          .num_heads = 2,
          .num_kv_heads = 1,
          .d_ff = 48,
          .scale = 0.5};
}

class SpeculationTest : public testing::TestWithParam<Case> {
 protected:
  SpeculationTest()
      : target_({.family = std::get<0>(GetParam())}),
        draft_(DraftOptions(std::get<0>(GetParam()), std::get<2>(GetParam()))) {}

  void SetUp() override {
    const absl::Status device = OpenDevice(std::get<3>(GetParam())).status();
    if (!device.ok()) GTEST_SKIP() << device.message();
  }

  std::unique_ptr<Engine> Make(bool with_draft, int max_steps_in_flight = 1) const {
    return MakeDeterministicEngine(target_,
                                   {.draft_folder = with_draft ? draft_.folder() : "",
                                    .dtype = std::get<1>(GetParam()),
                                    .max_sequences = 24,
                                    .max_tokens_per_step = 1024,
                                    .kv_bytes = 32 << 20,
                                    .swap_bytes = 64 << 20,
                                    .max_steps_in_flight = max_steps_in_flight},
                                   std::get<3>(GetParam()));
  }

  // Greedy when `seed` is even, else sampled; with penalties, a bias and a ban for some.
  DriverRequest Request(uint64_t seed, int64_t prompt_length, int64_t max_tokens) const {
    DriverRequest request = {
        .prompt = RandomTokens(seed, prompt_length, target_.options().vocab_size),
        .seed = seed,
        .max_tokens = max_tokens};
    request.sampling.num_logprobs = kMaxTopLogprobs;
    request.sampling.temperature = seed % 2 == 0 ? 0.0f : 0.8f;
    if (seed % 4 == 3) request.sampling.top_p = 0.9f;
    if (seed % 3 == 0) return request;
    request.sampling.repetition_penalty = 1.1f;
    request.sampling.frequency_penalty = 0.5f;
    request.sampling.logit_bias = {{5, 2.0f}, {17, -3.0f}};
    request.sampling.min_tokens = max_tokens / 2;
    request.sampling.end_token_ids = {2, 17};
    return request;
  }

  std::vector<DriverOutput> Plain(std::vector<DriverRequest> requests) const {
    for (DriverRequest& request : requests) request.draft_tokens.clear();
    return Drive(*Make(false), 1, requests);
  }

  TinyModel target_, draft_;
};

void ExpectSame(const std::vector<DriverOutput>& actual,
                const std::vector<DriverOutput>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t index = 0; index < actual.size(); ++index) {
    EXPECT_EQ(actual[index].ids(), expected[index].ids()) << index;
    EXPECT_TRUE(actual[index].SameBits(expected[index])) << index;
  }
}

int64_t TotalDrafts(const std::vector<DriverOutput>& outputs) {
  int64_t total = 0;
  for (const DriverOutput& output : outputs) total += output.num_drafts;
  return total;
}

TEST_P(SpeculationTest, EveryDraftLengthAloneEqualsNone) {
  const auto engine = Make(true);
  for (int drafts = 1; drafts <= kMaxDraftTokens; ++drafts) {
    SCOPED_TRACE(drafts);
    const auto seed = static_cast<uint64_t>(drafts);
    DriverRequest request = Request(20 + seed, 1 + 13 * drafts, 40 + drafts);
    const std::vector<DriverOutput> expected = Plain({request});
    request.draft_tokens = {drafts};
    const std::vector<DriverOutput> actual = Drive(*engine, 1, {request});
    ExpectSame(actual, expected);
    EXPECT_GE(actual[0].num_drafts, drafts);
    if (std::get<2>(GetParam()) != DraftKind::kSame) continue;
    // Every draft of a model by itself, but where its draft rows and its verified rows differ in a
    // bit.
    EXPECT_GE(actual[0].num_accepted, actual[0].num_drafts * 9 / 10);
  }
}

TEST_P(SpeculationTest, MixedBatchEqualsNone) {
  for (const int steps_in_flight : {1, 2}) {
    SCOPED_TRACE(steps_in_flight);
    const auto engine = Make(true, steps_in_flight);
    std::vector<DriverRequest> requests;
    for (uint64_t index = 0; index < 17; ++index) {
      requests.push_back(Request(100 + index, 1 + 29 * static_cast<int64_t>(index) % 190,
                                 20 + 2 * static_cast<int64_t>(index)));
      DriverRequest& request = requests.back();
      request.start_step = static_cast<int64_t>(index * 5 % 7);
      if (index % 3 == 0) request.cuts = {64};
      const int drafts = static_cast<int>(index) - 1;  // two without
      if (drafts > 0) request.draft_tokens = {drafts % kMaxDraftTokens + 1, 0, 3};
      request.draft_policy = static_cast<DraftPolicy>(index % 3);
      request.draft_threshold = 0.2f * static_cast<float>(index % 5);
    }
    const std::vector<DriverOutput> outputs = Drive(*engine, steps_in_flight, requests);
    ExpectSame(outputs, Plain(requests));
    EXPECT_GT(TotalDrafts(outputs), 100);
  }
}

// By now the estimates are trusted: rows stop where they please.
TEST_P(SpeculationTest, PoliciesThatHaveLearntEqualNone) {
  const auto engine = Make(true);
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 12; ++index) {
    requests.push_back(Request(600 + index, 20 + static_cast<int64_t>(index), 120));
    DriverRequest& request = requests.back();
    request.draft_tokens = {index % 2 == 0 ? 8 : 15};
    request.draft_policy = index < 6 ? DraftPolicy::kMargin : DraftPolicy::kThroughput;
    request.draft_threshold = 0.1f * static_cast<float>(index);
  }
  const std::vector<DriverOutput> expected = Plain(requests);
  ExpectSame(Drive(*engine, 1, requests), expected);
  ExpectSame(Drive(*engine, 1, requests), expected);
}

// One text cut after every number of tokens, so that every round is the last of some; by a draft
// that is hardly ever accepted, rounds that reject all are among them. What the state answers is
// that of decoding one by one.
TEST_P(SpeculationTest, StateAfterEveryRoundEqualsReplay) {
  const auto engine = Make(true);
  for (const DraftPolicy policy : {DraftPolicy::kFixed, DraftPolicy::kThroughput}) {
    std::vector<DriverRequest> requests;
    for (int64_t length = 2; length < 26; ++length) {
      requests.push_back(Request(702, 30, length));
      requests.back().sampling.end_token_ids.clear();
      requests.back().sampling.min_tokens = 0;
      requests.back().draft_tokens = {5};
      requests.back().draft_policy = policy;
    }
    ExpectSame(Drive(*engine, 1, requests), Plain(requests));
  }
}

// A pause leaves the draft behind, once too far to catch up.
TEST_P(SpeculationTest, PausesAndSwapsEqualNone) {
  const auto engine = Make(true);
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 6; ++index) {
    requests.push_back(Request(300 + index, 10 + 40 * static_cast<int64_t>(index), 100));
    DriverRequest& request = requests.back();
    request.swap_after = 1 + 17 * static_cast<int64_t>(index);
    request.swap_steps = 2 + static_cast<int64_t>(index);
    request.draft_tokens.assign(10 + 9 * index, 0);
    request.draft_tokens[0] = 7;
    request.draft_tokens[1] = 2;
  }
  requests.push_back(Request(310, 64, kMaxDraftLag + 120));
  requests.back().draft_tokens.assign(kMaxDraftLag + 60, 0);
  requests.back().draft_tokens[3] = 5;
  const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
  ExpectSame(outputs, Plain(requests));
  for (size_t index = 0; index < 6; ++index) EXPECT_GT(outputs[index].num_drafts, 7) << index;
}

TEST_P(SpeculationTest, ForksDraftOnTheirOwn) {
  const auto engine = Make(true);
  std::vector<DriverRequest> requests = {Request(11, 141, 40), Request(13, 70, 30)};
  requests[0].num_outputs = 4;
  requests[0].cuts = {64};
  requests[0].draft_tokens = {4};
  requests[1].draft_tokens = {15};
  ExpectSame(Drive(*engine, 1, requests), Plain(requests));
}

// Sampled without a seed: other tokens, but the state is that of reading them one by one.
TEST_P(SpeculationTest, StandardRuleLeavesTheStateOfItsTokens) {
  const auto engine = Make(true);
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 8; ++index) {
    requests.push_back(Request(501 + 2 * index, 5 + 30 * static_cast<int64_t>(index), 60));
    requests.back().coupled = false;
    requests.back().draft_tokens = {1 + static_cast<int>(index) * 2};
  }
  const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
  // Decoding is led along the same tokens by a bias that leaves no other.
  const auto reference = Make(false);
  for (size_t index = 0; index < requests.size(); ++index) {
    SCOPED_TRACE(index);
    const std::vector<int32_t> ids = outputs[index].ids();
    CacheLease lease = *reference->caches().Reserve(std::ssize(requests[index].prompt) + 64);
    std::vector<float> probe;
    SamplingParams forced = {.temperature = 0};
    const RowOutput output = {.lease = &lease, .sampling = &forced};
    BatchRow row = {.token_ids = requests[index].prompt,
                    .prompt_length = std::ssize(requests[index].prompt),
                    .lease = &lease,
                    .outputs = std::span(&output, 1)};
    for (const int32_t id : ids) {
      forced.logit_bias = {{id, 1e6f}};
      ASSERT_EQ(reference->Collect(*reference->Submit(std::span(&row, 1)))
                    ->rows[0]
                    .outputs[0][0]
                    .token_id,
                id);
      row.token_ids = {};
      row.confirmed_position = lease.position();
    }
    const std::vector<int32_t> tokens = {ids.back(), 7, 9};
    probe.resize(outputs[index].probe.size());
    row = {.token_ids = tokens,
           .first_position = lease.position(),
           .confirmed_position = lease.position(),
           .prompt_length = row.prompt_length,
           .lease = &lease,
           .logits = probe.data()};
    ASSERT_TRUE(reference->Collect(*reference->Submit(std::span(&row, 1))).ok());
    EXPECT_EQ(probe, outputs[index].probe);
  }
}

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  constexpr const char* kKinds[] = {"BySelf", "ByOther", "ByOtherFamily"};
  return std::string(std::get<0>(info.param) == TinyFamily::kTransnormer ? "Transnormer"
                                                                         : "Llama") +
         (std::get<1>(info.param) == DType::kF32 ? "F32" : "BF16") +
         kKinds[static_cast<int>(std::get<2>(info.param))] + std::get<3>(info.param);
}

INSTANTIATE_TEST_SUITE_P(
    Cpu, SpeculationTest,
    testing::Combine(testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                     testing::Values(DType::kF32, DType::kBF16),
                     testing::Values(DraftKind::kSame, DraftKind::kOther, DraftKind::kOtherFamily),
                     testing::Values("cpu")),
    CaseName);
INSTANTIATE_TEST_SUITE_P(
    Gpu, SpeculationTest,
    testing::Combine(testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                     testing::Values(DType::kBF16),
                     testing::Values(DraftKind::kSame, DraftKind::kOther), testing::Values("cuda")),
    CaseName);

// The whole engine, sampled without a seed: three-token texts of a model with 8 tokens against
// their probabilities from its own logits.
TEST(StandardRuleTest, TextsOfAnEngineFollowItsModel) {
  const TinyModelOptions small = {.vocab_size = 8, .num_layers = 2, .scale = 1.0};
  TinyModelOptions other = small;
  other.seed = 5;
  const TinyModel target(small), draft(other);
  const auto engine = MakeEngine(
      target, {.draft_folder = draft.folder(), .dtype = DType::kF32, .max_sequences = 256});
  DriverRequest request = {.prompt = {3, 4, 5, 6, 7},
                           .max_tokens = 5,
                           .draft_tokens = {3},
                           .draft_threshold = 0.4f,
                           .coupled = false};
  request.sampling.frequency_penalty = 0.4f;
  ToyTexts texts(*engine, request);
  int64_t num_drafts = 0, num_accepted = 0, num_dropped = 0;
  for (uint64_t run = 0; run < 60; ++run) {
    std::vector<DriverRequest> requests(256, request);
    for (size_t index = 0; index < requests.size(); ++index) {
      requests[index].seed = run;
      requests[index].output_index = static_cast<int32_t>(index);
      requests[index].draft_policy = static_cast<DraftPolicy>(index % 3);
    }
    for (const DriverOutput& output : Drive(*engine, 1, requests)) {
      texts.Count(output.ids());
      num_drafts += output.num_drafts;
      num_accepted += output.num_accepted;
      num_dropped += output.num_dropped;
    }
  }
  EXPECT_GT(num_dropped, 0) << "some are drawn and not verified";
  EXPECT_GT(texts.PValue(), 1e-6);
  EXPECT_GT(num_accepted, num_drafts / 10) << "something is accepted";
  EXPECT_LT(num_accepted, num_drafts * 9 / 10) << "and something rejected";
}

// A request may rotate its target otherwise; the draft rotates as its own model does.
TEST(DraftModelTest, RopeOfARequestIsTheTargetsAlone) {
  const TinyModel model({.family = TinyFamily::kLlama, .context_length = 2048});
  constexpr char kDefault[] = R"({"type":"default"})";
  constexpr char kLinear[] = R"({"type":"linear","factor":4})";
  const auto make = [&](bool with_draft) {
    return MakeEngine(model, {.rope_override = kLinear,
                              .draft_folder = with_draft ? model.folder() : "",
                              .dtype = DType::kF32,
                              .max_sequences = 8,
                              .max_tokens_per_step = 1024,
                              .kv_bytes = 32 << 20,
                              .swap_bytes = 16 << 20});
  };
  std::vector<DriverRequest> requests;
  for (const char* rope : {kDefault, "", kDefault,
                           R"({"type":"dynamic","factor":4,"original_max_position_embeddings":64})",
                           R"({"type":"yarn","factor":8,"original_max_position_embeddings":64})"}) {
    const auto index = static_cast<int64_t>(requests.size());
    requests.push_back({.prompt = RandomTokens(60 + static_cast<uint64_t>(index), 30 + 40 * index,
                                               model.options().vocab_size),
                        .sampling = {.temperature = 0, .num_logprobs = kMaxTopLogprobs},
                        .max_tokens = 60,
                        .rope = rope,
                        .draft_tokens = {5}});
  }
  requests[2].swap_after = 20;
  requests[3].num_outputs = 2;
  const std::vector<DriverOutput> outputs = Drive(*make(true), 1, requests);
  std::vector<DriverRequest> plain = requests;
  for (DriverRequest& request : plain) request.draft_tokens.clear();
  ExpectSame(outputs, Drive(*make(false), 1, plain));
  // Where target and draft are one function, hardly a draft is wrong.
  for (const size_t index : {0, 2}) {
    EXPECT_GE(outputs[index].num_accepted, outputs[index].num_drafts * 9 / 10) << index;
  }
}

TEST(DraftModelTest, AnotherVocabularyIsRefusedWithBoth) {
  const TinyModel target, draft({.vocab_size = 256});
  const auto engine =
      Engine::Create({.model_folder = target.folder(), .draft_folder = draft.folder()},
                     *CreateCpuBackend({.num_threads = 1}));
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(engine.status().message()),
              testing::HasSubstr("its vocabulary has 256 tokens, expected 320"));
}

}  // namespace
}  // namespace godwit
