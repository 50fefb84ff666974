#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/philox.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/device_arena.h"

namespace godwit {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Known answers of the Random123 distribution (kat_vectors, philox 4x32, 10 rounds).
TEST(PhiloxTest, MatchesThePublishedVectors) {
  const PhiloxWords zeros = Philox4x32({{0, 0, 0, 0}}, 0);
  EXPECT_EQ(zeros.word[0], 0x6627e8d5u);
  EXPECT_EQ(zeros.word[1], 0xe169c58du);
  EXPECT_EQ(zeros.word[2], 0xbc57ac4cu);
  EXPECT_EQ(zeros.word[3], 0x9b00dbd8u);
  const PhiloxWords ones =
      Philox4x32({{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}}, 0xffffffffffffffffu);
  EXPECT_EQ(ones.word[0], 0x408f276du);
  EXPECT_EQ(ones.word[1], 0x41c83b0eu);
  EXPECT_EQ(ones.word[2], 0xa20bc7c6u);
  EXPECT_EQ(ones.word[3], 0x6d5451fdu);
  const PhiloxWords pi =
      Philox4x32({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0x299f31d0a4093822u);
  EXPECT_EQ(pi.word[0], 0xd16cfe09u);
  EXPECT_EQ(pi.word[1], 0x94fdccebu);
  EXPECT_EQ(pi.word[2], 0x5001e420u);
  EXPECT_EQ(pi.word[3], 0x24126ea1u);
}

TEST(PhiloxTest, GumbelOfWordIsFiniteAndAccurateAtBothEnds) {
  for (const uint32_t x : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xfffffff0u, 0xffffffffu}) {
    const double u = (static_cast<double>(x) + 0.5) / 4294967296.0;
    // log1p keeps u near 1, where -log(u) would lose what tells the largest draws apart.
    const double expected = -std::log(u > 0.5 ? -std::log1p(-(1 - u)) : -std::log(u));
    EXPECT_NEAR(static_cast<double>(GumbelOfWord(x)), expected, 4e-6) << x;
  }
}

class CpuSampleTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = MakeCpuBackend(GetParam(), 2, &reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }

  struct Result {
    OpStatus status;
    std::vector<float> tokens, logprobs, top_ids, top_logprobs;
    int token(size_t row) const { return static_cast<int>(tokens[row]); }
  };
  // logits [R, V] flat; counts [slots, V] flat or empty.
  static Result Sample(Backend& backend, const std::vector<float>& logits, int64_t vocab,
                       const std::vector<SampleRow>& rows, const std::vector<uint32_t>& counts = {},
                       int64_t max_top = 4) {
    DeviceArena arena(backend);
    const int64_t num_rows = static_cast<int64_t>(rows.size());
    SampleArgs args;
    args.logits =
        arena.Floats(DType::kF32, {static_cast<int64_t>(logits.size()) / vocab, vocab}, logits);
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(num_rows);
    if (!counts.empty()) {
      args.counts = arena.Upload<uint32_t>(
          DType::kU32, {static_cast<int64_t>(counts.size()) / vocab, vocab}, counts);
    }
    args.tokens =
        arena.Upload<int32_t>(DType::kI32, {num_rows}, std::vector<int32_t>(rows.size(), -7));
    args.logprobs = arena.Output(DType::kF32, {num_rows});
    args.top_ids =
        arena.Upload<int32_t>(DType::kI32, {num_rows, max_top},
                              std::vector<int32_t>(rows.size() * static_cast<size_t>(max_top), -7));
    args.top_logprobs = arena.Output(DType::kF32, {num_rows, max_top});
    Result result;
    result.status = backend.Sample(args);
    result.tokens = arena.Download(args.tokens);
    result.logprobs = arena.Download(args.logprobs);
    result.top_ids = arena.Download(args.top_ids);
    result.top_logprobs = arena.Download(args.top_logprobs);
    return result;
  }
  Result Sample(const std::vector<float>& logits, int64_t vocab, const std::vector<SampleRow>& rows,
                const std::vector<uint32_t>& counts = {}) {
    return Sample(*backend_, logits, vocab, rows, counts);
  }

