// Speculation is lossless: three-token texts of a toy target are drawn with a toy draft, through
// the ops that the engine runs, and counted against their exact probabilities. And the test can
// see: each of six mistakes that implementations have made is planted, and found.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/chi_square.h"
#include "tests/kernels/device_arena.h"
#include "tests/planted_mistakes.h"

namespace godwit {
namespace {

constexpr int kVocab = 5, kLength = 3, kDrafts = 3;
constexpr int kTexts = kVocab * kVocab * kVocab;
constexpr int64_t kFirstPosition = 10;
// A fixed run fails by chance once in a million; the mistakes lie far below.
constexpr double kAlpha = 1e-6;

using Logits = std::vector<std::vector<float>>;  // [last token][next token]

Logits RandomLogits(uint32_t seed) {
  Logits logits;
  for (uint32_t last = 0; last < kVocab; ++last) {
    logits.push_back(RandomValues(100 * seed + last, kVocab, DType::kF32, 1.2f));
  }
  return logits;
}

SampleRow Sampling() {
  SampleRow row;
  row.temperature = 0.7f;
  row.top_k = 4;
  row.frequency_penalty = 0.6f;
  row.repetition_penalty = 1.2f;
  return row;
}

// By definition: penalties, temperature, top_k.
std::vector<double> Distribution(const std::vector<float>& raw, const std::vector<int>& counts,
                                 const SampleRow& row) {
  std::vector<double> x(raw.begin(), raw.end());
  for (size_t id = 0; id < x.size(); ++id) {
    if (counts[id] == 0) continue;
    const auto r = static_cast<double>(row.repetition_penalty);
    x[id] = (x[id] > 0 ? x[id] / r : x[id] * r) -
            static_cast<double>(row.frequency_penalty) * counts[id];
  }
  std::vector<double> sorted = x;
  std::sort(sorted.rbegin(), sorted.rend());
  double sum = 0;
  for (double& value : x) {
    value = value >= sorted[static_cast<size_t>(row.top_k) - 1]
                ? std::exp(value / static_cast<double>(row.temperature))
                : 0;
    sum += value;
  }
  for (double& value : x) value /= sum;
  return x;
}

// Probability of each text that follows token 0.
std::vector<double> TextProbabilities(const Logits& target) {
  std::vector<double> probabilities;
  for (int text = 0; text < kTexts; ++text) {
    std::vector<int> counts(kVocab);
    size_t last = 0;
    double probability = 1;
    for (int divisor = kTexts / kVocab; divisor > 0; divisor /= kVocab) {
      const auto token = static_cast<size_t>(text / divisor % kVocab);
      probability *= Distribution(target[last], counts, Sampling())[token];
      ++counts[token];
      last = token;
    }
    probabilities.push_back(probability);
  }
  return probabilities;
}

// Many sequences side by side, each in a slot of its own.
class Toy {
 public:
  // drops: a draft is not verified, nor those after it, where no token was likely: whatever is
  // drawn there, which is right.
  struct Options {
    AcceptRule rule = AcceptRule::kStandard;
    Mistake mistake = Mistake::kNone;
    bool drops = false;
  };
  Toy(uint32_t models, uint64_t seed, int num_sequences, const Options& options)
      : target_(RandomLogits(models)),
        draft_(RandomLogits(models + 1000)),
        seed_(seed),
        num_sequences_(num_sequences),
        options_(options),
        tokens_(static_cast<size_t>(num_sequences)),
        counts_(static_cast<size_t>(num_sequences * kVocab)),
        drafts_(static_cast<size_t>(num_sequences * kDrafts)),
        probabilities_(static_cast<size_t>(num_sequences * kDrafts * kVocab)) {
    std::string reason;
    backend_ = MakeCpuBackend("portable", 1, &reason);
  }

  std::vector<int64_t> CountTexts() {
    // A round makes one token at least.
    for (int round = 0; round < kLength; ++round) {
      Draft();
      Verify();
    }
    std::vector<int64_t> counts(kTexts);
    for (const std::vector<int32_t>& tokens : tokens_) {
      int text = 0;
      for (size_t i = 0; i < kLength; ++i) text = text * kVocab + tokens[i];
      ++counts[static_cast<size_t>(text)];
    }
    return counts;
  }

