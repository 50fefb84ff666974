// Sessions over the real engine, without gRPC: states go from the device to host memory to the disk
// and come back with the same bits, time and deletion free all they hold, a disk that fails loses
// nothing, and many threads of several tenants leave nothing behind.

#include "server/session_registry.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kSlots = 3;
constexpr int64_t kAnswerTokens = 6;
constexpr char kTenant[] = "tenant";

// No sleep for a time, but until `condition` holds; false after 60 s.
template <typename Condition>
bool Eventually(const Condition& condition) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

int64_t NumFiles(const std::string& folder) {
  int64_t count = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    count += entry.is_regular_file();
  }
  return count;
}

using Ids = std::vector<int32_t>;

// Engine, loop and registry as the server puts them together.
class Sessions {
 public:
  Sessions(const TinyModel& model, SessionLimits limits, int64_t store_bytes)
      : engine_(MakeEngine(model, {.dtype = DType::kF32,
                                   .max_sequences = kSlots,
                                   .max_tokens_per_step = 256,
                                   .kv_bytes = 4 << 20,
                                   .store_bytes = store_bytes})),
        model_("tiny", engine_->card(), nullptr, {}),
        loop_({.scheduler = {.max_tokens_per_step = 256,
                             .max_wait = 600'000'000'000,
                             .context_length = 2048,
                             .may_drop_sessions = false}},
              *engine_, engine_->caches()),
        registry_(std::move(limits), MakeStateLayout(engine_->card(), FingerprintText("tiny"), ""),
                  loop_, model_) {
    const absl::Status started = registry_.Start();
    EXPECT_TRUE(started.ok()) << started;
  }

  SessionRegistry& registry() { return registry_; }
  SchedulerStats stats() const { return loop_.stats(); }

  // One turn: what is drawn after these tokens, greedily. The session keeps it. `ended` is called
  // while the session is still the turn's.
  absl::StatusOr<Ids> Turn(const std::string& tenant, const std::string& id, const Ids& input,
                           const std::function<void(int64_t, const Ids&)>& ended = {}) {
    ASSIGN_OR_RETURN(const std::shared_ptr<SessionUse> use,
                     registry_.Acquire(tenant, id, std::nullopt));
    if (use->position() == 0) {
      use->FixRope(nullptr,
                   {.rope_digest = engine_->card().rope_regime.ToString(), .rope_length = 1000});
    }
    GenerateRequest request;
    if (use->pending_token() >= 0) request.token_ids.push_back(use->pending_token());
    request.token_ids.insert(request.token_ids.end(), input.begin(), input.end());
    request.sampling.temperature = 0;
    request.max_tokens = kAnswerTokens;
    request.session = use->position() > 0 ? use->key() : 0;
    request.start_position = use->position();
    request.keep_as = use->key();
    Ids answer;
    ASSIGN_OR_RETURN(const TokenEvent done, Run(std::move(request), answer));
    use->Kept(done.kept_position, done.kept_token);
    if (ended) ended(done.kept_position, answer);
    return answer;
  }
  Ids Turn(const std::string& id, const Ids& input) {
    const absl::StatusOr<Ids> answer = Turn(kTenant, id, input);
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer.ok() ? *answer : Ids();
  }

  // By name, as of the tenant of these tests.
  std::string Create() { return registry_.CreateSession(kTenant, std::nullopt)->id; }
  absl::Status Save(const std::string& tenant, const std::string& id, const std::string& name) {
    ASSIGN_OR_RETURN(const auto use, registry_.Acquire(tenant, id, std::nullopt));
    return registry_.Snapshot(*use, tenant, name).status();
  }
  std::vector<bool> OnDisk(const std::vector<std::string>& ids) {
    std::vector<bool> on_disk;
    for (const std::string& id : ids) on_disk.push_back(registry_.Get(kTenant, id)->on_disk);
    return on_disk;
  }

