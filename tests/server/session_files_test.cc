// The folder of sessions by itself: what it counts, whom it serves, what a start removes.

#include "server/session_files.h"

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::Not;

constexpr int64_t kStateBytes = 256;

StateLayout Layout() {
  return {.components = {{.name = "layers.0.lightning", .base_bytes = kStateBytes, .block = 16}},
          .window_rows = 47,
          .vocab_size = 100,
          .dtype = "f32",
          .model = std::string(64, 'a'),
          .max_position = 1000};
}

StateImage Image(char fill) {
  const std::shared_ptr<char[]> bytes(new char[kStateBytes]);
  std::memset(bytes.get(), fill, kStateBytes);
  return {.position = 5, .last_token = 7, .bytes = bytes, .num_bytes = kStateBytes};
}

char FirstByte(const absl::StatusOr<StateFile>& file) {
  EXPECT_TRUE(file.ok()) << file.status();
  return file.ok() ? file->image->bytes[0] : '\0';
}

class SessionFilesTest : public testing::Test {
 protected:
  std::unique_ptr<SessionFiles> Open(int64_t max_bytes = 1 << 20) const {
    auto files = std::make_unique<SessionFiles>(folder_.File("s"), max_bytes, Layout());
    const absl::Status started = files->Start();
    EXPECT_TRUE(started.ok()) << started;
    return files;
  }
  TempFolder folder_;
};

TEST_F(SessionFilesTest, SnapshotsAreTheirTenantsAndCountedOnce) {
  const auto files = Open();
  EXPECT_EQ(files->used_bytes(), 0);
  const auto first = files->Write("alice", "a", Image(1), {});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->position, 5);
  EXPECT_EQ(files->used_bytes(), first->num_bytes);
  ASSERT_TRUE(files->Write("alice", "a", Image(2), {}).ok());
  EXPECT_EQ(files->used_bytes(), first->num_bytes) << "what was replaced is gone";
  ASSERT_TRUE(files->Write("bob", "a", Image(3), {}).ok());
  EXPECT_EQ(FirstByte(files->Read("alice", "a")), 2);
  EXPECT_EQ(FirstByte(files->Read("bob", "a")), 3);
  EXPECT_TRUE(absl::IsNotFound(files->Read("carol", "a").status()));
  ASSERT_EQ(files->List("bob")->size(), 1u);
  EXPECT_TRUE(files->Delete("bob", "a").ok());
  EXPECT_TRUE(absl::IsNotFound(files->Delete("bob", "a")));
  EXPECT_TRUE(files->List("bob")->empty());
  EXPECT_EQ(files->used_bytes(), first->num_bytes);
  // A later process counts what it finds.
  EXPECT_EQ(Open()->used_bytes(), first->num_bytes);
}

TEST_F(SessionFilesTest, NamesAreNoPaths) {
  const auto files = Open();
  for (const char* name : {"", "../a", "a/b", "x y", "\x01"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(files->Write("t", name, Image(1), {}).status())) << name;
    EXPECT_TRUE(absl::IsInvalidArgument(files->Read("t", name).status())) << name;
    EXPECT_TRUE(absl::IsInvalidArgument(files->Delete("t", name))) << name;
  }
  EXPECT_TRUE(files->Write("t", std::string(64, 'x'), Image(1), {}).ok());
  EXPECT_FALSE(files->Check(std::string(65, 'x')).ok());
}

TEST_F(SessionFilesTest, TheBudgetIsOfAllFilesAndARefusalChangesNothing) {
  const int64_t size = Open()->Write("t", "a", Image(1), {})->num_bytes;
  const auto files = Open(2 * size + kStateBytes / 2);
  auto idle = files->WriteIdle(1, Image(2), {});
  ASSERT_TRUE(idle.ok()) << idle.status();
  EXPECT_EQ(files->free_bytes(), kStateBytes / 2);
  for (const char* name : {"b", "c"}) {
    const absl::Status refused = files->Write("t", name, Image(3), {}).status();
    EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  }
  EXPECT_EQ(files->num_errors(), 2);
  EXPECT_TRUE(files->Write("t", "a", Image(4), {}).ok()) << "in the place of one as large";
  EXPECT_EQ(FirstByte(files->ReadIdle(idle->path, "id")), 2);
  files->Remove(*idle);
  EXPECT_FALSE(fs::exists(idle->path));
  EXPECT_TRUE(files->Write("t", "b", Image(3), {}).ok());
}

TEST_F(SessionFilesTest, AStartRemovesWhatIsNobodys) {
  std::string idle, import, snapshot;
  {
    const auto files = Open();
    idle = files->WriteIdle(1, Image(1), {})->path;
    import = *files->ImportPath();
    EXPECT_NE(*files->ImportPath(), import);
    folder_.Write(fs::relative(import, folder_.path()).string(), "half of it");
    ASSERT_TRUE(files->Write("t", "a", Image(2), {}).ok());
    snapshot = *files->Path("t", "a");
    folder_.Write(fs::relative(snapshot, folder_.path()).string() + ".1.2.tmp", "half of it");
  }
  const auto files = Open();
  EXPECT_FALSE(fs::exists(idle));
  EXPECT_FALSE(fs::exists(import));
  EXPECT_FALSE(fs::exists(snapshot + ".1.2.tmp"));
  EXPECT_EQ(FirstByte(files->Read("t", "a")), 2);
  EXPECT_EQ(files->used_bytes(), static_cast<int64_t>(fs::file_size(snapshot)));
}

TEST_F(SessionFilesTest, AStatusNamesWhatTheClientKnows) {
  const auto files = Open();
  ASSERT_TRUE(files->Write("t", "a", Image(1), {}).ok());
  folder_.Write(fs::relative(*files->Path("t", "a"), folder_.path()).string(), "no snapshot");
  const std::string import = *files->ImportPath();
  folder_.Write(fs::relative(import, folder_.path()).string(), "no snapshot");
  for (const absl::Status& status :
       {files->Read("t", "a").status(), files->ReadImport(import, "a").status()}) {
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("a: "));
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr(folder_.path())));
  }
}

TEST(SessionFilesWithoutFolderTest, RefuseByReason) {
  SessionFiles files("", 1 << 20, Layout());
  EXPECT_TRUE(files.Start().ok());
  EXPECT_FALSE(files.enabled());
  for (const absl::Status& status :
       {files.Check("a"), files.Write("t", "a", Image(1), {}).status(),
        files.Read("t", "a").status(), files.List("t").status(), files.ImportPath().status(),
        files.WriteIdle(1, Image(1), {}).status()}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("--session-dir"));
  }
}

}  // namespace
}  // namespace godwit