  int64_t num_dropped() const { return num_dropped_; }
  double PValue(const std::vector<int64_t>& counts) const {
    return ChiSquarePValue(counts, TextProbabilities(target_));
  }

 private:
  int64_t Position(size_t sequence) const { return kFirstPosition + std::ssize(tokens_[sequence]); }
  SampleRow Row(size_t sequence, int64_t position) const {
    SampleRow row = Sampling();
    row.slot = static_cast<int32_t>(sequence);
    row.output_index = static_cast<int32_t>(sequence);
    row.seed = seed_;
    row.position = position;
    return row;
  }
  // The token before draft `index`.
  size_t Last(size_t sequence, int index) const {
    if (index > 0) return static_cast<size_t>(drafts_[sequence * kDrafts + index - 1]);
    return tokens_[sequence].empty() ? 0 : static_cast<size_t>(tokens_[sequence].back());
  }

  void Sample(const std::vector<float>& logits, const std::vector<SampleRow>& rows, int32_t* tokens,
              int64_t stride) {
    SampleArgs args;
    args.logits = MakeView(const_cast<float*>(logits.data()), DType::kF32,
                           std::ssize(logits) / kVocab, kVocab);
    args.rows = rows.data();
    args.num_rows = static_cast<int32_t>(rows.size());
    args.counts = MakeView(counts_.data(), DType::kU32, num_sequences_, kVocab);
    args.tokens = MakeView(tokens, DType::kI32, args.num_rows);
    args.tokens.row_stride = stride;
    args.probabilities =
        MakeView(probabilities_.data(), DType::kF32, num_sequences_ * kDrafts, kVocab);
    ASSERT_TRUE(backend_->Sample(args).ok());
  }

  void Draft() {
    for (int index = 0; index < kDrafts; ++index) {
      std::vector<float> logits;
      std::vector<SampleRow> rows;
      for (size_t sequence = 0; sequence < tokens_.size(); ++sequence) {
        const std::vector<float>& raw = draft_[Last(sequence, index)];
        logits.insert(logits.end(), raw.begin(), raw.end());
        SampleRow& row = rows.emplace_back(Row(sequence, Position(sequence) + index));
        row.logit_row = static_cast<int32_t>(sequence);
        row.probability_row = static_cast<int32_t>(sequence) * kDrafts + index;
        if (options_.rule == AcceptRule::kMatch) continue;
        row.position = NoisePosition(Position(sequence), StandardRule::DraftStream(index));
      }
      Sample(logits, rows, drafts_.data() + index, kDrafts);
    }
  }

  int NumVerified(size_t sequence) const {
    for (int index = 0; options_.drops && index < kDrafts; ++index) {
      const float* const q = &probabilities_[(sequence * kDrafts + index) * kVocab];
      if (*std::max_element(q, q + kVocab) < 0.6f) return index;
    }
    return kDrafts;
  }

