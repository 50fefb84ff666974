// Speculation without a seed leaves the distribution of the target alone, from the request to the
// answer: three-token texts of a toy pair behind gRPC, asked for by several clients at once in
// every way a request can, against their exact probabilities. Mistakes that are planted below the
// engine are found here too.

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "godwit/v1/inference.grpc.pb.h"
#include "server/server.h"
#include "tests/engine/toy_pair.h"
#include "tests/engine/toy_texts.h"

namespace godwit {
namespace {

using Speculation = v1::SpeculationOptions;

// A server's own seeds are never the same: chance alone fails once in a million.
constexpr double kAlpha = 1e-6;
constexpr int kClients = 6, kOutputs = 40;

std::vector<Speculation> AllWays() {
  std::vector<Speculation> ways(2);
  ways[1].set_mode(Speculation::MODE_AUTO);
  for (const auto policy : {Speculation::POLICY_FIXED, Speculation::POLICY_MARGIN,
                            Speculation::POLICY_THROUGHPUT, Speculation::POLICY_SPECDECPP}) {
    for (const int max_draft_tokens : {1, 2, 3}) {
      Speculation& way = ways.emplace_back();
      way.set_mode(Speculation::MODE_ON);
      way.set_policy(policy);
      way.set_max_draft_tokens(max_draft_tokens);
    }
  }
  ways.emplace_back().set_mode(Speculation::MODE_OFF);
  return ways;
}

v1::GenerateRequest RequestOf(const DriverRequest& from) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(from.prompt.begin(), from.prompt.end());
  request.mutable_sampling()->set_n(kOutputs);
  request.mutable_sampling()->set_temperature(from.sampling.temperature);
  request.mutable_sampling()->set_frequency_penalty(from.sampling.frequency_penalty);
  request.mutable_stopping()->set_max_tokens(from.max_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

class Service {
 public:
  explicit Service(Mistake mistake)
      : pair_({.target = TinyFamily::kTransnormer, .with_head = true, .mistake = mistake}),
        texts_(pair_.engine(), ToyRequest()) {
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    options.limits.max_n = kOutputs;
    options.limits.draft_policy = DraftPolicy::kSpecDecPP;  // of MODE_AUTO
    auto created = Server::CreateWithParts(options, {.card = pair_.engine().card(),
                                                     .executor = &pair_.engine(),
                                                     .caches = &pair_.engine().caches()});
    EXPECT_TRUE(created.ok()) << created.status();
    if (created.ok()) server_ = *std::move(created);
  }

  // Of the texts that the clients get when each asks so often in every way.
  double PValue(int num_times) {
    if (server_ == nullptr) return 0;
    std::vector<std::vector<v1::GenerateResponse>> responses(kClients);
    std::vector<std::thread> clients;
    for (std::vector<v1::GenerateResponse>& of_client : responses) {
      clients.emplace_back([&, this] { Ask(num_times, of_client); });
    }
    for (std::thread& client : clients) client.join();
    for (const std::vector<v1::GenerateResponse>& of_client : responses) {
      for (const v1::GenerateResponse& response : of_client) Count(response);
    }
    return texts_.PValue();
  }

  int64_t num_drafts() const { return num_drafts_; }
  int64_t num_accepted() const { return num_accepted_; }

 private:
  void Ask(int num_times, std::vector<v1::GenerateResponse>& responses) {
    const auto stub = v1::Inference::NewStub(grpc::CreateChannel(
        "127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials()));
    v1::GenerateRequest request = RequestOf(ToyRequest());
    for (int time = 0; time < num_times; ++time) {
      for (const Speculation& way : AllWays()) {
        *request.mutable_speculation() = way;
        grpc::ClientContext context;
        const grpc::Status status = stub->Generate(&context, request, &responses.emplace_back());
        ASSERT_TRUE(status.ok()) << status.error_message();
      }
    }
  }

  void Count(const v1::GenerateResponse& response) {
    EXPECT_EQ(response.outputs_size(), kOutputs);
    for (const v1::Output& output : response.outputs()) {
      texts_.Count({output.token_ids().begin(), output.token_ids().end()});
    }
    num_drafts_ += response.summary().speculation().draft_tokens();
    num_accepted_ += response.summary().speculation().accepted_tokens();
  }

  ToyPair pair_;
  ToyTexts texts_;
  std::unique_ptr<Server> server_;
  int64_t num_drafts_ = 0, num_accepted_ = 0;
};

TEST(LosslessServerTest, TextsWithoutASeedFollowTheTarget) {
  Service service(Mistake::kNone);
  EXPECT_GT(service.PValue(12), kAlpha);
  EXPECT_GT(service.num_drafts(), 10'000);
  EXPECT_GT(service.num_accepted(), service.num_drafts() / 4);
  EXPECT_LT(service.num_accepted(), service.num_drafts() * 3 / 4);
}

TEST(LosslessServerTest, PlantedMistakesAreFound) {
  for (const Mistake mistake : kPlantedMistakes) {
    EXPECT_LT(Service(mistake).PValue(6), kAlpha) << static_cast<int>(mistake);
  }
}

}  // namespace
}  // namespace godwit
