// Sessions and snapshots through gRPC, over the real engine: a restored or forked session goes on
// with the tokens of the uninterrupted one; over a fake one: who may use what, and races.

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/state_file.h"
#include "gmock/gmock.h"
#include "godwit/v1/sessions.grpc.pb.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/temp_folder.h"
#include "tests/engine/tiny_model.h"
#include "tests/server/server_fixture.h"

namespace godwit {
namespace {

using grpc::StatusCode;

class SessionClient {
 public:
  explicit SessionClient(std::shared_ptr<grpc::Channel> channel, std::string token = "")
      : inference_(v1::Inference::NewStub(channel)),
        sessions_(v1::Sessions::NewStub(channel)),
        token_(std::move(token)) {}

  grpc::Status Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response) {
    const auto context = Context();
    return inference_->Generate(context.get(), request, response);
  }
  std::string Create() {
    v1::Session session;
    const auto context = Context();
    EXPECT_TRUE(sessions_->CreateSession(context.get(), {}, &session).ok());
    return session.session_id();
  }
  grpc::Status Get(const std::string& id, v1::Session* session) {
    v1::GetSessionRequest request;
    request.set_session_id(id);
    const auto context = Context();
    return sessions_->GetSession(context.get(), request, session);
  }
  grpc::Status Fork(const std::string& id, v1::Session* session) {
    v1::ForkSessionRequest request;
    request.set_session_id(id);
    const auto context = Context();
    return sessions_->ForkSession(context.get(), request, session);
  }
  grpc::Status Delete(const std::string& id) {
    v1::DeleteSessionRequest request;
    request.set_session_id(id);
    v1::DeleteSessionResponse answer;
    const auto context = Context();
    return sessions_->DeleteSession(context.get(), request, &answer);
  }
  int NumSessions() {
    v1::ListSessionsResponse answer;
    const auto context = Context();
    EXPECT_TRUE(sessions_->ListSessions(context.get(), {}, &answer).ok());
    return answer.sessions_size();
  }
  grpc::Status DeleteSnapshot(const std::string& name) {
    v1::DeleteSnapshotRequest request;
    request.set_name(name);
    v1::DeleteSnapshotResponse answer;
    const auto context = Context();
    return sessions_->DeleteSnapshot(context.get(), request, &answer);
  }
  grpc::Status Save(const std::string& id, const std::string& name) {
    v1::SnapshotSessionRequest request;
    request.set_session_id(id);
    request.set_name(name);
    v1::Snapshot snapshot;
    const auto context = Context();
    return sessions_->SnapshotSession(context.get(), request, &snapshot);
  }
  grpc::Status Restore(const std::string& name, v1::Session* session) {
    v1::RestoreSessionRequest request;
    request.set_name(name);
    const auto context = Context();
    return sessions_->RestoreSession(context.get(), request, session);
  }
  grpc::Status Export(const std::string& name, std::string* bytes) {
    v1::ExportSnapshotRequest request;
    request.set_name(name);
    const auto context = Context();
    const auto reader = sessions_->ExportSnapshot(context.get(), request);
    for (v1::SnapshotChunk chunk; reader->Read(&chunk);) *bytes += chunk.data();
    return reader->Finish();
  }
  grpc::Status Import(const std::string& name, const std::string& bytes) {
    v1::Snapshot snapshot;
    const auto context = Context();
    const auto writer = sessions_->ImportSnapshot(context.get(), &snapshot);
    v1::ImportSnapshotRequest request;
    request.set_name(name);
    for (size_t at = 0; at < bytes.size(); at += 100'000) {
      request.set_data(bytes.substr(at, 100'000));
      if (!writer->Write(request)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }

 private:
  std::unique_ptr<grpc::ClientContext> Context() const {
    auto context = std::make_unique<grpc::ClientContext>();
    if (!token_.empty()) context->AddMetadata("authorization", "Bearer " + token_);
    return context;
  }
  std::unique_ptr<v1::Inference::Stub> inference_;
  std::unique_ptr<v1::Sessions::Stub> sessions_;
  std::string token_;
};

v1::GenerateRequest Turn(const std::string& session, std::vector<int32_t> ids, int64_t max_tokens) {
  v1::GenerateRequest request;
  if (!ids.empty()) request.mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  request.mutable_sampling()->set_seed(11);
  request.mutable_sampling()->set_frequency_penalty(0.5f);
  request.mutable_stopping()->set_max_tokens(max_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  if (!session.empty()) request.mutable_state()->set_session_id(session);
  return request;
}

std::vector<int32_t> Ids(const v1::GenerateResponse& response) {
  if (response.outputs_size() == 0) return {};
  const auto& ids = response.outputs(0).token_ids();
  return {ids.begin(), ids.end()};
}

std::vector<int32_t> Numbers(int32_t count) {
  std::vector<int32_t> ids;
  for (int32_t index = 0; index < count; ++index) ids.push_back(3 + index * 7 % 250);
  return ids;
}

class RealSessionsTest : public testing::TestWithParam<TinyFamily> {
 protected:
  RealSessionsTest() : model_({.family = GetParam()}) { Restart(); }
  void Restart() {
    client_.reset();
    server_.reset();
    ServerOptions options;
    options.engine.model_folder = model_.folder();
    options.engine.dtype = DType::kF32;
    options.engine.max_sequences = 4;
    options.engine.kv_bytes = 16 << 20;
    options.engine.store_bytes = 16 << 20;
    options.backend = {.name = "cpu", .num_threads = 2};
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    options.sessions.folder = folder_.path();
    std::string notes;
    auto created = Server::Create(options, &notes);
    ASSERT_TRUE(created.ok()) << created.status();
    server_ = *std::move(created);
    client_ = std::make_unique<SessionClient>(grpc::CreateChannel(
        "127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials()));
  }
  std::vector<int32_t> Generate(const v1::GenerateRequest& request,
                                v1::GenerateResponse* response = nullptr) {
    v1::GenerateResponse own;
    if (response == nullptr) response = &own;
    const grpc::Status status = client_->Generate(request, response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return status.ok() ? Ids(*response) : std::vector<int32_t>();
  }

  TinyModel model_;
  TempFolder folder_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<SessionClient> client_;
};

// Forked, saved, exported, imported and restored after a restart: the same tokens.
TEST_P(RealSessionsTest, EveryWayOnHasTheTokensOfTheUninterrupted) {
  const std::vector<int32_t> expected = Generate(Turn("", Numbers(75), 40));
  const std::string id = client_->Create();
  std::vector<int32_t> head = Generate(Turn(id, Numbers(75), 21));
  v1::Session fork;
  ASSERT_TRUE(client_->Fork(id, &fork).ok());
  EXPECT_EQ(fork.state_position(), 75 + 20);
  EXPECT_TRUE(fork.has_pending_token());
  ASSERT_TRUE(client_->Save(id, "a.snapshot-1").ok());
  const auto expect_rest = [&](const std::string& session) {
    v1::GenerateResponse response;
    std::vector<int32_t> whole = head;
    const std::vector<int32_t> rest = Generate(Turn(session, {}, 19), &response);
    whole.insert(whole.end(), rest.begin(), rest.end());
    EXPECT_EQ(whole, expected);
    EXPECT_EQ(response.summary().usage().restored_tokens(), 95);
    EXPECT_EQ(response.summary().usage().prompt_tokens(), 96);
    EXPECT_EQ(response.summary().session().state_position(), 75 + 39);
    EXPECT_TRUE(response.summary().session().kept());
  };
  expect_rest(id);
  expect_rest(fork.session_id());
  std::string file;
  ASSERT_TRUE(client_->Export("a.snapshot-1", &file).ok());
  Restart();
  v1::Session session;
  EXPECT_EQ(client_->Get(id, &session).error_code(), StatusCode::NOT_FOUND);
  ASSERT_TRUE(client_->Restore("a.snapshot-1", &session).ok());
  expect_rest(session.session_id());
  ASSERT_TRUE(client_->Import("b", file).ok());
  ASSERT_TRUE(client_->Restore("b", &session).ok());
  expect_rest(session.session_id());
}

TEST_P(RealSessionsTest, TurnsReadWhatIsNew) {
  const std::string id = client_->Create();
  v1::GenerateResponse read;
  v1::GenerateRequest ingest = Turn(id, Numbers(100), 0);
  ingest.mutable_state()->set_save_as("document");
  Generate(ingest, &read);
  EXPECT_EQ(read.summary().session().state_position(), 100);
  // A question does not move the session where its state is not kept.
  v1::GenerateRequest question = Turn(id, {9, 8, 7}, 5);
  question.mutable_state()->set_keep_state(false);
  question.mutable_state()->set_expected_position(100);
  const std::vector<int32_t> answer = Generate(question);
  EXPECT_EQ(Generate(question), answer);
  v1::Session session;
  ASSERT_TRUE(client_->Restore("document", &session).ok());
  question.mutable_state()->set_session_id(session.session_id());
  EXPECT_EQ(Generate(question), answer);
  question.mutable_state()->set_expected_position(99);
  v1::GenerateResponse response;
  EXPECT_EQ(client_->Generate(question, &response).error_code(), StatusCode::FAILED_PRECONDITION);
}

TEST_P(RealSessionsTest, DamagedForeignAndHostileSnapshotsChangeNothing) {
  const std::string id = client_->Create();
  Generate(Turn(id, Numbers(20), 5));
  ASSERT_TRUE(client_->Save(id, "a").ok());
  std::string file;
  ASSERT_TRUE(client_->Export("a", &file).ok());
  std::string bad = file;
  bad[bad.size() / 2] = static_cast<char>(bad[bad.size() / 2] ^ 1);
  EXPECT_EQ(client_->Import("a", bad).error_code(), StatusCode::DATA_LOSS);
  EXPECT_EQ(client_->Import("a", file.substr(0, file.size() - 1)).error_code(),
            StatusCode::DATA_LOSS);
  for (const char* name : {"", "../a", "a/b", "x y", "\x01"}) {
    EXPECT_EQ(client_->Import(name, file).error_code(), StatusCode::INVALID_ARGUMENT) << name;
    EXPECT_EQ(client_->Save(id, name).error_code(), StatusCode::INVALID_ARGUMENT) << name;
  }
  std::string again;
  ASSERT_TRUE(client_->Export("a", &again).ok());
  EXPECT_EQ(again, file);
  v1::Session session;
  EXPECT_TRUE(client_->Restore("a", &session).ok());
  EXPECT_EQ(client_->Restore("b", &session).error_code(), StatusCode::NOT_FOUND);
}

INSTANTIATE_TEST_SUITE_P(Families, RealSessionsTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama));

TEST(SessionsTest, BelongToTheirTenantAndHaveOneWriter) {
  TempFolder folder;
  TestServerOptions options;
  options.server.token_file = folder.Write("tokens", "alice\nbob\n");
  options.server.sessions.folder = folder.File("sessions");
  TestServer server(options);
  SessionClient alice(server.channel(), "alice"), bob(server.channel(), "bob"),
      nobody(server.channel());
  const std::string id = alice.Create();
  EXPECT_EQ(id.size(), 32u);
  v1::GenerateResponse response;
  ASSERT_TRUE(alice.Generate(Turn(id, {1, 2, 3}, 4), &response).ok());
  ASSERT_TRUE(alice.Save(id, "mine").ok());
  v1::Session session;
  EXPECT_EQ(bob.Get(id, &session).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(bob.Fork(id, &session).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(bob.Delete(id).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(bob.Restore("mine", &session).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(bob.Generate(Turn(id, {1}, 4), &response).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(nobody.Get(id, &session).error_code(), StatusCode::UNAUTHENTICATED);

  server.engine().AllowSteps(0);
  std::thread writer([&] {
    v1::GenerateResponse own;
    EXPECT_TRUE(alice.Generate(Turn(id, {1}, 4), &own).ok());
  });
  EXPECT_TRUE(Eventually([&] { return alice.Get(id, &session).ok() && session.busy(); }));
  EXPECT_EQ(alice.Generate(Turn(id, {1}, 4), &response).error_code(), StatusCode::ABORTED);
  EXPECT_EQ(alice.Fork(id, &session).error_code(), StatusCode::ABORTED);
  server.engine().AllowSteps(-1);
  writer.join();
  ASSERT_TRUE(alice.Get(id, &session).ok());
  EXPECT_FALSE(session.busy());
  EXPECT_EQ(session.state_position(), 6 + 1 + 1 + 3);
  EXPECT_TRUE(alice.Delete(id).ok());
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

// What a client sends as an id or a name comes back in messages and details, which a transport
// takes up to 8 KiB of: more must not turn the status into the transport's own.
TEST(SessionsTest, LongNamesAreRefusedWithTheStatusOfShortOnes) {
  TempFolder folder;
  TestServerOptions options;
  options.server.sessions.folder = folder.path();
  TestServer server(options);
  SessionClient client(server.channel());
  const std::string existing = client.Create();
  const auto codes = [&](const std::string& text) {
    v1::Session session;
    v1::GenerateResponse response;
    v1::GenerateRequest model = Turn("", {1}, 1), rope = Turn("", {1}, 1);
    model.set_model(text);
    rope.set_rope("{\"type\":\"" + text + "\"}");
    v1::GenerateRequest saved = Turn(existing, {1}, 1), stopped = Turn("", {1}, 1);
    saved.mutable_state()->set_save_as(text + "/");
    stopped.mutable_stopping()->add_stop(text);
    stopped.mutable_stopping()->add_stop("");
    std::vector<StatusCode> codes;
    for (const grpc::Status& status :
         {client.Get(text, &session), client.Fork(text, &session), client.Delete(text),
          client.Generate(Turn(text, {1}, 1), &response), client.Restore(text + "/", &session),
          client.Save(existing, text + "/"), client.DeleteSnapshot(text + "/"),
          client.Generate(model, &response), client.Generate(rope, &response),
          client.Generate(saved, &response), client.Generate(stopped, &response)}) {
      codes.push_back(status.error_code());
      EXPECT_LT(status.error_message().size(), 2000u);
    }
    return codes;
  };
  const std::vector<StatusCode> expected = codes("x");
  for (const StatusCode code : expected) {
    EXPECT_THAT(code, testing::AnyOf(StatusCode::NOT_FOUND, StatusCode::INVALID_ARGUMENT));
  }
  for (const size_t size : {1000u, 7000u, 100'000u, 1'000'000u}) {
    EXPECT_EQ(codes(std::string(size, 'x')), expected) << size;
  }
}

TEST(SessionsTest, ConcurrentTurnsForksAndDeletesLeaveNoSlot) {
  TempFolder folder;
  TestServerOptions options;
  options.engine.num_slots = 3;
  options.engine.store_bytes = 40'000;
  options.server.sessions.folder = folder.path();
  TestServer server(options);
  std::vector<std::thread> threads;
  std::atomic<int> num_turns{0};
  for (int thread = 0; thread < 6; ++thread) {
    threads.emplace_back([&, thread] {
      SessionClient client(server.channel());
      for (int round = 0; round < 12; ++round) {
        const std::string id = client.Create();
        v1::GenerateResponse response;
        v1::Session fork;
        num_turns += client.Generate(Turn(id, Numbers(10 + thread), 4), &response).ok();
        const bool forked = client.Fork(id, &fork).ok();
        num_turns += client.Generate(Turn(id, {5}, 3), &response).ok();
        if (round % 3 == 0) (void)client.Save(id, "s" + std::to_string(thread));
        if (forked) {
          std::thread other([&] { (void)SessionClient(server.channel()).Delete(id); });
          num_turns += client.Generate(Turn(fork.session_id(), {6}, 3), &response).ok();
          other.join();
          EXPECT_TRUE(client.Delete(fork.session_id()).ok());
        } else {
          (void)client.Delete(id);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(num_turns, 100);
  EXPECT_TRUE(Eventually([&] { return server.engine().caches().free_store_bytes() == 40'000; }));
  EXPECT_TRUE(server.ShutdownLeavesNoSlot());
}

// --- A storm over the real engine, with all three tiers

constexpr int64_t kStormSlots = 3;
constexpr size_t kDocuments = 3, kQuestions = 4;

std::vector<int32_t> Document(size_t document) {
  return Numbers(60 + 20 * static_cast<int32_t>(document));
}
std::vector<int32_t> Question(size_t question) {
  return {static_cast<int32_t>(20 + question), 5, static_cast<int32_t>(70 + 3 * question)};
}

class StormServer {
 public:
  // Host memory for so many of the largest states; folder "": none for the disk.
  StormServer(const TinyModel& model, int64_t num_host_states, const std::string& folder)
      : store_bytes_(StoreBytes(model, num_host_states)),
        engine_(MakeEngine(model, Options(store_bytes_))) {
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    options.sessions.folder = folder;
    auto created = Server::CreateWithParts(options, {.card = engine_->card(),
                                                     .executor = engine_.get(),
                                                     .caches = &engine_->caches(),
                                                     .model_fingerprint = FingerprintText("tiny")});
    EXPECT_TRUE(created.ok()) << created.status();
    server_ = *std::move(created);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()),
                                   grpc::InsecureChannelCredentials());
  }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

  void ExpectNothingHeldAfterShutdown() {
    server_->Shutdown();
    EXPECT_EQ(engine_->caches().free_slots(), kStormSlots);
    EXPECT_EQ(engine_->caches().free_blocks(), engine_->caches().geometry().num_blocks);
    EXPECT_EQ(engine_->caches().free_store_bytes(), store_bytes_);
  }

 private:
  static EngineOptions Options(int64_t store_bytes) {
    return {.dtype = DType::kF32,
            .max_sequences = kStormSlots,
            .max_tokens_per_step = 256,
            .kv_bytes = 4 << 20,
            .store_bytes = store_bytes};
  }
  static int64_t StoreBytes(const TinyModel& model, int64_t num_states) {
    return num_states * MakeEngine(model, Options(0))->caches().StateBytes(140);
  }
  const int64_t store_bytes_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

// What follows each document and up to two questions after it, by [document][first][second].
struct Answers {
  std::vector<int32_t> after_document[kDocuments];
  std::vector<int32_t> first[kDocuments][kQuestions];
  std::vector<int32_t> second[kDocuments][kQuestions][kQuestions];
};

// One request at a time, with room for all on the device and the host.
Answers AnswersInPeace(const TinyModel& model) {
  StormServer server(model, 100, "");
  SessionClient client(server.channel());
  Answers answers;
  const auto ask = [&](const std::string& id, const std::vector<int32_t>& input, int64_t tokens) {
    v1::GenerateResponse response;
    const grpc::Status status = client.Generate(Turn(id, input, tokens), &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return Ids(response);
  };
  for (size_t document = 0; document < kDocuments; ++document) {
    const std::string id = client.Create();
    answers.after_document[document] = ask(id, Document(document), 8);
    for (size_t first = 0; first < kQuestions; ++first) {
      v1::Session fork;
      EXPECT_TRUE(client.Fork(id, &fork).ok());
      answers.first[document][first] = ask(fork.session_id(), Question(first), 6);
      for (size_t second = 0; second < kQuestions; ++second) {
        v1::Session last;
        EXPECT_TRUE(client.Fork(fork.session_id(), &last).ok());
        answers.second[document][first][second] = ask(last.session_id(), Question(second), 5);
        EXPECT_TRUE(client.Delete(last.session_id()).ok());
      }
      EXPECT_TRUE(client.Delete(fork.session_id()).ok());
    }
  }
  return answers;
}

// One client of many: forks documents that all share, asks, leaves what it asked idle, comes back
// to it, saves, restores and deletes, also while a request runs.
class StormClient {
 public:
  StormClient(std::shared_ptr<grpc::Channel> channel, std::vector<std::string> documents,
              const Answers& answers, int thread)
      : channel_(channel),
        client_(channel),
        documents_(std::move(documents)),
        answers_(answers),
        thread_(thread),
        random_(static_cast<uint32_t>(thread) + 1) {}

  void Run(int num_rounds) {
    for (int round = 0; round < num_rounds; ++round) {
      switch (random_() % 4) {
        case 0:
        case 1:
          AskFirst();
          break;
        case 2:
          AskSecond(/*deleted_meanwhile=*/random_() % 3 == 0);
          break;
        default:
          SaveAndRestore("t" + std::to_string(thread_) + "-" + std::to_string(round));
      }
    }
  }
  void DeleteAll() {
    for (const Idle& idle : idle_) EXPECT_TRUE(client_.Delete(idle.id).ok());
    for (const std::string& name : snapshots_) EXPECT_TRUE(client_.DeleteSnapshot(name).ok());
  }
  int num_answered() const { return num_answered_; }
  int num_from_disk() const { return num_from_disk_; }
  int num_restored() const { return num_restored_; }

 private:
  struct Idle {
    std::string id;
    size_t document = 0, first = 0;
  };

  // What a race may lead to: used by another, or no room.
  bool Check(const grpc::Status& status) {
    const bool expected = status.ok() || status.error_code() == StatusCode::ABORTED ||
                          status.error_code() == StatusCode::RESOURCE_EXHAUSTED;
    EXPECT_TRUE(expected) << status.error_code() << ": " << status.error_message();
    return status.ok();
  }

  void AskFirst() {
    const size_t document = random_() % kDocuments, first = random_() % kQuestions;
    v1::Session fork;
    if (!Check(client_.Fork(documents_[document], &fork))) return;
    v1::GenerateResponse response;
    if (Check(client_.Generate(Turn(fork.session_id(), Question(first), 6), &response))) {
      ++num_answered_;
      EXPECT_EQ(Ids(response), answers_.first[document][first]);
      idle_.push_back({fork.session_id(), document, first});
    } else {
      EXPECT_TRUE(client_.Delete(fork.session_id()).ok());
    }
  }

  std::optional<Idle> TakeIdle() {
    if (idle_.empty()) return std::nullopt;
    const size_t at = random_() % idle_.size();
    Idle idle = idle_[at];
    idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(at));
    v1::Session session;
    EXPECT_TRUE(client_.Get(idle.id, &session).ok());
    was_on_disk_ = session.location() == v1::Session::LOCATION_DISK;
    return idle;
  }

  void AskSecond(bool deleted_meanwhile) {
    const std::optional<Idle> idle = TakeIdle();
    if (!idle) return;
    std::thread other;
    if (deleted_meanwhile) {
      other = std::thread([&] { EXPECT_TRUE(SessionClient(channel_).Delete(idle->id).ok()); });
    }
    const size_t second = random_() % kQuestions;
    v1::GenerateResponse response;
    const grpc::Status status = client_.Generate(Turn(idle->id, Question(second), 5), &response);
    if (other.joinable()) other.join();
    const bool deleted = deleted_meanwhile && status.error_code() == StatusCode::NOT_FOUND;
    if (!deleted && Check(status)) {
      ++num_answered_;
      num_from_disk_ += was_on_disk_;
      EXPECT_EQ(Ids(response), answers_.second[idle->document][idle->first][second]);
    }
    if (!deleted_meanwhile) {
      EXPECT_TRUE(client_.Delete(idle->id).ok());
    }
  }

  void SaveAndRestore(const std::string& name) {
    const std::optional<Idle> idle = TakeIdle();
    if (!idle) return;
    if (Check(client_.Save(idle->id, name))) {
      snapshots_.push_back(name);
      v1::Session restored;
      if (Check(client_.Restore(name, &restored))) {
        ++num_restored_;
        idle_.push_back({restored.session_id(), idle->document, idle->first});
      }
    }
    idle_.push_back(*idle);
  }

  std::shared_ptr<grpc::Channel> channel_;
  SessionClient client_;
  const std::vector<std::string> documents_;
  const Answers& answers_;
  const int thread_;
  std::mt19937 random_;
  std::vector<Idle> idle_;
  std::vector<std::string> snapshots_;
  bool was_on_disk_ = false;
  int num_answered_ = 0, num_from_disk_ = 0, num_restored_ = 0;
};

class StormTest : public testing::TestWithParam<TinyFamily> {};

TEST_P(StormTest, ForksDeletesAndTurnsThroughAllTiersLeakNothingAndKeepEveryText) {
  constexpr int kThreads = 6, kRounds = 60;
  const TinyModel model({.family = GetParam()});
  const Answers answers = AnswersInPeace(model);
  const TempFolder folder;
  StormServer server(model, 5, folder.File("sessions"));
  SessionClient client(server.channel());
  std::vector<std::string> documents;
  for (size_t document = 0; document < kDocuments; ++document) {
    documents.push_back(client.Create());
    v1::GenerateResponse response;
    ASSERT_TRUE(client.Generate(Turn(documents.back(), Document(document), 8), &response).ok());
    EXPECT_EQ(Ids(response), answers.after_document[document]);
  }
  std::vector<std::unique_ptr<StormClient>> clients;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    clients.push_back(std::make_unique<StormClient>(server.channel(), documents, answers, thread));
    threads.emplace_back([&client = *clients.back()] { client.Run(kRounds); });
  }
  for (std::thread& thread : threads) thread.join();
  int num_answered = 0, num_from_disk = 0, num_restored = 0;
  for (const auto& one : clients) {
    num_answered += one->num_answered();
    num_from_disk += one->num_from_disk();
    num_restored += one->num_restored();
    one->DeleteAll();
  }
  EXPECT_GT(num_answered, kThreads * kRounds / 10);
  EXPECT_GT(num_from_disk, 0);
  EXPECT_GT(num_restored, 0);
  for (const std::string& document : documents) EXPECT_TRUE(client.Delete(document).ok());
  EXPECT_EQ(client.NumSessions(), 0);
  // One that was deleted while it went to the disk is still to be removed from there.
  EXPECT_TRUE(Eventually([&] {
    int64_t num_files = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder.path())) {
      num_files += entry.is_regular_file();
    }
    return num_files == 0;
  }));
  server.ExpectNothingHeldAfterShutdown();
}

INSTANTIATE_TEST_SUITE_P(Families, StormTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama));

}  // namespace
}  // namespace godwit