  // Nothing runs, and no session, slot, block, byte or file is held.
  bool HoldsNothing() {
    return Eventually([this] {
      const SchedulerStats stats = loop_.stats();
      const SessionDiskStats disk = registry_.stats();
      return disk.num_sessions == 0 && disk.num_on_disk == 0 && disk.disk_bytes == 0 &&
             stats.slots_used == 0 && stats.blocks_used == 0 && stats.num_running == 0 &&
             stats.sessions.num_sessions == 0 && stats.sessions.store_bytes_used == 0;
    });
  }
  void Stop() { loop_.Stop(); }
  CacheManager& caches() { return engine_->caches(); }  // after Stop

 private:
  absl::StatusOr<TokenEvent> Run(GenerateRequest request, Ids& answer) {
    struct Signal {
      std::mutex mutex;
      std::condition_variable changed;
      bool set = false;
    };
    const auto signal = std::make_shared<Signal>();
    const auto stream = std::make_shared<TokenStream>([signal] {
      std::lock_guard<std::mutex> lock(signal->mutex);
      signal->set = true;
      signal->changed.notify_one();
    });
    request.stream = stream;
    RETURN_IF_ERROR(loop_.Submit(std::move(request)));
    while (true) {
      {
        std::unique_lock<std::mutex> lock(signal->mutex);
        signal->changed.wait(lock, [&] { return std::exchange(signal->set, false); });
      }
      for (TokenEvent& event : stream->Drain()) {
        for (const SampledToken& token : event.tokens) answer.push_back(token.token_id);
        if (event.kind != TokenEvent::Kind::kDone) continue;
        RETURN_IF_ERROR(event.status);
        return std::move(event);
      }
    }
  }

  std::unique_ptr<Engine> engine_;
  ServedModel model_;
  EngineLoop loop_;
  SessionRegistry registry_;
};

class SessionRegistryTest : public testing::TestWithParam<TinyFamily> {
 protected:
  SessionRegistryTest() : model_({.family = GetParam()}) {}

  SessionLimits Limits() const { return {.folder = folder_.File("sessions")}; }
  // Host memory for so many states of a first turn.
  int64_t StoreFor(int64_t num_states) const {
    const auto engine =
        MakeEngine(model_, {.dtype = DType::kF32, .max_sequences = kSlots, .kv_bytes = 4 << 20});
    return num_states * engine->caches().StateBytes(kPromptTokens + kAnswerTokens);
  }
  Ids Prompt(int64_t index) const {
    return RandomTokens(static_cast<uint64_t>(index) + 1, kPromptTokens,
                        model_.options().vocab_size);
  }
  // Sessions of a first turn each; what they answered is added to `first`.
  std::vector<std::string> Fill(Sessions& sessions, int64_t count) const {
    std::vector<std::string> ids;
    for (int64_t index = 0; index < count; ++index) {
      ids.push_back(sessions.Create());
      const absl::Status status = sessions.Turn(kTenant, ids.back(), Prompt(index)).status();
      EXPECT_TRUE(status.ok()) << status;
    }
    return ids;
  }
  // What each of them answers in its second turn, with room for all on the device or the host.
  std::vector<Ids> SecondTurns(int64_t count) const {
    Sessions sessions(model_, {}, 64 << 20);
    std::vector<Ids> answers;
    for (const std::string& id : Fill(sessions, count)) {
      answers.push_back(sessions.Turn(id, {4, 5, 6}));
    }
    EXPECT_EQ(std::set<Ids>(answers.begin(), answers.end()).size(), answers.size());
    return answers;
  }
  void ExpectSecondTurns(Sessions& sessions, const std::vector<std::string>& ids) const {
    const std::vector<Ids> expected = SecondTurns(std::ssize(ids));
    for (size_t index = 0; index < ids.size(); ++index) {
      const absl::StatusOr<Ids> answer = sessions.Turn(kTenant, ids[index], {4, 5, 6});
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_EQ(*answer, expected[index]) << index;
    }
  }

  static constexpr int64_t kPromptTokens = 37;
  TinyModel model_;
  TempFolder folder_;
};

