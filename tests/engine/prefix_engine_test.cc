// A prompt that starts from a kept state gives the bits of one that is computed whole: tokens,
// log-probabilities and the likeliest tokens of each place, with scheduler and engine as they are
// in the server (docs/architecture.md section 3.2).

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "engine/rope_table.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "scheduler/scheduler.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/gpu.h"

namespace godwit {
namespace {

struct Answer {
  std::vector<std::vector<SampledToken>> outputs;
  int64_t num_cached = 0, num_accepted = 0;
  absl::Status status;
};

bool SameBits(const std::vector<SampledToken>& a, const std::vector<SampledToken>& b) {
  const auto same = [](float x, float y) { return std::memcmp(&x, &y, sizeof(x)) == 0; };
  return std::equal(
      a.begin(), a.end(), b.begin(), b.end(), [&](const SampledToken& x, const SampledToken& y) {
        return x.token_id == y.token_id && same(x.logprob, y.logprob) &&
               std::equal(x.top.begin(), x.top.end(), y.top.begin(), y.top.end(),
                          [&](const TopLogprob& p, const TopLogprob& q) {
                            return p.token_id == q.token_id && same(p.logprob, q.logprob);
                          });
      });
}

// An engine with a scheduler in front, stepped by the test.
class Served {
 public:
  Served(std::unique_ptr<Engine> engine, int64_t max_tokens_per_step, int steps_in_flight)
      : engine_(std::move(engine)),
        steps_in_flight_(steps_in_flight),
        scheduler_({.max_tokens_per_step = max_tokens_per_step,
                    .max_steps_in_flight = steps_in_flight,
                    .context_length = 4096},
                   engine_->caches()) {}

  std::vector<Answer> Run(std::vector<GenerateRequest> requests) {
    std::vector<std::shared_ptr<TokenStream>> streams;
    for (GenerateRequest& request : requests) {
      streams.push_back(request.stream = std::make_shared<TokenStream>([] {}));
      EXPECT_TRUE(scheduler_.Add(std::move(request), 0).ok());
    }
    while (!scheduler_.idle()) Step();
    std::vector<Answer> answers;
    for (const auto& stream : streams) answers.push_back(Read(*stream));
    return answers;
  }
  Answer Run(const GenerateRequest& request) {
    return std::move(Run(std::vector<GenerateRequest>{request}).front());
  }
  PrefixCacheStats stats() const { return scheduler_.stats().prefix_cache; }
  Engine& engine() { return *engine_; }

 private:
  void Step() {
    while (std::ssize(in_flight_) < steps_in_flight_) {
      StepPlan plan = scheduler_.Plan(0);
      if (!plan.copies.empty()) {
        const absl::Status copied = engine_->Copy(plan.copies);
        ASSERT_TRUE(copied.ok()) << copied;
        plan.copies.clear();
      }
      if (plan.rows.empty()) break;
      const auto id = engine_->Submit(plan.rows);
      ASSERT_TRUE(id.ok()) << id.status();
      in_flight_.emplace_back(std::move(plan), *id);
    }
    if (in_flight_.empty()) return;
    auto [plan, id] = std::move(in_flight_.front());
    in_flight_.pop_front();
    auto result = engine_->Collect(id);
    ASSERT_TRUE(result.ok()) << result.status();
    scheduler_.Apply(std::move(plan), *std::move(result), 0);
  }

  static Answer Read(TokenStream& stream) {
    Answer answer;
    for (TokenEvent& event : stream.Drain()) {
      const auto output = static_cast<size_t>(event.output_index);
      if (answer.outputs.size() <= output) answer.outputs.resize(output + 1);
      std::vector<SampledToken>& tokens = answer.outputs[output];
      if (event.kind == TokenEvent::Kind::kPrompt) answer.num_cached = event.num_cached_tokens;
      if (event.kind == TokenEvent::Kind::kTokens) {
        tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
      }
      if (event.kind == TokenEvent::Kind::kDone) {
        answer.status = event.status;
        answer.num_accepted = event.speculation.num_accepted;
      }
    }
    return answer;
  }

  std::unique_ptr<Engine> engine_;
  const int steps_in_flight_;
  Scheduler scheduler_;
  std::deque<std::pair<StepPlan, StepId>> in_flight_;
};

using Case = std::tuple<TinyFamily, DType, std::string>;

class PrefixEngineTest : public testing::TestWithParam<Case> {
 protected:
  PrefixEngineTest() : model_({.family = std::get<0>(GetParam())}) {}

  void SetUp() override {
    if (!OnGpu()) return;
    if (const absl::Status gpu = OpenGpu().status(); !gpu.ok()) GTEST_SKIP() << gpu.message();
  }
  static bool OnGpu() { return std::get<2>(GetParam()) == "cuda"; }

