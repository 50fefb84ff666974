// Rotations that depend on the request: what one sequence rotates with is decided by its own length
// and its own choice, and nothing in the batch changes a bit of it.

#include "engine/rope_store.h"

#include <memory>
#include <string>
#include <vector>

#include "engine/offline.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_driver.h"

namespace godwit {
namespace {

constexpr char kDynamic[] =
    R"({"type":"dynamic","factor":4,"original_max_position_embeddings":64})";
constexpr char kLongRope[] =
    R"({"type":"longrope","original_max_position_embeddings":64,"factor":4,
        "short_factor":[1,1,1,1,1,1,1,1],"long_factor":[1,1.5,2,3,4,4,4,4]})";
constexpr char kYarn[] = R"({"type":"yarn","factor":8,"original_max_position_embeddings":64})";

class RopeStoreTest : public testing::TestWithParam<const char*> {
 protected:
  RopeStoreTest() : model_({.family = TinyFamily::kLlama, .context_length = 40'000}) {}

  std::unique_ptr<Engine> Make(const std::string& rope, int max_steps_in_flight = 1) const {
    return MakeOf(model_, rope, max_steps_in_flight);
  }
  static std::unique_ptr<Engine> MakeOf(const TinyModel& model, const std::string& rope,
                                        int max_steps_in_flight = 1) {
    return MakeEngine(model, {.rope_override = rope,
                              .dtype = DType::kF32,
                              .max_sequences = 8,
                              .max_tokens_per_step = 2048,
                              .kv_bytes = 64 << 20,
                              .swap_bytes = 16 << 20,
                              .max_steps_in_flight = max_steps_in_flight});
  }

  DriverRequest Request(uint64_t seed, int64_t prompt_length, int64_t max_tokens) const {
    return {.prompt = RandomTokens(seed, prompt_length, model_.options().vocab_size),
            .sampling = {.temperature = 0, .num_logprobs = kMaxTopLogprobs},
            .seed = seed,
            .max_tokens = max_tokens};
  }

  DriverOutput Alone(const std::string& rope, const DriverRequest& request) const {
    const std::unique_ptr<Engine> engine = Make(rope);
    return Drive(*engine, 1, {request})[0];
  }

  TinyModel model_;
};

TEST_P(RopeStoreTest, NeighboursOfOtherLengthsChangeNothing) {
  const auto engine = Make(GetParam(), 2);
  std::vector<DriverRequest> requests = {Request(2, 30, 20), Request(4, 90, 30), Request(6, 45, 20),
                                         Request(8, 300, 10), Request(10, 40, 60)};
  requests[1].start_step = 3;
  requests[3].start_step = 5;
  requests[2].swap_after = 4;  // comes back to another slot
  requests[4].swap_after = 7;
  requests[0].num_outputs = 2;  // forks
  const std::vector<DriverOutput> outputs = Drive(*engine, 2, requests);
  ASSERT_EQ(outputs.size(), requests.size() + 1);
  for (size_t index = 0; index < requests.size(); ++index) {
    SCOPED_TRACE(index);
    DriverRequest alone = requests[index];
    alone.swap_after = -1;
    alone.num_outputs = 1;
    alone.start_step = 0;
    EXPECT_TRUE(outputs[index == 0 ? 0 : index + 1].SameBits(Alone(GetParam(), alone)));
  }
}

// A request that ends within the original length and one that goes one position beyond.
TEST_P(RopeStoreTest, TheLengthOfTheRequestDecidesFromItsFirstToken) {
  const DriverRequest fits = Request(12, 40, 25), beyond = Request(12, 40, 26);
  ASSERT_EQ(NumRotatedPositions(40, 25), 64);
  const DriverOutput short_output = Alone(GetParam(), fits);
  DriverRequest plain = fits;
  plain.rope = R"({"type":"default"})";
  DriverOutput plain_output = Alone(GetParam(), plain);
  if (std::string(GetParam()) == kDynamic) {
    EXPECT_TRUE(short_output.SameBits(plain_output)) << "untouched within the original length";
  }
  const DriverOutput long_output = Alone(GetParam(), beyond);
  EXPECT_NE(short_output.tokens[0].logprob, long_output.tokens[0].logprob);
}

// One library never reset the base after a long call.
TEST_P(RopeStoreTest, AShortRequestAfterALongOneIsAsInAFreshEngine) {
  const DriverRequest request = Request(12, 40, 20), beyond = Request(4, 200, 20);
  const auto engine = Make(GetParam());
  Drive(*engine, 1, {beyond});
  EXPECT_TRUE(Drive(*engine, 1, {request})[0].SameBits(Alone(GetParam(), request)));
  EXPECT_TRUE(Drive(*engine, 1, {beyond})[0].SameBits(Alone(GetParam(), beyond)));
}

// Tables by the longest row of a batch, or by any position beyond the limit, are what other servers
// have.
TEST_P(RopeStoreTest, A32kNeighbourChangesNothing) {
  const TinyModel model({.family = TinyFamily::kLlama,  // 2 s for the neighbour's prompt
                         .d_model = 32,
                         .num_layers = 1,
                         .num_heads = 2,
                         .num_kv_heads = 1,
                         .d_ff = 32,
                         .context_length = 40'000});
  const std::vector<DriverRequest> requests = {Request(2, 50, 40), Request(4, 100, 20)};
  DriverRequest neighbour = Request(1, 32'768, 2);
  neighbour.cuts.assign(32, 1024);
  const auto together = MakeOf(model, GetParam()), apart = MakeOf(model, GetParam());
  const std::vector<DriverOutput> outputs =
      Drive(*together, 1, {requests[0], neighbour, requests[1]});
  EXPECT_TRUE(outputs[0].SameBits(Drive(*apart, 1, {requests[0]})[0]));
  EXPECT_TRUE(outputs[2].SameBits(Drive(*apart, 1, {requests[1]})[0]));
}

INSTANTIATE_TEST_SUITE_P(ByLength, RopeStoreTest, testing::Values(kDynamic, kLongRope));

using RopeChoiceTest = RopeStoreTest;

// A LongRoPE request whose text crosses the original length in the middle of generation has the
// long table on both sides of it, the keys of its prompt too.
TEST_F(RopeChoiceTest, CrossingTheOriginalLengthChangesNoKey) {
  const std::string always_long =
      R"({"type":"longrope","original_max_position_embeddings":64,"factor":4,
          "short_factor":[1,1.5,2,3,4,4,4,4],"long_factor":[1,1.5,2,3,4,4,4,4]})";
  const DriverRequest crosses = Request(12, 40, 60), within = Request(12, 40, 25);
  EXPECT_TRUE(Alone(kLongRope, crosses).SameBits(Alone(always_long, crosses)));
  EXPECT_FALSE(Alone(kLongRope, within).SameBits(Alone(always_long, within)));
}

TEST_F(RopeChoiceTest, EachRequestMayChooseItsOwnMethod) {
  std::vector<DriverRequest> requests;
  for (const char* rope : {"", R"({"type":"linear","factor":4})", kYarn, kDynamic,
                           R"({"type":"giraffe","power":0.5,"truncate_length":128})"}) {
    requests.push_back(Request(14, 100, 12));
    requests.back().rope = rope;
  }
  const auto engine = Make("");
  const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
  for (size_t index = 0; index < requests.size(); ++index) {
    SCOPED_TRACE(requests[index].rope);
    // As if the deployment had been started with that method.
    DriverRequest plain = requests[index];
    plain.rope.clear();
    EXPECT_TRUE(outputs[index].SameBits(Alone(requests[index].rope, plain)));
    for (size_t other = 0; other < index; ++other) {
      EXPECT_NE(outputs[index].tokens[0].logprob, outputs[other].tokens[0].logprob);
    }
  }
}

// A slot that another method left behind: the next sequence in it has its own table.
TEST_F(RopeChoiceTest, SlotsAreReusedWithOtherMethods) {
  const auto engine = Make("");
  DriverRequest yarn = Request(16, 80, 8), plain = Request(16, 80, 8);
  yarn.rope = kYarn;
  const DriverOutput first = Drive(*engine, 1, {yarn})[0];
  const DriverOutput second = Drive(*engine, 1, {plain})[0];
  const DriverOutput third = Drive(*engine, 1, {yarn})[0];
  EXPECT_TRUE(first.SameBits(third));
  EXPECT_TRUE(second.SameBits(Alone("", plain)));
  EXPECT_FALSE(first.SameBits(second));
}

// A scaled table that is accepted and not used: one server did that.
TEST_F(RopeChoiceTest, EveryMethodChangesLogitsAtPositionOne) {
  const std::vector<int32_t> tokens = {5, 9, 11};
  const auto logits = [&](const std::string& rope) {
    std::vector<float> values(tokens.size() * 320);
    const auto engine = Make(rope);
    EXPECT_TRUE(ScoreOffline(*engine, tokens, 0, values.data()).ok());
    return values;
  };
  const std::vector<float> plain = logits("");
  for (const char* rope :
       {R"({"type":"linear","factor":8})", R"({"type":"giraffe","power":0.5})", kYarn,
        R"({"type":"ntk","factor":8})", R"({"type":"ntk-aware","factor":8})",
        R"({"type":"llama3","factor":8,"low_freq_factor":1,"high_freq_factor":4,
            "original_max_position_embeddings":512})",
        R"({"type":"giraffe","factor":4,"truncate_length":128})",
        R"({"partial_rotary_factor":0.5,"type":"proportional"})",
        R"({"type":"default","rope_theta":20000})"}) {
    const std::vector<float> scaled = logits(rope);
    EXPECT_TRUE(std::equal(plain.begin(), plain.begin() + 320, scaled.begin()) ||
                std::string(rope) == kYarn)
        << "position 0 stands still: " << rope;
    EXPECT_FALSE(std::equal(plain.begin() + 320, plain.begin() + 640, scaled.begin() + 320))
        << rope;
  }
}

TEST_F(RopeChoiceTest, OfflineAndCardAgreeOnTheModelsOwn) {
  const auto engine = Make(kDynamic);
  const auto own = RopeOfRequest(engine->card().config, nullptr, 64);
  const auto longer = RopeOfRequest(engine->card().config, nullptr, 65);
  ASSERT_TRUE(own.ok() && longer.ok());
  EXPECT_EQ(*own, nullptr) << "the card's";
  ASSERT_NE(*longer, nullptr);
  EXPECT_FALSE((*longer)->regime == engine->card().rope_regime);
}

}  // namespace
}  // namespace godwit