TEST_P(SessionRegistryTest, StatesGoThroughAllTiersOldestFirstAndComeBackEqual) {
  constexpr int64_t kCount = 12;
  Sessions sessions(model_, Limits(), StoreFor(5));
  const std::vector<std::string> ids = Fill(sessions, kCount);
  // Three on the device, at most three quarters of five in host memory.
  ASSERT_TRUE(Eventually([&] { return sessions.registry().stats().num_on_disk >= kCount - 6; }));
  const SessionDiskStats disk = sessions.registry().stats();
  const SessionStats memory = sessions.stats().sessions;
  EXPECT_EQ(disk.num_to_disk, disk.num_on_disk);
  EXPECT_EQ(disk.num_from_disk, 0);
  EXPECT_GT(disk.disk_bytes, 0);
  EXPECT_EQ(NumFiles(folder_.File("sessions")), disk.num_on_disk);
  EXPECT_GE(memory.num_to_host, disk.num_on_disk);
  EXPECT_EQ(memory.num_kept, kCount);
  EXPECT_EQ(memory.num_dropped, 0);
  // Those used longest ago lie on the disk.
  const std::vector<bool> on_disk = sessions.OnDisk(ids);
  EXPECT_TRUE(std::is_sorted(on_disk.begin(), on_disk.end(), std::greater<>()));
  ExpectSecondTurns(sessions, ids);
  EXPECT_GE(sessions.registry().stats().num_from_disk, disk.num_on_disk);
  EXPECT_GT(sessions.stats().sessions.num_from_host, 0);
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
  for (const std::string& id : ids) EXPECT_TRUE(sessions.registry().Delete(kTenant, id).ok());
  EXPECT_TRUE(sessions.HoldsNothing());
  // One that was deleted while it went to the disk is still to be removed from there.
  EXPECT_TRUE(Eventually([&] { return NumFiles(folder_.File("sessions")) == 0; }));
}

// Host memory is far from full, and yet a state has no room: the disk takes another at once.
TEST_P(SessionRegistryTest, AStateLargerThanTheRestOfHostMemorySendsAnotherToDisk) {
  Sessions sessions(model_, Limits(), StoreFor(19) / 10);
  {
    const std::string id = sessions.Create();
    sessions.Turn(id, Prompt(0));
    ASSERT_TRUE(sessions.Save(kTenant, id, "a").ok());
    ASSERT_TRUE(sessions.registry().Delete(kTenant, id).ok());
  }
  std::vector<std::string> ids;
  for (int index = 0; index < 3; ++index) {
    const auto restored = sessions.registry().Restore(kTenant, "a", std::nullopt);
    ASSERT_TRUE(restored.ok()) << restored.status();
    ids.push_back(restored->id);
  }
  EXPECT_EQ(sessions.OnDisk(ids), (std::vector<bool>{true, true, false}));
  const Ids expected = SecondTurns(1).front();
  for (const std::string& id : ids) {
    const absl::StatusOr<Ids> answer = sessions.Turn(kTenant, id, {4, 5, 6});
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_EQ(*answer, expected);
  }
  EXPECT_EQ(sessions.registry().stats().num_disk_errors, 0);
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
}

// The same for a state on the device that is saved: its copy needs the room for a moment.
TEST_P(SessionRegistryTest, ASaveFromTheDeviceSendsAnotherToDisk) {
  Sessions sessions(model_, Limits(), StoreFor(19) / 10);
  const std::string first = sessions.Create();
  sessions.Turn(first, Prompt(0));
  ASSERT_TRUE(sessions.Save(kTenant, first, "a").ok());
  const auto in_host = sessions.registry().Restore(kTenant, "a", std::nullopt);
  ASSERT_TRUE(in_host.ok()) << in_host.status();
  EXPECT_EQ(sessions.OnDisk({in_host->id}), std::vector<bool>{false});
  const absl::Status saved = sessions.Save(kTenant, first, "b");
  ASSERT_TRUE(saved.ok()) << saved;
  EXPECT_EQ(sessions.OnDisk({in_host->id, first}), (std::vector<bool>{true, false}));
  const auto restored = sessions.registry().Restore(kTenant, "b", std::nullopt);
  ASSERT_TRUE(restored.ok()) << restored.status();
  const Ids expected = SecondTurns(1).front();
  for (const std::string& id : {in_host->id, first, restored->id}) {
    EXPECT_EQ(sessions.Turn(id, {4, 5, 6}), expected);
  }
  EXPECT_EQ(sessions.registry().stats().num_disk_errors, 0);
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
}