  Served Make(int64_t max_tokens_per_step = 2048, const std::string& draft_folder = "",
              int steps_in_flight = 1) const {
    return Served(MakeEngine(model_,
                             {.draft_folder = draft_folder,
                              .dtype = std::get<1>(GetParam()),
                              .max_sequences = 8,
                              .max_tokens_per_step = max_tokens_per_step,
                              .kv_bytes = 16 << 20,
                              .swap_bytes = 64 << 20,
                              .prefix_cache_bytes = 16 << 20,
                              .max_steps_in_flight = steps_in_flight,
                              .deterministic = true,
                              .warm_up = false},
                             OnGpu() ? std::move(*OpenGpu())
                                     : std::move(*CreateCpuBackend({.num_threads = 2}))),
                  max_tokens_per_step, steps_in_flight);
  }

  // `shared` tokens of one text, then its own. Greedy when the seed is even; odd ones are sampled,
  // some with penalties, which read the counts of the whole prompt.
  GenerateRequest Request(int64_t shared, int64_t own, uint64_t seed) const {
    GenerateRequest request{.seed = seed, .max_tokens = 24};
    request.token_ids = RandomTokens(4711, shared, model_.options().vocab_size);
    const std::vector<int32_t> rest = RandomTokens(100 + seed, own, model_.options().vocab_size);
    request.token_ids.insert(request.token_ids.end(), rest.begin(), rest.end());
    request.sampling.num_logprobs = kMaxTopLogprobs;
    request.sampling.temperature = seed % 2 == 0 ? 0.0f : 0.8f;
    if (seed % 4 == 3) {
      request.sampling.repetition_penalty = 1.2f;
      request.sampling.frequency_penalty = 0.4f;
    }
    return request;
  }

  // The same, for the cache.
  static GenerateRequest Shared(GenerateRequest request, const std::string& domain = "t") {
    request.prefix_domain = domain;
    return request;
  }

  static void ExpectSame(const Answer& hit, const Answer& miss) {
    EXPECT_TRUE(hit.status.ok()) << hit.status;
    ASSERT_EQ(hit.outputs.size(), miss.outputs.size());
    for (size_t output = 0; output < hit.outputs.size(); ++output) {
      EXPECT_EQ(hit.outputs[output].size(), 24u);
      EXPECT_TRUE(SameBits(hit.outputs[output], miss.outputs[output])) << "output " << output;
    }
  }

  TinyModel model_;
};

TEST_P(PrefixEngineTest, AHitHasTheBitsOfAMissAtEveryLength) {
  Served served = Make();
  uint64_t seed = 0;
  for (const int64_t length : {63, 64, 65, 127, 128, 129, 511, 512, 513, 1000}) {
    SCOPED_TRACE(length);
    const GenerateRequest request = Request(0, length, ++seed);
    const Answer miss = served.Run(request);
    const Answer first = served.Run(Shared(request));
    EXPECT_EQ(miss.num_cached + first.num_cached, 0);
    ExpectSame(first, miss);  // the cut at its last block changes nothing
    const Answer hit = served.Run(Shared(request));
    EXPECT_EQ(hit.num_cached, (length - 1) / 64 * 64);
    ExpectSame(hit, miss);
  }
}

TEST_P(PrefixEngineTest, ShortSharedBeginningsHitUnderAnyContinuation) {
  Served served = Make();
  for (const int64_t shared : {64, 100, 256}) {
    SCOPED_TRACE(shared);
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      const GenerateRequest request = Request(shared, static_cast<int64_t>(seed * 23), seed);
      const Answer miss = served.Run(request);
      const Answer answer = served.Run(Shared(request, "shared " + std::to_string(shared)));
      EXPECT_GE(answer.num_cached, seed < 3 ? 0 : shared / 64 * 64);
      ExpectSame(answer, miss);
    }
  }
}

// In small chunks, among neighbours, with one or two steps in flight, forked into several outputs.
TEST_P(PrefixEngineTest, CutsNeighboursAndForksChangeNothing) {
  for (const int steps_in_flight : {1, 2}) {
    Served served = Make(192, "", steps_in_flight);
    std::vector<GenerateRequest> requests;
    for (uint64_t seed = 1; seed <= 12; ++seed) {
      requests.push_back(Request(200, 1 + static_cast<int64_t>(seed * 37 % 300), seed));
      requests.back().num_outputs = 1 + static_cast<int32_t>(seed % 3);
      requests.back().priority = static_cast<int32_t>(seed % 4);
    }
    std::vector<Answer> alone;
    for (const GenerateRequest& request : requests) alone.push_back(served.Run(request));
    for (GenerateRequest& request : requests) request = Shared(request);
    int64_t num_cached = 0;
    for (int round = 0; round < 2; ++round) {
      const std::vector<Answer> together = served.Run(requests);
      for (size_t index = 0; index < requests.size(); ++index) {
        SCOPED_TRACE(index);
        num_cached += together[index].num_cached;
        ExpectSame(together[index], alone[index]);
      }
    }
    EXPECT_GT(num_cached, 12 * 192);
  }
}

// The draft model starts where the model does, and proposes what it would have.
TEST_P(PrefixEngineTest, WithSpeculation) {
  const TinyModel draft({.family = TinyFamily::kTransnormer});
  Served served = Make(2048, draft.folder());
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(seed);
    GenerateRequest request = Request(150, static_cast<int64_t>(seed * 31), seed);
    const Answer plain = served.Run(request);
    request.max_draft_tokens = 5;
    const Answer miss = served.Run(request);
    served.Run(Shared(request));
    const Answer hit = served.Run(Shared(request));
    EXPECT_GE(hit.num_cached, 128);
    ExpectSame(miss, plain);
    ExpectSame(hit, plain);
    EXPECT_EQ(hit.num_accepted, miss.num_accepted);
    request.max_draft_tokens = 0;
    ExpectSame(served.Run(Shared(request)), plain);
  }
}