  // Counts of `draws` draws of one row, at successive positions.
  std::vector<int> Histogram(const std::vector<float>& logits, SampleRow row, int draws) {
    const int64_t vocab = static_cast<int64_t>(logits.size());
    std::vector<int> histogram(logits.size());
    std::vector<SampleRow> rows(500, row);
    for (int begin = 0; begin < draws; begin += 500) {
      for (int i = 0; i < 500; ++i) rows[static_cast<size_t>(i)].position = begin + i;
      const Result result = Sample(logits, vocab, rows);
      for (size_t i = 0; i < rows.size(); ++i) ++histogram[static_cast<size_t>(result.token(i))];
    }
    return histogram;
  }

  BackendPtr backend_;
};

// Exact probabilities of a row, by definition: sorted, cut, renormalised.
std::vector<double> Probabilities(const std::vector<float>& logits, const SampleRow& row) {
  std::vector<size_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  if (row.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(row.top_k)));
  std::vector<double> p(logits.size());
  auto normalise = [&] {
    double total = 0;
    std::vector<double> kept(logits.size());
    for (const size_t id : order) {
      kept[id] = std::exp(static_cast<double>(logits[id] - logits[order[0]]) /
                          static_cast<double>(row.temperature));
      total += kept[id];
    }
    for (double& x : kept) x /= total;
    p = kept;
  };
  normalise();
  if (row.top_p < 1) {
    double sum = 0;
    size_t length = 0;
    while (length < order.size() && sum < static_cast<double>(row.top_p)) sum += p[order[length++]];
    order.resize(length);
  }
  const double max = p[order[0]];
  std::erase_if(order, [&](size_t id) { return p[id] < static_cast<double>(row.min_p) * max; });
  normalise();
  return p;
}

TEST_P(CpuSampleTest, DrawsFollowTheExactProbabilities) {
  const std::vector<float> logits = {0.3f, 1.9f,  -0.5f, 2.2f, 0.31f, -3.0f, 1.1f,
                                     0.9f, -1.2f, 1.5f,  0.0f, 0.7f,  -0.1f, 2.0f,
                                     0.2f, 1.0f,  -2.0f, 0.6f, 1.3f};
  struct Case {
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    uint64_t seed;
  };
  const Case cases[] = {{1, 0, 1, 0, 11},        {0.7f, 0, 1, 0, 12},
                        {2.5f, 0, 1, 0, 13},     {1, 5, 1, 0, 14},
                        {1, 0, 0.8f, 0, 15},     {1, 0, 1, 0.2f, 16},
                        {0.9f, 10, 0.7f, 0, 17}, {1.3f, 12, 0.9f, 0.1f, 0xfedcba9876543210u}};
  constexpr int kDraws = 100000;
  for (const Case& c : cases) {
    SampleRow row;
    row.temperature = c.temperature;
    row.top_k = c.top_k;
    row.top_p = c.top_p;
    row.min_p = c.min_p;
    row.seed = c.seed;
    const std::vector<double> p = Probabilities(logits, row);
    const std::vector<int> histogram = Histogram(logits, row, kDraws);
    double chi_squared = 0;
    int degrees = -1;
    for (size_t id = 0; id < logits.size(); ++id) {
      if (p[id] == 0) {
        EXPECT_EQ(histogram[id], 0) << "token " << id << " was cut, seed " << c.seed;
        continue;
      }
      const double expected = kDraws * p[id];
      chi_squared += std::pow(histogram[id] - expected, 2) / expected;
      ++degrees;
    }
    // Wilson and Hilferty: the 99.99 % quantile (3.72 standard deviations) of chi squared.
    const double h = 2.0 / (9.0 * degrees);
    EXPECT_LT(chi_squared, degrees * std::pow(1 - h + 3.72 * std::sqrt(h), 3)) << "seed " << c.seed;
  }
}