// And for one that has to leave the device so that a request can run.
TEST_P(SessionRegistryTest, ARequestWaitsUntilAStateOfTheDeviceHasRoom) {
  Sessions sessions(model_, Limits(), StoreFor(28) / 10);
  const std::vector<std::string> ids = Fill(sessions, kSlots);
  ASSERT_TRUE(sessions.Save(kTenant, ids[0], "a").ok());
  std::vector<std::string> in_host;
  for (int copy = 0; copy < 2; ++copy) {
    const auto restored = sessions.registry().Restore(kTenant, "a", std::nullopt);
    ASSERT_TRUE(restored.ok()) << restored.status();
    in_host.push_back(restored->id);
  }
  EXPECT_EQ(sessions.OnDisk(in_host), (std::vector<bool>{false, false}));
  const std::string next = sessions.Create();
  const absl::StatusOr<Ids> answer = sessions.Turn(kTenant, next, Prompt(kSlots));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(sessions.OnDisk(in_host)[0]);
  std::vector<std::string> all = ids;
  all.push_back(next);
  ExpectSecondTurns(sessions, all);
  EXPECT_EQ(sessions.registry().stats().num_disk_errors, 0);
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
}

TEST_P(SessionRegistryTest, AnIdleSessionExpiresInEveryTierAndABusyOneDoesNot) {
  SessionLimits limits = Limits();
  limits.ttl_ms = 3000;
  Sessions sessions(model_, limits, StoreFor(4));
  const std::vector<std::string> ids = Fill(sessions, 9);
  ASSERT_TRUE(Eventually([&] { return sessions.registry().stats().num_to_disk >= 3; }));
  std::string writer;
  {
    auto created = sessions.registry().CreateSession(kTenant, std::nullopt);
    ASSERT_TRUE(created.ok());
    writer = created->id;
    const auto use = sessions.registry().Acquire(kTenant, writer, std::nullopt);
    ASSERT_TRUE(use.ok());
    EXPECT_TRUE(Eventually([&] { return sessions.registry().stats().num_sessions == 1; }));
    EXPECT_EQ(sessions.registry().stats().num_expired, 9);
    EXPECT_TRUE(sessions.registry().Get(kTenant, writer)->busy);
    for (const std::string& id : ids) {
      EXPECT_TRUE(absl::IsNotFound(sessions.Turn(kTenant, id, {1}).status()));
    }
  }
  EXPECT_TRUE(sessions.HoldsNothing());
  EXPECT_EQ(sessions.registry().stats().num_expired, 10);
  // One that was deleted while it went to the disk is still to be removed from there.
  EXPECT_TRUE(Eventually([&] { return NumFiles(folder_.File("sessions")) == 0; }));
}

// The disk's budget is spent: what is in memory stays there, and whoever needs more is told.
TEST_P(SessionRegistryTest, AFullDiskLosesNothing) {
  SessionLimits limits = Limits();
  limits.disk_bytes = 100;
  Sessions sessions(model_, limits, StoreFor(4));
  const std::vector<std::string> ids = Fill(sessions, kSlots + 4);
  const absl::Status saved = sessions.Save(kTenant, ids[0], "a");
  EXPECT_TRUE(absl::IsResourceExhausted(saved)) << saved;
  EXPECT_THAT(std::string(saved.message()), testing::HasSubstr("of 100 are free"));
  EXPECT_TRUE(Eventually([&] { return sessions.registry().stats().num_disk_errors > 0; }));
  EXPECT_EQ(sessions.registry().stats().num_on_disk, 0);
  EXPECT_EQ(sessions.registry().stats().disk_bytes, 0);
  // One that was deleted while it went to the disk is still to be removed from there.
  EXPECT_TRUE(Eventually([&] { return NumFiles(folder_.File("sessions")) == 0; }));
  // Device and host fill up; then a new session is refused and all others stand.
  std::vector<std::string> all = ids;
  absl::Status refused;
  for (int64_t index = std::ssize(ids); index < 20 && refused.ok(); ++index) {
    const std::string id = sessions.Create();
    refused = sessions.Turn(kTenant, id, Prompt(index)).status();
    if (refused.ok()) all.push_back(id);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
  // Some go, so that the others' turns have room to run in.
  for (; all.size() > kSlots; all.pop_back()) {
    ASSERT_TRUE(sessions.registry().Delete(kTenant, all.back()).ok());
  }
  ExpectSecondTurns(sessions, all);
}

// The files of the process may not grow beyond a size, as on a file system that is full.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t num_bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit = {.rlim_cur = num_bytes, .rlim_max = before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_ = {};
};

