// The throughput policy in a whole engine, at the times of a GPU: what it reaches beside no drafts
// and the best fixed number of them. Times and acceptances are the test's, so that every run
// decides alike: a pass of the draft model takes what it takes whatever its rows, a step of the
// target by its tokens, with a jump where a product takes another tile.

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/wrapped_backend.h"

namespace godwit {
namespace {

// Measured with a target of 125 M parameters and a draft model of 12 M on an H100, in plain steps;
// signs with a margin that is waited for.
struct LoadTimes {
  int64_t num_sequences;
  double first_pass, pass, signs;  // of a pass; and what one takes longer that shows its draft
  std::vector<double> steps;  // with 0, 1, ... drafts for every sequence
  int best_fixed;
};

const LoadTimes kLoads[] = {
    {1, 0.197, 0.156, 0.01, {1, 1.19, 1.23, 1.23, 1.26, 1.29, 1.31, 1.31, 1.42, 1.45}, 4},
    {8, 0.184, 0.172, 0.05, {1, 1.16, 1.27, 1.33, 1.35, 1.40, 1.46, 1.75, 2.04, 2.2}, 3},
    {32, 0.190, 0.170, 0.05, {1, 1.24, 1.49, 1.60, 2.19, 2.24, 2.29, 2.6, 2.9, 3.2}, 3},
    {128, 0.235, 0.181, 0.05, {1, 1.62, 1.82, 1.92, 2.32, 2.7, 3.1, 3.5, 3.9, 4.3}, 3},
    // With more of everything: no number of drafts pays.
    {128, 0.235, 0.301, 0.05, {1, 1.90, 2.30, 2.55, 3.10, 3.6, 4.1, 4.6, 5.1, 5.6}, 0}};

constexpr double kPlainSeconds = 1e-3;
constexpr int kMostDrafts = 6;

class Simulation {
 public:
  explicit Simulation(const LoadTimes& times)
      : times_(times), target_(Tiny(1)), draft_(Tiny(2)), random_(7) {
    WrapOptions wrap = {.replays = true};
    wrap.sample = [this](Backend&, const SampleArgs& args) { return Sample(args); };
    wrap.verify = [this](Backend&, const VerifyTokensArgs& args) { return Verify(args); };
    wrap.clock = [this] { return seconds_; };
    engine_ = MakeEngine(target_,
                         {.draft_folder = draft_.folder(),
                          .dtype = DType::kF32,
                          .max_sequences = times.num_sequences,
                          .max_tokens_per_step = 2048,
                          .max_steps_in_flight = 1},
                         std::unique_ptr<Backend, BackendDeleter>(new WrappedBackend(
                             *CreateCpuBackend({.num_threads = 1}), std::move(wrap))));
    for (int64_t index = 0; index < times.num_sequences; ++index) {
      leases_.push_back(*engine_->caches().Reserve(16384));
    }
  }

  // Tokens a plain step's time, of `count` steps. drafts < 0: by throughput.
  double Run(int drafts, int count) {
    const double before = seconds_;
    int64_t num_tokens = 0;
    for (int step = 0; step < count; ++step) num_tokens += Step(drafts);
    return static_cast<double>(num_tokens) / ((seconds_ - before) / kPlainSeconds);
  }

 private:
  static TinyModelOptions Tiny(uint64_t seed) {
    return {.family = TinyFamily::kTransnormer,
            .seed = seed,
            .vocab_size = 8,
            .d_model = 16,
            .num_layers = 2,
            .num_heads = 1,
            .d_ff = 16};
  }

  double StepSeconds(int64_t num_tokens) const {
    const double drafts =
        static_cast<double>(num_tokens) / static_cast<double>(times_.num_sequences) - 1;
    const auto below =
        std::min(static_cast<size_t>(std::max(drafts, 0.0)), times_.steps.size() - 2);
    const double share = drafts - static_cast<double>(below);
    const double from = times_.steps[below], to = times_.steps[below + 1];
    // Beyond 128 tokens all at once.
    const int64_t first = static_cast<int64_t>(below + 1) * times_.num_sequences;
    if (first == 128 && times_.num_sequences == 32) return kPlainSeconds * (share > 0 ? to : from);
    return kPlainSeconds * (from + share * (to - from));
  }