// A short and a long request rotate with different tables: neither starts from the other's state,
// in whatever order they come.
TEST_P(PrefixEngineTest, RopeRegimesShareNothing) {
  if (std::get<0>(GetParam()) != TinyFamily::kLlama) GTEST_SKIP() << "rotates in no regime";
  const TinyModel model({.family = TinyFamily::kLlama, .context_length = 256});
  for (const bool long_first : {true, false}) {
    Served served(MakeEngine(model,
                             {.rope_override = R"({"type":"dynamic","factor":4})",
                              .dtype = std::get<1>(GetParam()),
                              .max_sequences = 4,
                              .max_tokens_per_step = 2048,
                              .kv_bytes = 16 << 20,
                              .prefix_cache_bytes = 16 << 20,
                              .context_length = 1024,
                              .deterministic = true,
                              .warm_up = false},
                             OnGpu() ? std::move(*OpenGpu())
                                     : std::move(*CreateCpuBackend({.num_threads = 2}))),
                  2048, 1);
    std::vector<GenerateRequest> requests;
    for (const int64_t own : {20, 200, 30, 210, 20, 200}) {
      GenerateRequest request = Request(192, own, static_cast<uint64_t>(own));
      const auto rope =
          RopeOfRequest(served.engine().card().config, nullptr, 192 + own + request.max_tokens - 1);
      ASSERT_TRUE(rope.ok()) << rope.status();
      request.rope = *rope;
      requests.push_back(std::move(request));
    }
    if (long_first) std::reverse(requests.begin(), requests.end());
    int64_t num_cached = 0;
    for (const GenerateRequest& request : requests) {
      const Answer miss = served.Run(request);
      const std::string regime = request.rope == nullptr
                                     ? served.engine().card().rope_regime.ToString()
                                     : request.rope->regime.ToString();
      const Answer answer = served.Run(Shared(request, regime));
      num_cached += answer.num_cached;
      ExpectSame(answer, miss);
    }
    EXPECT_GT(num_cached, 0);
    // The planted mistake: one domain for all.
    int num_differing = 0;
    for (const GenerateRequest& request : requests) {
      const Answer miss = served.Run(request);
      const Answer answer = served.Run(Shared(request, "all"));
      num_differing += !SameBits(answer.outputs[0], miss.outputs[0]);
    }
    EXPECT_GT(num_differing, 0);
  }
}

std::string Name(const testing::TestParamInfo<Case>& info) {
  const auto& [family, dtype, backend] = info.param;
  return std::string(family == TinyFamily::kLlama ? "Llama" : "Transnormer") +
         (dtype == DType::kF32 ? "F32" : "BF16") + backend;
}
INSTANTIATE_TEST_SUITE_P(
    Cpu, PrefixEngineTest,
    testing::Combine(testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                     testing::Values(DType::kF32, DType::kBF16), testing::Values("cpu")),
    Name);
INSTANTIATE_TEST_SUITE_P(Gpu, PrefixEngineTest,
                         testing::Combine(testing::Values(TinyFamily::kTransnormer,
                                                          TinyFamily::kLlama),
                                          testing::Values(DType::kBF16), testing::Values("cuda")),
                         Name);

}  // namespace
}  // namespace godwit