TEST_P(SessionRegistryTest, AWriteThatFailsHalfwayLeavesTheOldSnapshotAndNoFile) {
  Sessions sessions(model_, Limits(), StoreFor(4));
  const std::vector<std::string> ids = Fill(sessions, 2);
  ASSERT_TRUE(sessions.Save(kTenant, ids[0], "a").ok());
  const int64_t disk_bytes = sessions.registry().stats().disk_bytes;
  {
    const FileSizeLimit limit(8192);
    const absl::Status saved = sessions.Save(kTenant, ids[1], "a");
    EXPECT_FALSE(saved.ok());
    EXPECT_THAT(std::string(saved.message()), testing::HasSubstr("File too large"));
    EXPECT_THAT(std::string(saved.message()), testing::Not(testing::HasSubstr(folder_.path())));
    // Idle ones that have to go to the disk stay in memory.
    const std::vector<std::string> others = Fill(sessions, kSlots + 2);
    EXPECT_TRUE(Eventually([&] { return sessions.registry().stats().num_disk_errors > 0; }));
    EXPECT_EQ(sessions.registry().stats().num_on_disk, 0);
    for (const std::string& id : others) EXPECT_TRUE(sessions.registry().Delete(kTenant, id).ok());
  }
  EXPECT_EQ(sessions.registry().stats().disk_bytes, disk_bytes);
  const auto restored = sessions.registry().Restore(kTenant, "a", std::nullopt);
  ASSERT_TRUE(restored.ok()) << restored.status();
  ExpectSecondTurns(sessions, {restored->id, ids[1]});
}

TEST_P(SessionRegistryTest, AFolderThatCannotBeWrittenIsNamedAtStartAndLaterLosesNothing) {
  const std::string file = folder_.Write("file", "");
  const auto engine = MakeEngine(model_, {.max_sequences = 2, .kv_bytes = 4 << 20});
  const ServedModel served("tiny", engine->card(), nullptr, {});
  EngineLoop loop({.scheduler = {.context_length = 2048}}, *engine, engine->caches());
  SessionRegistry registry({.folder = file + "/sessions"}, MakeStateLayout(engine->card(), "", ""),
                           loop, served);
  const absl::Status started = registry.Start();
  EXPECT_TRUE(absl::IsInvalidArgument(started)) << started;
  EXPECT_THAT(std::string(started.message()), testing::HasSubstr(file + "/sessions"));

  Sessions sessions(model_, Limits(), StoreFor(4));
  const std::vector<std::string> ids = Fill(sessions, 2);
  for (const char* name : {"/sessions/idle", "/sessions/snapshots"}) {
    fs::remove_all(folder_.path() + name);
    std::ofstream(folder_.path() + name) << "in the way";
  }
  const absl::Status saved = sessions.Save(kTenant, ids[0], "a");
  EXPECT_FALSE(saved.ok());
  EXPECT_THAT(std::string(saved.message()), testing::HasSubstr("Not a directory"));
  EXPECT_THAT(std::string(saved.message()), testing::Not(testing::HasSubstr(folder_.path())));
  const std::vector<std::string> others = Fill(sessions, kSlots + 2);
  EXPECT_TRUE(Eventually([&] { return sessions.registry().stats().num_disk_errors > 0; }));
  for (const std::string& id : others) EXPECT_TRUE(sessions.registry().Delete(kTenant, id).ok());
  ExpectSecondTurns(sessions, ids);
}

// --- Many threads

