#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "tokenizer/tokenizer.h"

namespace godwit {
namespace {

namespace fs = std::filesystem;

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A folder whose tokenizer.model is `source`, or has the given bytes.
class ModelFolder {
 public:
  ModelFolder() {
    std::string pattern = (fs::temp_directory_path() / "godwit_spm_XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~ModelFolder() { fs::remove_all(path_); }
  void Copy(const fs::path& source) { fs::copy_file(source, path_ / "tokenizer.model"); }
  void Write(const std::string& bytes) {
    std::ofstream(path_ / "tokenizer.model", std::ios::binary) << bytes;
  }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

class SpmTokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    const char* data = std::getenv("GODWIT_TEST_DATA");
    if (data == nullptr) GTEST_SKIP() << "GODWIT_TEST_DATA is not set";
    folder_ = fs::path(data) / "assets" / "tokenizers";
    if (!fs::exists(folder_)) GTEST_SKIP() << folder_ << " does not exist";
  }
  std::unique_ptr<Tokenizer> Load(const char* file) {
    ModelFolder folder;
    folder.Copy(folder_ / file);
    std::string error;
    auto tokenizer = LoadTokenizer(folder.path(), &error);
    EXPECT_EQ(error, "");
    return tokenizer;
  }
  static std::string Concatenate(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
    std::string text;
    for (int32_t id : ids) text += tokenizer.Piece(id);
    return text;
  }
  fs::path folder_;
};

TEST_F(SpmTokenizerTest, EncodesThe46Llama2Vectors) {
  auto tokenizer = Load("llama2-tokenizer.model");
  ASSERT_NE(tokenizer, nullptr);
  const std::string inputs = ReadFile(folder_ / "ggml-vocab-any.gguf.inp");
  std::istringstream expected_lines(ReadFile(folder_ / "ggml-vocab-llama-spm.gguf.out"));
  const std::string separator = "\n__ggml_vocab_test__\n";
  int num_vectors = 0;
  for (size_t at = 0; at < inputs.size(); ++num_vectors) {
    const size_t end = inputs.find(separator, at);
    const std::string text = inputs.substr(at, end - at);
    at = end == std::string::npos ? inputs.size() : end + separator.size();
    std::string line;
    ASSERT_TRUE(std::getline(expected_lines, line)) << "more inputs than outputs";
    std::istringstream numbers(line);
    const std::vector<int32_t> expected(std::istream_iterator<int32_t>(numbers), {});
    EXPECT_EQ(tokenizer->Encode(text), expected) << "input: " << text;
    EXPECT_EQ(tokenizer->Decode(expected), text);
    EXPECT_EQ(Concatenate(*tokenizer, expected), text.empty() ? "" : " " + text);
  }
  EXPECT_EQ(num_vectors, 46);
}

TEST_F(SpmTokenizerTest, KnowsItsSpecialIdsAndPieces) {
  auto tokenizer = Load("llama2-tokenizer.model");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), 32000);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_TRUE(tokenizer->drops_first_space());
  EXPECT_EQ(tokenizer->Piece(1), "");
  EXPECT_EQ(tokenizer->Piece(2), "");
  EXPECT_EQ(tokenizer->Piece(13), "\n");
  EXPECT_EQ(tokenizer->Piece(15043), " Hello");
  EXPECT_EQ(tokenizer->Piece(-1), "");
  EXPECT_EQ(tokenizer->Piece(32000), "");
}

TEST_F(SpmTokenizerTest, PiecesConcatenateToTheDecodedTextOfRandomText) {
  auto tokenizer = Load("tok512.model");
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(20261122);
  const char* parts[] = {"a", " ", "the ", "\n", "é", "世界", "🦆", "'", "Once upon", "0", "\t"};
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (int i = 0; i < 20; ++i) text += parts[random() % std::size(parts)];
    const std::vector<int32_t> ids = tokenizer->Encode(text);
    const std::string pieces = Concatenate(*tokenizer, ids);
    ASSERT_FALSE(pieces.empty());
    ASSERT_EQ(pieces.substr(1), tokenizer->Decode(ids)) << "input: " << text;
  }
}

TEST_F(SpmTokenizerTest, TakesAnyBytes) {
  auto tokenizer = Load("tok512.model");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_TRUE(tokenizer->Encode("").empty());
  EXPECT_FALSE(tokenizer->Encode(std::string_view("\0", 1)).empty());
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::string bytes(random() % 64, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    for (int32_t id : tokenizer->Encode(bytes)) {
      ASSERT_GE(id, 0);
      ASSERT_LT(id, tokenizer->vocab_size());
    }
  }
}

TEST(LoadTokenizerTest, NamesTheMissingFile) {
  std::string error;
  EXPECT_EQ(LoadTokenizer("/nonexistent", &error), nullptr);
  EXPECT_EQ(error, "/nonexistent/tokenizer.model: No such file or directory");
}

TEST(LoadTokenizerTest, RefusesWhatIsNoModel) {
  for (const std::string& bytes :
       {std::string(), std::string("hello"), std::string(4096, '\xff')}) {
    ModelFolder folder;
    folder.Write(bytes);
    std::string error;
    EXPECT_EQ(LoadTokenizer(folder.path(), &error), nullptr);
    EXPECT_NE(error.find("tokenizer.model"), std::string::npos) << error;
  }
}

TEST_F(SpmTokenizerTest, RefusesOrLoadsTruncatedModelsWithoutCrashing) {
  const std::string whole = ReadFile(folder_ / "tok512.model");
  for (size_t size = 0; size < whole.size(); size += whole.size() / 40 + 1) {
    ModelFolder folder;
    folder.Write(whole.substr(0, size));
    std::string error;
    auto tokenizer = LoadTokenizer(folder.path(), &error);
    EXPECT_EQ(tokenizer == nullptr, !error.empty());
  }
}

}  // namespace
}  // namespace godwit