TEST_P(CpuSampleTest, DrawDependsOnSeedIndexAndPositionAlone) {
  const int64_t vocab = 1000;
  const std::vector<float> logits = RandomValues(5, 8 * vocab);
  std::vector<SampleRow> rows;
  for (int r = 0; r < 8; ++r) {
    SampleRow row;
    row.logit_row = r;
    row.seed = 100 + static_cast<uint64_t>(r);
    row.output_index = 3 * r;
    row.position = (int64_t{1} << 33) + r;
    row.top_p = r % 2 == 0 ? 1.0f : 0.9f;
    row.top_k = r % 3 == 0 ? 0 : 50;
    rows.push_back(row);
  }
  const Result together = Sample(logits, vocab, rows);
  ASSERT_TRUE(together.status.ok());
  for (size_t r = 0; r < rows.size(); ++r) {
    SampleRow alone = rows[r];
    alone.logit_row = 0;
    const std::vector<float> own(logits.begin() + static_cast<int64_t>(r) * vocab,
                                 logits.begin() + static_cast<int64_t>(r + 1) * vocab);
    EXPECT_EQ(Sample(own, vocab, {alone}).token(0), together.token(r)) << r;
  }
  // And each of them matters: over 64 rows of one setting changed, some draws differ.
  for (const int what : {0, 1, 2}) {
    std::vector<SampleRow> changed(64, rows[0]);
    for (size_t i = 0; i < changed.size(); ++i) {
      if (what == 0) changed[i].seed += i << 32;
      if (what == 1) changed[i].output_index += static_cast<int32_t>(i);
      if (what == 2) changed[i].position += static_cast<int64_t>(i) << 32;
    }
    const Result result = Sample(logits, vocab, changed);
    int different = 0;
    for (size_t i = 1; i < changed.size(); ++i) different += result.token(i) != result.token(0);
    EXPECT_GT(different, 32) << what;
  }
}

TEST_P(CpuSampleTest, MatchesTheSortingReference) {
  BackendPtr ref = CreateRefBackend();
  const int64_t vocab = 5003;
  std::vector<float> logits = RandomValues(6, 4 * vocab, DType::kF32, 3);
  for (size_t i = 0; i < logits.size(); i += 3) logits[i] = std::round(logits[i]);  // many ties
  constexpr int kRows = 96;  // each with a slot of its own: a draw counts its token there
  std::vector<uint32_t> counts(static_cast<size_t>(kRows * vocab));
  for (size_t i = 0; i < counts.size(); i += 7)
    counts[i] = (i % 2 == 0 ? kPromptBit : 0) + static_cast<uint32_t>(i % 4);
  const std::vector<TokenBias> biases = {{17, 2.5f}, {0, -kInfinity}, {5002, 1}, {17, 1}};
  std::vector<SampleRow> rows;
  for (int i = 0; i < kRows; ++i) {
    SampleRow row;
    row.logit_row = i % 4;
    row.slot = i;
    row.output_index = i;
    row.seed = 99;
    row.num_logprobs = i % 6 - 1;
    row.position = i;
    row.temperature = i % 5 == 0 ? 0.0f : 0.4f + 0.1f * static_cast<float>(i % 9);
    row.top_k = i % 3 == 0 ? 0 : 1 + i;
    row.top_p = i % 4 == 0 ? 1.0f : 0.3f + 0.007f * static_cast<float>(i);
    row.min_p = i % 7 == 0 ? 0.05f : 0.0f;
    if (i % 2 == 0) {
      row.repetition_penalty = 1.3f;
      row.presence_penalty = 0.4f;
      row.frequency_penalty = -0.2f;
    }
    if (i % 8 < 4) {
      row.num_biases = 4;
      row.biases = biases.data();
    }
    rows.push_back(row);
  }
  const Result expected = Sample(*ref, logits, vocab, rows, counts, 5);
  const Result actual = Sample(*backend_, logits, vocab, rows, counts, 5);
  ASSERT_TRUE(actual.status.ok()) << actual.status.text;
  int different = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    different += actual.token(r) != expected.token(r);
    if (rows[r].num_logprobs < 0) continue;
    if (actual.token(r) == expected.token(r)) {
      // |log p| < 30: a rounding of the sum (2^-19) and of the result.
      EXPECT_NEAR(actual.logprobs[r], expected.logprobs[r], 1e-5);
    }
    for (int i = 0; i < rows[r].num_logprobs; ++i) {
      EXPECT_EQ(actual.top_ids[5 * r + static_cast<size_t>(i)],
                expected.top_ids[5 * r + static_cast<size_t>(i)]);
      EXPECT_NEAR(actual.top_logprobs[5 * r + static_cast<size_t>(i)],
                  expected.top_logprobs[5 * r + static_cast<size_t>(i)], 1e-5);
    }
  }
  // A draw is decided by a rounding where two values lie within 1e-5: 1 in 10,000 draws.
  EXPECT_LE(different, 1);
}