  void Verify() {
    constexpr int kRows = kDrafts + 1;
    std::vector<float> logits;
    std::vector<SampleRow> rows;
    std::vector<VerifyRow> verify_rows;
    for (size_t sequence = 0; sequence < tokens_.size(); ++sequence) {
      VerifyRow& verify = verify_rows.emplace_back();
      verify.first_row = static_cast<int32_t>(rows.size());
      verify.num_drafts = NumVerified(sequence);
      verify.num_dropped = kDrafts - verify.num_drafts;
      num_dropped_ += verify.num_dropped;
      verify.first_draft = static_cast<int32_t>(sequence) * kDrafts;
      verify.rule = options_.rule;
      for (int index = 0; index < kRows; ++index) {
        const std::vector<float>& raw = target_[Last(sequence, index)];
        logits.insert(logits.end(), raw.begin(), raw.end());
        rows.push_back(Row(sequence, Position(sequence) + index));
        rows.back().logit_row = static_cast<int32_t>(rows.size()) - 1;
      }
    }
    std::vector<int32_t> tokens(rows.size()), num_tokens(tokens_.size());
    std::vector<int32_t> top_ids(rows.size());
    std::vector<float> logprobs(rows.size()), top_logprobs(rows.size());
    VerifyTokensArgs args;
    const auto num_rows = static_cast<int64_t>(rows.size());
    args.logits = MakeView(logits.data(), DType::kF32, num_rows, kVocab);
    args.rows = rows.data();
    args.num_rows = static_cast<int32_t>(num_rows);
    args.verify_rows = verify_rows.data();
    args.num_verify_rows = num_sequences_;
    args.counts = MakeView(counts_.data(), DType::kU32, num_sequences_, kVocab);
    args.drafts = MakeView(drafts_.data(), DType::kI32, std::ssize(drafts_));
    args.probabilities = MakeView(probabilities_.data(), DType::kF32, std::ssize(drafts_), kVocab);
    args.num_tokens = MakeView(num_tokens.data(), DType::kI32, num_sequences_);
    args.tokens = MakeView(tokens.data(), DType::kI32, num_rows);
    args.logprobs = MakeView(logprobs.data(), DType::kF32, num_rows);
    args.top_ids = MakeView(top_ids.data(), DType::kI32, num_rows, 1);
    args.top_logprobs = MakeView(top_logprobs.data(), DType::kF32, num_rows, 1);
    const OpStatus status = MistakenVerify(*backend_, args).Run(options_.mistake);
    ASSERT_TRUE(status.ok()) << status.text;
    for (size_t sequence = 0; sequence < tokens_.size(); ++sequence) {
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(sequence) * kRows;
      tokens_[sequence].insert(tokens_[sequence].end(), first, first + num_tokens[sequence]);
    }
  }

  int64_t num_dropped_ = 0;
  const Logits target_, draft_;
  const uint64_t seed_;
  const int num_sequences_;
  const Options options_;
  BackendPtr backend_;
  std::vector<std::vector<int32_t>> tokens_;
  std::vector<uint32_t> counts_;
  std::vector<int32_t> drafts_;
  std::vector<float> probabilities_;
};

constexpr int kSequences = 60'000;

double PValue(const Toy::Options& options) {
  Toy toy(1, 7, kSequences, options);
  return toy.PValue(toy.CountTexts());
}

TEST(LosslessTest, TextsFollowTheTargetByEitherRule) {
  EXPECT_GT(PValue({.rule = AcceptRule::kStandard}), kAlpha);
  EXPECT_GT(PValue({.rule = AcceptRule::kMatch}), kAlpha);
}

TEST(LosslessTest, PValuesAreUniformOverSeedsAndModels) {
  for (const AcceptRule rule : {AcceptRule::kStandard, AcceptRule::kMatch}) {
    std::vector<double> p_values;
    for (uint32_t seed = 1; seed <= 200; ++seed) {
      Toy toy(seed, 1000 + seed, 3000, {.rule = rule});
      p_values.push_back(toy.PValue(toy.CountTexts()));
    }
    EXPECT_GT(UniformPValue(p_values), 1e-3) << static_cast<int>(rule);
  }
}

TEST(LosslessTest, DropsByTheDistributionAlone) {
  for (const AcceptRule rule : {AcceptRule::kStandard, AcceptRule::kMatch}) {
    std::vector<double> p_values;
    for (uint32_t seed = 1; seed <= 100; ++seed) {
      Toy toy(seed, 5000 + seed, 3000, {.rule = rule, .drops = true});
      p_values.push_back(toy.PValue(toy.CountTexts()));
      EXPECT_GT(toy.num_dropped(), 3000);
    }
    EXPECT_GT(UniformPValue(p_values), 1e-3) << static_cast<int>(rule);
  }
}

TEST(LosslessTest, PlantedMistakesAreFound) {
  for (const Mistake mistake : kPlantedMistakes) {
    EXPECT_LT(PValue({.mistake = mistake}), kAlpha) << static_cast<int>(mistake);
  }
}

// To trim a draft that was drawn is harmless where the target draws its own token.
TEST(LosslessTest, MatchingForgivesATrim) {
  EXPECT_GT(PValue({.rule = AcceptRule::kMatch, .mistake = Mistake::kRetrospectiveTrim}), kAlpha);
}

}  // namespace
}  // namespace godwit