// What a session was told and answered, up to each position that it stood at.
struct Exchange {
  int64_t position = 0;
  Ids input, answer;
};
using History = std::vector<Exchange>;

class Storm {
 public:
  Storm(Sessions& sessions, int num_tenants) : sessions_(sessions), tenants_(num_tenants) {}

  void Run(int thread, int num_rounds) {
    std::mt19937 random(static_cast<uint32_t>(thread) + 1);
    for (int round = 0; round < num_rounds; ++round) {
      const size_t tenant = random() % tenants_.size();
      const std::string name = Name(tenant);
      SessionRegistry& registry = sessions_.registry();
      switch (random() % 12) {
        case 0:
        case 5:
          if (const auto created = registry.CreateSession(name, std::nullopt); Check(created)) {
            Add(tenant, created->id, {});
          }
          break;
        case 1:
          Fork(tenant, Pick(tenant, random()));
          break;
        case 2:
        case 6:
          Delete(tenant, Pick(tenant, random()));
          break;
        case 3:
          Save(tenant, Pick(tenant, random()), absl::StrCat("s", thread, "-", round));
          break;
        case 4:
          Strangers(tenant, Pick(tenant, random()));
          break;
        default:
          Turn(tenant, Pick(tenant, random()), static_cast<int32_t>(random() % 200));
      }
    }
  }

  // Another engine, with one session and turn at a time, gives the same answers.
  void ExpectEqualInPeace(const TinyModel& model, size_t num_compared) {
    Sessions peace(model, {}, 64 << 20);
    for (const Tenant& tenant : tenants_) {
      size_t left = num_compared;
      for (const auto& [id, history] : tenant.histories) {
        if (history.size() < 2 || left == 0) continue;
        --left;
        const std::string session = peace.Create();
        for (const Exchange& exchange : history) {
          EXPECT_EQ(peace.Turn(session, exchange.input), exchange.answer) << id;
        }
        EXPECT_TRUE(peace.registry().Delete(kTenant, session).ok());
      }
      EXPECT_LT(left, num_compared);
    }
  }

  void DeleteAll() {
    for (size_t tenant = 0; tenant < tenants_.size(); ++tenant) {
      SessionRegistry& registry = sessions_.registry();
      const std::string name = Name(tenant);
      for (const SessionView& session : registry.List(name)) {
        EXPECT_TRUE(registry.Delete(name, session.id).ok());
      }
      const auto snapshots = registry.files().List(name);
      ASSERT_TRUE(snapshots.ok());
      for (const auto& snapshot : *snapshots) {
        EXPECT_TRUE(registry.files().Delete(name, snapshot.name).ok());
      }
    }
  }

  int64_t num_done() const { return num_done_; }
  const std::vector<std::string>& errors() const { return errors_; }

 private:
  struct Tenant {
    std::vector<std::string> ids;
    std::map<std::string, History> histories;  // of deleted ones too
  };

  static std::string Name(size_t tenant) { return absl::StrCat("tenant ", tenant); }

  // What a race may lead to: gone, in use, or no room.
  template <typename T>
  bool Check(const absl::StatusOr<T>& result) {
    return Check(result.status());
  }
  bool Check(const absl::Status& status) {
    if (status.ok()) {
      ++num_done_;
    } else if (!absl::IsNotFound(status) && !absl::IsAborted(status) &&
               !absl::IsResourceExhausted(status) && !absl::IsFailedPrecondition(status)) {
      std::lock_guard<std::mutex> lock(mutex_);
      errors_.push_back(status.ToString());
    }
    return status.ok();
  }

  std::string Pick(size_t tenant, size_t index) {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<std::string>& ids = tenants_[tenant].ids;
    return ids.empty() ? "none" : ids[ids.size() - 1 - index % std::min<size_t>(ids.size(), 8)];
  }
  void Add(size_t tenant, const std::string& id, History history) {
    std::lock_guard<std::mutex> lock(mutex_);
    tenants_[tenant].ids.push_back(id);
    tenants_[tenant].histories[id] = std::move(history);
  }
  History UpTo(size_t tenant, const std::string& id, int64_t position) {
    std::lock_guard<std::mutex> lock(mutex_);
    History history = tenants_[tenant].histories[id];
    std::erase_if(history, [&](const Exchange& e) { return e.position > position; });
    return history;
  }