TEST_P(CpuSampleTest, TinyTemperatureIsArgmaxAndHugeIsUniform) {
  const std::vector<float> logits = {1, 3, 2.999f, -kInfinity, 3};
  SampleRow row;
  row.temperature = 1e-38f;
  const Result tiny = Sample(logits, 5, std::vector<SampleRow>(50, row));
  for (size_t i = 0; i < 50; ++i) EXPECT_TRUE(tiny.token(i) == 1 || tiny.token(i) == 4);
  row.temperature = 3e38f;
  row.seed = 21;
  const std::vector<int> histogram = Histogram(logits, row, 20000);
  EXPECT_EQ(histogram[3], 0);
  for (const size_t id : {0u, 1u, 2u, 4u})
    EXPECT_NEAR(histogram[id], 5000, 4 * 61);  // 61: standard deviation
}

TEST_P(CpuSampleTest, ZeroTemperatureTakesTheLowestOfTheLargest) {
  SampleRow row;
  row.temperature = 0;
  EXPECT_EQ(Sample({1, 5, -2, 5, 5}, 5, {row}).token(0), 1);
  EXPECT_EQ(Sample({-0.0f, 0.0f}, 2, {row}).token(0), 0);
  row.top_k = 1;
  row.temperature = 1;
  for (int i = 0; i < 20; ++i) {
    row.position = i;
    EXPECT_EQ(Sample({1, 5, -2, 5, 5}, 5, {row}).token(0), 1);
  }
}

TEST_P(CpuSampleTest, BannedTokensAreNeverDrawn) {
  std::vector<TokenBias> biases;
  for (int id = 0; id < 40; ++id) {
    if (id != 23) biases.push_back({id, -kInfinity});
  }
  SampleRow row;
  row.num_biases = static_cast<int32_t>(biases.size());
  row.biases = biases.data();
  row.temperature = 5;
  const std::vector<float> logits(40, 0.5f);
  for (int i = 0; i < 50; ++i) {
    row.position = i;
    EXPECT_EQ(Sample(logits, 40, {row}).token(0), 23);
  }
  biases.push_back({23, -kInfinity});
  row.num_biases = 40;
  row.biases = biases.data();
  for (const float temperature : {0.0f, 1.0f}) {
    row.temperature = temperature;
    EXPECT_EQ(Sample(logits, 40, {row}).token(0), 0) << "all banned: the lowest of the largest";
  }
}

TEST_P(CpuSampleTest, LogitsWithNanOrPlusInfinityDrawNothing) {
  for (const float bad : {NAN, kInfinity}) {
    std::vector<float> logits(3 * 50, 1.0f);
    logits[2 * 50 + 49] = bad;
    std::vector<SampleRow> rows(3);
    for (int r = 0; r < 3; ++r) rows[static_cast<size_t>(r)].logit_row = 2 - r;
    const Result result = Sample(logits, 50, rows);
    EXPECT_EQ(result.token(0), -1);
    EXPECT_GE(result.token(1), 0);
    EXPECT_GE(result.token(2), 0);
  }
}

TEST_P(CpuSampleTest, CountTokensKeepsPromptAndOutputApart) {
  DeviceArena arena(*backend_);
  CountTokensArgs args;
  args.counts = arena.Upload<uint32_t>(DType::kU32, {2, 10}, std::vector<uint32_t>(20));
  args.slot = 1;
  args.token_ids = arena.Upload<int32_t>(DType::kI32, {3}, std::vector<int32_t>{4, 4, 9});
  args.is_prompt = 1;
  ASSERT_TRUE(backend_->CountTokens(args).ok());
  args.is_prompt = 0;
  ASSERT_TRUE(backend_->CountTokens(args).ok());
  args.token_ids.shape[0] = 0;
  ASSERT_TRUE(backend_->CountTokens(args).ok());
  const uint32_t* const counts = args.counts.row<const uint32_t>(0);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(counts[i], i == 14 ? kPromptBit + 2 : i == 19 ? kPromptBit + 1 : 0u) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuSampleTest, ::testing::ValuesIn(kCpuIsaNames),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace godwit