  OpStatus Sample(const SampleArgs& args) {
    const bool is_draft = args.probabilities.data != nullptr;
    if (!is_draft) {
      seconds_ += kPlainSeconds;
    } else {
      seconds_ += kPlainSeconds * (num_passes_++ == 0 ? times_.first_pass : times_.pass);
      if (args.margins.data != nullptr) seconds_ += kPlainSeconds * times_.signs;
    }
    for (int32_t row = 0; row < args.num_rows; ++row) {
      if (args.rows[row].slot < 0) continue;
      int32_t* const token = args.tokens.row<int32_t>(row);
      *token = 1;
      if (!is_draft) continue;
      // As margins that a fit knows from the start say.
      const double p = acceptances_[token] = std::bernoulli_distribution(0.6)(random_) ? 0.95 : 0.4;
      if (args.margins.data == nullptr) continue;
      *args.margins.row<float>(row) =
          static_cast<float>(std::expm1((std::log(p / (1 - p)) + 0.7) / 1.5));
    }
    return {};
  }

  OpStatus Verify(const VerifyTokensArgs& args) {
    num_passes_ = 0;
    seconds_ += StepSeconds(args.num_rows);
    for (int32_t row = 0; row < args.num_verify_rows; ++row) {
      const VerifyRow& verify = args.verify_rows[row];
      if (args.rows[verify.first_row].slot < 0) continue;
      int32_t accepted = 0;
      while (accepted < verify.num_drafts &&
             std::bernoulli_distribution(
                 acceptances_[args.drafts.row<int32_t>(verify.first_draft + accepted)])(random_)) {
        ++accepted;
      }
      *args.num_tokens.row<int32_t>(row) = accepted + 1;
      for (int32_t token = 0; token <= accepted; ++token) {
        *args.tokens.row<int32_t>(verify.first_row + token) = 1;
      }
    }
    return {};
  }

  int64_t Step(int drafts) {
    const SamplingParams sampling = {.temperature = 0};
    const std::vector<int32_t> prompt = {1, 2, 3};
    std::vector<RowOutput> outputs;
    std::vector<BatchRow> rows;
    outputs.reserve(leases_.size());
    for (CacheLease& lease : leases_) {
      const RowOutput& output =
          outputs.emplace_back(RowOutput{.lease = &lease, .sampling = &sampling});
      BatchRow& row = rows.emplace_back(
          BatchRow{.confirmed_position = lease.position(),
                   .prompt_length = 3,
                   .lease = &lease,
                   .outputs = std::span(&output, 1),
                   .max_draft_tokens = drafts < 0 ? kMostDrafts : drafts,
                   .draft_policy = drafts < 0 ? DraftPolicy::kThroughput : DraftPolicy::kFixed});
      if (is_new_) {
        row.token_ids = prompt;
        row.max_draft_tokens = 1;
      }
    }
    is_new_ = false;
    const StepResult result = *engine_->Collect(*engine_->Submit(rows));
    int64_t num_tokens = 0;
    for (const RowResult& row : result.rows) {
      num_tokens += std::ssize(row.outputs[0]);
    }
    return num_tokens;
  }

  const LoadTimes times_;
  const TinyModel target_, draft_;
  std::mt19937 random_;
  std::map<const int32_t*, double> acceptances_;  // of drafts, by where they lie
  double seconds_ = 0;
  int num_passes_ = 0;  // since the last step of the target
  bool is_new_ = true;
  std::unique_ptr<Engine> engine_;
  std::vector<CacheLease> leases_;
};

TEST(ThroughputSimulationTest, IsAsFastAsTheBestOfOffAndFixed) {
  for (const LoadTimes& times : kLoads) {
    const int count = static_cast<int>(1600 / std::sqrt(times.num_sequences));
    double best = 0;
    int best_drafts = 0;
    for (int drafts = 0; drafts <= kMostDrafts; ++drafts) {
      Simulation fixed(times);
      fixed.Run(drafts, 1);  // the prompts
      const double rate = fixed.Run(drafts, drafts == 0 ? 10 : count);
      if (rate > best) best_drafts = drafts;
      best = std::max(best, rate);
    }
    EXPECT_EQ(best_drafts, times.best_fixed);
    Simulation throughput(times);
    throughput.Run(-1, 200);
    EXPECT_GE(throughput.Run(-1, count), 0.985 * best)
        << times.num_sequences << " sequences, for which " << best_drafts << " drafts are best";
  }
}

}  // namespace
}  // namespace godwit
