#include "cli/eval_tasks.h"

#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/svg_chart.h"
#include "gtest/gtest.h"

namespace godwit::cli {
namespace {

TEST(EvalTasksTest, IntegersOfAnAnswer) {
  EXPECT_EQ(FirstInteger("The number is <2416>, not 17."), "2416");
  EXPECT_EQ(LastInteger("The number is <2416>, not 17."), "17");
  EXPECT_EQ(FirstInteger("48213"), "48213");
  EXPECT_EQ(LastInteger("48213"), "48213");
  EXPECT_EQ(FirstInteger("no number"), "");
  EXPECT_EQ(LastInteger("no number"), "");
  EXPECT_EQ(LastInteger(""), "");
  EXPECT_EQ(LastInteger("line 7: 3 1"), "1");
}

TEST(EvalTasksTest, LineRecallCountsLinesOfTheLabel) {
  const std::string label = "On the peak,\nPenguins dance.\n\n  Wearing black\nThe end.";
  EXPECT_EQ(LineRecall(absl::StrCat("Sure! ", label), label), 1);
  EXPECT_EQ(LineRecall("Penguins dance.", label), 0.25);
  EXPECT_EQ(LineRecall("", label), 0);
  EXPECT_EQ(LineRecall("anything", ""), 0);
}

// The line of the record that holds the answer, found as a reader would.
std::string NumberOf(const std::string& prompt) {
  const std::string asked = "Tell me what is the <REGISTER_CONTENT> in line ";
  const size_t begin = prompt.find(asked) + asked.size();
  const std::string name = prompt.substr(begin, prompt.find('?', begin) - begin);
  const std::string line = absl::StrCat("\nline ", name, ": REGISTER_CONTENT is <");
  const size_t at = prompt.find(line);
  EXPECT_NE(at, std::string::npos) << name;
  return FirstInteger(prompt.substr(at + line.size()));
}

TEST(EvalTasksTest, RecordsHoldTheirAnswer) {
  for (const int64_t num_lines : {1, 3, 600, 2000}) {
    const std::vector<EvalCase> cases = MakeLines(num_lines, 4, 7);
    ASSERT_EQ(cases.size(), 4u);
    std::set<std::string> prompts;
    for (const EvalCase& made : cases) {
      EXPECT_EQ(NumberOf(made.prompt), made.expected);
      EXPECT_EQ(made.bucket, num_lines);
      prompts.insert(made.prompt);
    }
    EXPECT_EQ(prompts.size(), 4u);
    EXPECT_EQ(MakeLines(num_lines, 4, 7)[3].prompt, cases[3].prompt) << "by its seed";
    EXPECT_NE(MakeLines(num_lines, 4, 8)[3].prompt, cases[3].prompt);
  }
}

TEST(EvalTasksTest, LongChatFilesAreRead) {
  const char* data = std::getenv("GODWIT_TEST_DATA");
  if (data == nullptr) GTEST_SKIP() << "GODWIT_TEST_DATA is not set";
  const auto cases = ReadLines(absl::StrCat(data, "/assets/evals/longchat-lines-200.jsonl"));
  ASSERT_TRUE(cases.ok()) << cases.status();
  ASSERT_EQ(cases->size(), 50u);
  EXPECT_EQ((*cases)[0].expected, "2416");
  for (const EvalCase& found : *cases) {
    EXPECT_EQ(NumberOf(found.prompt), found.expected);
    EXPECT_EQ(found.bucket, 200);
  }
  const auto rounds = ReadMultiRound(absl::StrCat(data, "/assets/evals/mr-niah-en-2048.jsonl"));
  ASSERT_TRUE(rounds.ok()) << rounds.status();
  ASSERT_EQ(rounds->size(), 30u);
  EXPECT_EQ(LineRecall((*rounds)[0].prompt, (*rounds)[0].expected), 1) << "the poem is there";
}

TEST(EvalTasksTest, OtherFilesAreRefusedByLine) {
  const std::string path = absl::StrCat(testing::TempDir(), "/cases.jsonl");
  std::ofstream(path) << R"({"prompt":"a","expected_number":1,"num_lines":1})"
                      << "\n\n{\"prompt\":3}\n";
  const auto cases = ReadLines(path);
  EXPECT_EQ(cases.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(cases.status().message().find("line 3"), std::string::npos) << cases.status();
  std::ofstream(path, std::ios::trunc) << "\n";
  EXPECT_FALSE(ReadLines(path).ok());
  EXPECT_FALSE(ReadMultiRound(path).ok());
  EXPECT_EQ(ReadLines("/no/such/file").status().code(), absl::StatusCode::kNotFound);
}

TEST(EvalTasksTest, NeedlesLieAtEvenDepths) {
  const std::vector<EvalCase> cases = MakePasskey(20'000, 5, 1);
  for (size_t sample = 0; sample < cases.size(); ++sample) {
    EXPECT_EQ(cases[sample].depth, static_cast<double>(sample) / 4);
    const size_t at = cases[sample].prompt.find("The pass key is " + cases[sample].expected);
    ASSERT_NE(at, std::string::npos);
    EXPECT_NEAR(static_cast<double>(at), cases[sample].depth * 20'000, 300);
  }
  const std::vector<EvalCase> needles = MakeNeedle("It rained. The end came. ", 5'000, 3, 1);
  for (const EvalCase& made : needles)
    EXPECT_NE(made.prompt.find("is " + made.expected + ". "), std::string::npos);
}

TEST(EvalTasksTest, TheVicunaConversation) {
  EXPECT_TRUE(VicunaPrompt("x").starts_with("A chat between a curious user"));
  EXPECT_TRUE(VicunaPrompt("x").ends_with("USER: x ASSISTANT:"));
}

TEST(SvgChartTest, DrawsEverySeriesAndEscapes) {
  const std::string svg = ToSvg({.title = "a < b & c",
                                 .x_label = "tokens",
                                 .y_label = "share",
                                 .series = {{"one", {256, 1024}, {1, 0.5}}, {"two", {512}, {0}}}});
  EXPECT_NE(svg.find("a &lt; b &amp; c"), std::string::npos);
  size_t circles = 0;
  for (size_t at = svg.find("<circle"); at != std::string::npos; at = svg.find("<circle", at + 1))
    ++circles;
  EXPECT_EQ(circles, 3u);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_TRUE(ToSvg({}).ends_with("</svg>\n"));
}

}  // namespace
}  // namespace godwit::cli
