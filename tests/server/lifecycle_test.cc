// How requests end other than by themselves: cancel, disconnect, deadline, full queue, failing
// engine, drain.

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <future>
#include <random>
#include <thread>

#include "tests/server/server_fixture.h"

namespace godwit {
namespace {

using grpc::StatusCode;
using v1::GenerateEvent;
using v1::GenerateRequest;

constexpr auto kServing = grpc::health::v1::HealthCheckResponse::SERVING;
constexpr auto kNotServing = grpc::health::v1::HealthCheckResponse::NOT_SERVING;

std::string PhaseOf(const grpc::Status& status) {
  google::rpc::ErrorInfo info;
  if (!GetDetail(status, &info) || !info.metadata().contains("phase")) return "";
  return info.metadata().at("phase");
}

// Status of a call that runs into its deadline, with the server's details. When the machine stalls
// for longer than the margin by which the server is first, the client's own deadline wins and there
// are none: that try does not count.
grpc::Status StatusWithPhase(const std::function<grpc::Status()>& call) {
  constexpr int kTries = 10;
  grpc::Status status;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    status = call();
    EXPECT_EQ(status.error_code(), StatusCode::DEADLINE_EXCEEDED);
    if (!PhaseOf(status).empty()) break;
  }
  return status;
}

// A stream that runs beside the test.
class OpenStream {
 public:
  OpenStream(TestServer& server, const GenerateRequest& request,
             std::chrono::milliseconds timeout = std::chrono::milliseconds(0))
      : stub_(server.inference()) {
    if (timeout.count() > 0) context_.set_deadline(std::chrono::system_clock::now() + timeout);
    reader_ = stub_->GenerateStream(&context_, request);
  }
  // False at the end.
  bool Read() { return reader_->Read(&event_); }
  const GenerateEvent& event() const { return event_; }
  void Cancel() { context_.TryCancel(); }
  grpc::Status Finish() {
    while (Read()) ++num_read_;
    return reader_->Finish();
  }