  void Turn(size_t tenant, const std::string& id, int32_t first) {
    const Ids input = {first + 3, first + 4, 5};
    Check(sessions_.Turn(Name(tenant), id, input, [&](int64_t position, const Ids& answer) {
      std::lock_guard<std::mutex> lock(mutex_);
      tenants_[tenant].histories[id].push_back({position, input, answer});
    }));
  }

  void Delete(size_t tenant, const std::string& id) {
    if (!Check(sessions_.registry().Delete(Name(tenant), id))) return;
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase(tenants_[tenant].ids, id);
  }

  void Fork(size_t tenant, const std::string& id) {
    const auto fork = sessions_.registry().Fork(Name(tenant), id, std::nullopt, std::nullopt);
    if (Check(fork)) Add(tenant, fork->id, UpTo(tenant, id, fork->position));
  }

  // Saved, and restored as another session.
  void Save(size_t tenant, const std::string& id, const std::string& name) {
    if (!Check(sessions_.Save(Name(tenant), id, name))) return;
    const auto restored = sessions_.registry().Restore(Name(tenant), name, std::nullopt);
    if (Check(restored)) Add(tenant, restored->id, UpTo(tenant, id, restored->position));
    if (name.back() % 2 == 0) {
      Check(sessions_.registry().files().Delete(Name(tenant), name));
    }
  }

  void Strangers(size_t tenant, const std::string& id) {
    const std::string other = Name((tenant + 1) % tenants_.size());
    SessionRegistry& registry = sessions_.registry();
    const bool all_not_found =
        absl::IsNotFound(registry.Get(other, id).status()) &&
        absl::IsNotFound(registry.Delete(other, id)) &&
        absl::IsNotFound(registry.Fork(other, id, std::nullopt, std::nullopt).status()) &&
        absl::IsNotFound(registry.Acquire(other, id, std::nullopt).status());
    std::lock_guard<std::mutex> lock(mutex_);
    if (!all_not_found) errors_.push_back("another tenant's session was found");
  }

  Sessions& sessions_;
  std::atomic<int64_t> num_done_{0};
  std::mutex mutex_;  // guards the rest
  std::vector<Tenant> tenants_;
  std::vector<std::string> errors_;
};

TEST_P(SessionRegistryTest, ThreadsOfSeveralTenantsLeaveNothingBehind) {
  constexpr int kNumThreads = 6, kNumRounds = 200;
  const int64_t store_bytes = StoreFor(12);
  Sessions sessions(model_, Limits(), store_bytes);
  Storm storm(sessions, 3);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kNumThreads; ++thread) {
    threads.emplace_back([&, thread] { storm.Run(thread, kNumRounds); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : storm.errors()) ADD_FAILURE() << error;
  EXPECT_GT(storm.num_done(), kNumThreads * kNumRounds / 10);
  EXPECT_GT(sessions.registry().stats().num_to_disk, 0);
  EXPECT_GT(sessions.registry().stats().num_from_disk, 0);
  EXPECT_EQ(sessions.stats().sessions.num_dropped, 0);
  storm.ExpectEqualInPeace(model_, 4);
  storm.DeleteAll();
  EXPECT_TRUE(sessions.HoldsNothing());
  // One that was deleted while it went to the disk is still to be removed from there.
  EXPECT_TRUE(Eventually([&] { return NumFiles(folder_.File("sessions")) == 0; }));
  sessions.Stop();
  EXPECT_EQ(sessions.caches().free_slots(), kSlots);
  EXPECT_EQ(sessions.caches().free_blocks(), sessions.caches().geometry().num_blocks);
  EXPECT_EQ(sessions.caches().free_store_bytes(), store_bytes);
}

INSTANTIATE_TEST_SUITE_P(Families, SessionRegistryTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                         [](const testing::TestParamInfo<TinyFamily>& info) {
                           return info.param == TinyFamily::kLlama ? "Llama" : "Transnormer";
                         });

}  // namespace
}  // namespace godwit
