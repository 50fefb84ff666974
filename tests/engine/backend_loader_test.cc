#include "engine/backend_loader.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using absl::StatusCode;

const std::string kPlugins = FAKE_PLUGINS;  // folder with one folder for each kind of plugin

TEST(BackendLoaderTest, CpuNeedsNoPlugin) {
  std::string why = "unchanged";
  const auto backend =
      CreateBackend({.name = "cpu", .num_threads = 1, .plugin_folder = "/nonexistent"}, &why);
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_STREQ((*backend)->Info().name, "cpu");
  EXPECT_EQ(why, "");
}

TEST(BackendLoaderTest, AutoUsesThePluginThatWorks) {
  std::string why = "unchanged";
  const auto backend = CreateBackend({.plugin_folder = kPlugins + "/working"}, &why);
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_STRNE((*backend)->Info().name, "cpu");
  EXPECT_EQ(why, "");
}

TEST(BackendLoaderTest, CudaUsesThePluginThatWorks) {
  std::string why;
  EXPECT_TRUE(CreateBackend({.name = "cuda", .plugin_folder = kPlugins + "/working"}, &why).ok());
}

struct Case {
  std::string folder;
  std::string why;  // part of it
};

TEST(BackendLoaderTest, AutoFallsBackAndSaysWhyInOneLine) {
  const TempFolder broken;
  broken.Write("libgodwit_cuda.so", "not a library");
  for (const Case& c : {Case{"/nonexistent", "no CUDA plugin at /nonexistent/libgodwit_cuda.so"},
                        Case{kPlugins + "/refusing", "no device: asked twice"},
                        Case{kPlugins + "/empty", "has no function godwit_backend_v1"},
                        Case{broken.path(), "CUDA plugin: "}}) {
    std::string why;
    const auto backend = CreateBackend({.num_threads = 1, .plugin_folder = c.folder}, &why);
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_STREQ((*backend)->Info().name, "cpu");
    EXPECT_NE(why.find(c.why), std::string::npos) << why;
    EXPECT_EQ(why.find('\n'), std::string::npos) << why;
  }
}

TEST(BackendLoaderTest, CudaWithoutOneFailsWithTheReason) {
  std::string why;
  const auto backend =
      CreateBackend({.name = "cuda", .plugin_folder = kPlugins + "/refusing"}, &why);
  EXPECT_EQ(backend.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(backend.status().message().find("no device: asked twice"), std::string::npos)
      << backend.status();
}

TEST(BackendLoaderTest, LooksBesideTheExecutable) {
  std::string why;
  const auto backend = CreateBackend({.name = "cuda"}, &why);
  const std::string folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  EXPECT_EQ(backend.status().message(), "no CUDA plugin at " + folder + "/libgodwit_cuda.so");
}

TEST(BackendLoaderTest, UnknownNamesAreRefused) {
  std::string why;
  for (const char* name : {"", "gpu", "CPU"}) {
    EXPECT_EQ(CreateBackend({.name = name}, &why).status().code(), StatusCode::kInvalidArgument)
        << name;
  }
}

}  // namespace
}  // namespace godwit