 private:
  std::unique_ptr<v1::Inference::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<GenerateEvent>> reader_;
  GenerateEvent event_;
  int num_read_ = 0;
};

// Counts of the /metrics page through a scrape-free path: the model's slots are free again when a
// request for all of them runs.
bool AllSlotsCanBeHad(TestServer& server) {
  GenerateRequest request = SimpleRequest(2);
  request.mutable_sampling()->set_n(
      static_cast<int32_t>(server.engine().caches().geometry().num_slots));
  v1::GenerateResponse response;
  return server.Generate(request, &response).ok();
}

TEST(LifecycleTest, CancelWhileDecodingFreesTheSlot) {
  TestServer server;
  server.engine().set_step_time_us(500);
  OpenStream stream(server, SimpleRequest(4000));
  ASSERT_TRUE(stream.Read());
  ASSERT_TRUE(stream.Read());
  stream.Cancel();
  EXPECT_EQ(stream.Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(AllSlotsCanBeHad(server));
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
  EXPECT_LT(server.engine().num_steps(), 3000);
}

TEST(LifecycleTest, CancelWhilePrefilling) {
  TestServer server({.engine = {.context_length = 1 << 20}});
  server.engine().AllowSteps(1);  // one chunk of the prompt, the next one waits
  GenerateRequest request = SimpleRequest(10);
  request.mutable_token_ids()->mutable_ids()->Resize(60'000, 'x');
  OpenStream stream(server, request);
  ASSERT_TRUE(Eventually([&] { return server.engine().num_steps() == 1; }));
  stream.Cancel();
  EXPECT_EQ(stream.Finish().error_code(), StatusCode::CANCELLED);
  server.engine().set_step_time_us(20'000);
  server.engine().AllowSteps(-1);
  EXPECT_TRUE(AllSlotsCanBeHad(server));
  EXPECT_LT(server.engine().num_steps(), 25);  // of 30 chunks, and 3 steps of the second request
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, CancelWhileWaiting) {
  TestServer server;
  server.engine().AllowSteps(1);
  GenerateRequest all_slots = SimpleRequest(3);
  all_slots.mutable_sampling()->set_n(4);
  OpenStream first(server, all_slots);
  ASSERT_TRUE(Eventually([&] { return server.engine().num_steps() == 1; }));
  OpenStream second(server, SimpleRequest(10));
  second.Cancel();
  EXPECT_EQ(second.Finish().error_code(), StatusCode::CANCELLED);
  server.engine().AllowSteps(-1);
  EXPECT_TRUE(first.Finish().ok());
  EXPECT_TRUE(AllSlotsCanBeHad(server));
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, ALostConnectionIsACancel) {
  TestServer server;
  server.engine().set_step_time_us(500);
  {
    TestServer* const target = &server;
    OpenStream stream(*target, SimpleRequest(4000));
    ASSERT_TRUE(stream.Read());
    stream.Cancel();  // the reader goes away without reading to the end
  }
  EXPECT_TRUE(AllSlotsCanBeHad(server));
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, RandomCancelsLeaveNothingBehind) {
  TestServer server({.engine = {.num_slots = 8}});
  server.engine().set_step_time_us(50);
  std::atomic<int> num_ok{0}, num_cancelled{0}, num_other{0};
  std::vector<std::thread> clients;
  for (int client = 0; client < 8; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(client);
      for (int round = 0; round < 40; ++round) {
        GenerateRequest request = SimpleRequest(1 + random() % 200);
        request.set_prompt(std::string(1 + random() % 2000, 'p'));
        request.mutable_sampling()->set_n(1 + random() % 3);
        OpenStream stream(server, request);
        for (size_t reads = random() % 20; reads > 0 && stream.Read(); --reads) {
        }
        if (random() % 2) stream.Cancel();
        const grpc::Status status = stream.Finish();
        ++(status.ok()                                    ? num_ok
           : status.error_code() == StatusCode::CANCELLED ? num_cancelled
                                                          : num_other);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(num_other, 0);
  EXPECT_GT(num_ok, 0);
  EXPECT_GT(num_cancelled, 0);
  EXPECT_TRUE(AllSlotsCanBeHad(server));
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, DeadlineNamesItsPhase) {
  TestServer server;
  server.engine().set_step_time_us(1000);
  const grpc::Status status = StatusWithPhase([&] {
    return OpenStream(server, SimpleRequest(4000), std::chrono::milliseconds(600)).Finish();
  });
  EXPECT_EQ(ReasonOfStatus(status), "DEADLINE_EXCEEDED");
  EXPECT_EQ(PhaseOf(status), "decoding");
  EXPECT_TRUE(AllSlotsCanBeHad(server));
}

TEST(LifecycleTest, DeadlineInTheQueueNamesItsPhase) {
  TestServer server({.engine = {.context_length = 1 << 20}});
  server.engine().set_step_time_us(1000);
  GenerateRequest all_slots = SimpleRequest(100'000);
  all_slots.mutable_sampling()->set_n(4);
  OpenStream first(server, all_slots);
  ASSERT_TRUE(first.Read());
  const grpc::Status status = StatusWithPhase([&] {
    return OpenStream(server, SimpleRequest(10), std::chrono::milliseconds(500)).Finish();
  });
  EXPECT_EQ(PhaseOf(status), "waiting");
  first.Cancel();
  first.Finish();
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, DeadlineWhilePrefillingNamesItsPhase) {
  TestServer server({.engine = {.context_length = 1 << 22}});
  server.engine().set_step_time_us(10'000);
  GenerateRequest request = SimpleRequest(10);
  request.mutable_token_ids()->mutable_ids()->Resize(1'000'000, 'x');  // 489 chunks
  const grpc::Status status = StatusWithPhase(
      [&] { return OpenStream(server, request, std::chrono::milliseconds(800)).Finish(); });
  EXPECT_EQ(PhaseOf(status), "prefilling");
}

TEST(LifecycleTest, ADeadlineThatIsOverIsNotRun) {
  TestServer server;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() - std::chrono::seconds(1));
  v1::GenerateResponse response;
  EXPECT_EQ(server.inference()->Generate(&context, SimpleRequest(10), &response).error_code(),
            StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

// The engine's pace and the others' do not depend on a client that does not read; what it gets is
// merged, and whole.
TEST(LifecycleTest, ASlowReaderDelaysNobodyAndLosesNothing) {
  TestServer server({.engine = {.context_length = 1 << 20}});
  GenerateRequest request = SimpleRequest(200'000);
  OpenStream slow(server, request);
  ASSERT_TRUE(slow.Read());
  v1::GenerateResponse other;
  ASSERT_TRUE(server.Generate(SimpleRequest(100), &other).ok());
  // All steps are done though nothing more was read.
  ASSERT_TRUE(Eventually([&] { return server.engine().num_steps() >= 200'000; }));
  std::vector<GenerateEvent> events = {slow.event()};
  while (slow.Read()) events.push_back(slow.event());
  EXPECT_TRUE(slow.Finish().ok());
  EXPECT_LT(events.size(), 100'000u);  // merged
  const v1::GenerateResponse whole = Concatenate(events);
  ASSERT_EQ(whole.outputs(0).token_ids_size(), 200'000);
  for (int at = 0; at < 200'000; at += 9973) {
    EXPECT_EQ(whole.outputs(0).token_ids(at), FakeEngine::Letter(1, 0, at));
  }
}

TEST(LifecycleTest, ARunningRequestIdIsRefusedAndFreeAgainAfterwards) {
  TestServer server;
  server.engine().set_step_time_us(500);
  GenerateRequest request = SimpleRequest(4000);
  request.set_request_id("mine");
  OpenStream first(server, request);
  ASSERT_TRUE(first.Read());
  v1::GenerateResponse response;
  const grpc::Status status = server.Generate(request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(ReasonOfStatus(status), "DUPLICATE_REQUEST_ID");
  google::rpc::ResourceInfo resource;
  ASSERT_TRUE(GetDetail(status, &resource));
  EXPECT_EQ(resource.resource_name(), "mine");
  first.Cancel();
  EXPECT_EQ(first.Finish().error_code(), StatusCode::CANCELLED);
  request.mutable_stopping()->set_max_tokens(2);
  EXPECT_TRUE(Eventually([&] { return server.Generate(request, &response).ok(); }));
  EXPECT_EQ(response.request_id(), "mine");
}

TEST(LifecycleTest, AFullQueueTellsWhenToTryAgain) {
  TestServerOptions options;
  options.server.max_waiting = 2;
  TestServer server(options);
  server.engine().AllowSteps(1);
  GenerateRequest all_slots = SimpleRequest(3);
  all_slots.mutable_sampling()->set_n(4);
  OpenStream running(server, all_slots);
  ASSERT_TRUE(Eventually([&] { return server.engine().num_steps() == 1; }));
  // Three calls for two places: while no step runs, the one that comes last is the only one to end.
  struct Call {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    grpc::Status status;
    std::atomic<bool> ended{false};
    std::thread thread;
  };
  std::array<Call, 3> calls;
  for (Call& call : calls) {
    call.thread = std::thread([&server, &call] {
      call.status = server.inference()->Generate(&call.context, SimpleRequest(2), &call.response);
      call.ended = true;
    });
  }
  const auto ended = [&] {
    return std::count_if(calls.begin(), calls.end(),
                         [](const Call& call) { return call.ended.load(); });
  };
  EXPECT_TRUE(Eventually([&] { return ended() > 0; }));
  EXPECT_EQ(ended(), 1);
  const Call* refused = nullptr;
  for (const Call& call : calls) refused = call.ended ? &call : refused;
  server.engine().AllowSteps(-1);
  EXPECT_TRUE(running.Finish().ok());
  for (Call& call : calls) call.thread.join();
  ASSERT_NE(refused, nullptr);
  for (const Call& call : calls) EXPECT_EQ(call.status.ok(), &call != refused);
  EXPECT_EQ(refused->status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOfStatus(refused->status), "QUEUE_FULL");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(GetDetail(refused->status, &retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  const auto& trailers = refused->context.GetServerTrailingMetadata();
  const auto pushback = trailers.find("grpc-retry-pushback-ms");
  ASSERT_NE(pushback, trailers.end());
  EXPECT_EQ(std::string(pushback->second.data(), pushback->second.size()), "1000");
}

TEST(LifecycleTest, AnEngineErrorIsInternalAndOpaque) {
  TestServer server;
  server.engine().FailNextStep(absl::InternalError("secret /path/of/model at 0x7fff"));
  v1::GenerateResponse response;
  const grpc::Status status = server.Generate(SimpleRequest(5), &response);
  EXPECT_EQ(status.error_code(), StatusCode::INTERNAL);
  EXPECT_EQ(status.error_message().find("secret"), std::string::npos);
  EXPECT_EQ(status.error_details().find("secret"), std::string::npos);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(GetDetail(status, &info));
  EXPECT_EQ(info.metadata().at("error_id").size(), 16u);
  EXPECT_TRUE(server.Generate(SimpleRequest(5), &response).ok());  // the next one is fine
}

TEST(LifecycleTest, ALostDeviceEndsAllWithUnavailableAndTurnsHealthOff) {
  TestServer server;
  EXPECT_FALSE(server.server().device_lost());
  server.engine().FailNextStep(absl::UnavailableError("the device is gone"));
  v1::GenerateResponse response;
  for (const bool running : {true, false}) {  // ended by it, and refused after it
    const grpc::Status status = server.Generate(SimpleRequest(5), &response);
    EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE) << running;
    EXPECT_EQ(status.error_message(), "the device was lost") << running;
    EXPECT_EQ(ReasonOfStatus(status), "DEVICE_LOST") << running;
    google::rpc::RetryInfo retry;
    EXPECT_TRUE(GetDetail(status, &retry)) << running;
  }
  EXPECT_TRUE(server.server().device_lost());
  EXPECT_EQ(server.server().device_lost_cause(), "the device is gone");
  EXPECT_TRUE(Eventually([&] { return server.Health("") == kNotServing; }));
  EXPECT_TRUE(Eventually([&] { return server.Health("liveness") == kNotServing; }));
}

TEST(LifecycleTest, HealthKnowsEachServiceAndLiveness) {
  TestServer server;
  for (const char* service :
       {"", "liveness", "godwit.v1.Inference", "godwit.v1.Tokenizer", "godwit.v1.Models"}) {
    EXPECT_EQ(server.Health(service), kServing) << service;
  }
  EXPECT_EQ(server.Health("nothing"), grpc::health::v1::HealthCheckResponse::SERVICE_UNKNOWN);
}

TEST(LifecycleTest, DrainFinishesWhatWasAcceptedAndRefusesTheRest) {
  TestServer server;
  server.engine().set_step_time_us(2000);
  OpenStream stream(server, SimpleRequest(300));
  ASSERT_TRUE(stream.Read());
  auto shutdown = std::async(std::launch::async, [&] { server.server().Shutdown(); });
  EXPECT_TRUE(Eventually([&] { return server.Health("") == kNotServing; }));
  EXPECT_EQ(server.Health("liveness"), kServing);  // a probe must not kill it
  grpc::Status refused;
  v1::GenerateResponse response;
  EXPECT_TRUE(Eventually([&] {
    refused = server.Generate(SimpleRequest(1), &response);
    return refused.error_code() == StatusCode::UNAVAILABLE;
  }));
  EXPECT_EQ(ReasonOfStatus(refused), "DRAINING");
  google::rpc::RetryInfo retry;
  EXPECT_TRUE(GetDetail(refused, &retry));
  EXPECT_TRUE(stream.Finish().ok());
  shutdown.wait();
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

TEST(LifecycleTest, DrainIsBounded) {
  TestServerOptions options;
  options.server.drain_timeout_ms = 100;
  TestServer server(options);
  server.engine().set_step_time_us(1000);
  OpenStream stream(server, SimpleRequest(4000));
  ASSERT_TRUE(stream.Read());
  auto shutdown = std::async(std::launch::async, [&] { server.server().Shutdown(); });
  const grpc::Status status = stream.Finish();
  EXPECT_EQ(status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(PhaseOf(status), "decoding");
  EXPECT_EQ(shutdown.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

}  // namespace
}  // namespace godwit
