#pragma once
// Mistakes that implementations of speculation have made, around VerifyTokens: whatever claims to
// test that it is lossless has to find each of them. Host memory only.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/verify_tokens-inl.h"

namespace godwit {

enum class Mistake {
  kNone,
  kRetrospectiveTrim,  // a draft is not verified where its draft model found it unlikely
  kResidualIsP,        // a rejected draft is replaced from p
  kOneUniformForAll,   // drafts of a round are accepted by one random number
  kUntemperedDraft,    // q is taken before temperature
  kBonusAfterReject,   // the token after a rejection is drawn where all drafts would have ended
  kLastIsNotVerified   // the last draft of a round always stands
};
inline constexpr Mistake kPlantedMistakes[] = {
    Mistake::kRetrospectiveTrim, Mistake::kResidualIsP,      Mistake::kOneUniformForAll,
    Mistake::kUntemperedDraft,   Mistake::kBonusAfterReject, Mistake::kLastIsNotVerified};

struct ResidualIsP : StandardRule {
  static float Replacement(float p, float) { return p; }
};
struct OneUniformForAll : StandardRule {
  static constexpr int AcceptStream(int) { return StandardRule::AcceptStream(0); }
};
struct LastIsNotVerified : StandardRule {
  static bool Accepts(int index, int num_drafts, double u, float p, float q) {
    return index == num_drafts - 1 || StandardRule::Accepts(index, num_drafts, u, p, q);
  }
};

// VerifyTokens of `backend`, with one mistake.
class MistakenVerify {
 public:
  MistakenVerify(Backend& backend, const VerifyTokensArgs& args) : backend_(backend), args_(args) {}

  OpStatus Run(Mistake mistake) {
    switch (mistake) {
      case Mistake::kNone:
        return backend_.VerifyTokens(args_);
      case Mistake::kRetrospectiveTrim:
        return Trim();
      case Mistake::kResidualIsP:
        return RunRule<ResidualIsP>();
      case Mistake::kOneUniformForAll:
        return RunRule<OneUniformForAll>();
      case Mistake::kUntemperedDraft:
        return ForgetTemperature();
      case Mistake::kBonusAfterReject:
        return TakeBonus();
      case Mistake::kLastIsNotVerified:
        return RunRule<LastIsNotVerified>();
    }
    return {OpCode::kInvalidArgument, "no such mistake"};
  }

 private:
  static constexpr float kUnlikely = 0.4f;

  int64_t vocab_size() const { return args_.logits.shape[1]; }
  float* q(int32_t draft) const { return args_.probabilities.row<float>(draft); }

  template <typename Rule>
  OpStatus RunRule() {
    std::vector<float> scratch(static_cast<size_t>(3 * PadRow(vocab_size())));
    for (int32_t row = 0; row < args_.num_verify_rows; ++row) {
      VerifyTask<Rule>(PortableIsa(), args_, row, scratch.data()).Run();
    }
    return {};
  }

  OpStatus Trim() {
    std::vector<VerifyRow> rows(args_.verify_rows, args_.verify_rows + args_.num_verify_rows);
    for (VerifyRow& row : rows) {
      for (int32_t index = 0; index < row.num_drafts; ++index) {
        const int32_t draft = row.first_draft + index;
        if (q(draft)[*args_.drafts.row<const int32_t>(draft)] >= kUnlikely) continue;
        row.num_dropped += row.num_drafts - index;
        row.num_drafts = index;
      }
    }
    VerifyTokensArgs args = args_;
    args.verify_rows = rows.data();
    return backend_.VerifyTokens(args);
  }

  OpStatus ForgetTemperature() {
    for (int32_t row = 0; row < args_.num_verify_rows; ++row) {
      const VerifyRow& verify = args_.verify_rows[row];
      const float temperature = args_.rows[verify.first_row].temperature;
      for (int32_t index = 0; index < verify.num_drafts; ++index) {
        float* const p = q(verify.first_draft + index);
        double sum = 0;
        for (int64_t id = 0; id < vocab_size(); ++id) {
          p[id] = std::pow(p[id], temperature);
          sum += static_cast<double>(p[id]);
        }
        for (int64_t id = 0; id < vocab_size(); ++id) p[id] = static_cast<float>(p[id] / sum);
      }
    }
    return backend_.VerifyTokens(args_);
  }

  OpStatus TakeBonus() {
    if (const OpStatus status = backend_.VerifyTokens(args_); !status.ok()) return status;
    std::vector<SampleRow> rows;
    std::vector<int32_t*> last_tokens;
    for (int32_t row = 0; row < args_.num_verify_rows; ++row) {
      const VerifyRow& verify = args_.verify_rows[row];
      const int32_t num_tokens = *args_.num_tokens.row<const int32_t>(row);
      if (num_tokens > verify.num_drafts) continue;  // none was rejected
      rows.push_back(args_.rows[verify.first_row + verify.num_drafts]);
      last_tokens.push_back(args_.tokens.row<int32_t>(verify.first_row + num_tokens - 1));
      --args_.counts.row<uint32_t>(rows.back().slot)[*last_tokens.back()];
    }
    std::vector<int32_t> bonus(rows.size());
    SampleArgs args;
    args.logits = args_.logits;
    args.rows = rows.data();
    args.num_rows = static_cast<int32_t>(rows.size());
    args.counts = args_.counts;
    args.tokens = MakeView(bonus.data(), DType::kI32, args.num_rows);
    const OpStatus status = rows.empty() ? OpStatus() : backend_.Sample(args);
    for (size_t row = 0; row < rows.size(); ++row) *last_tokens[row] = bonus[row];
    return status;
  }

  Backend& backend_;
  const VerifyTokensArgs& args_;
};

}  // namespace godwit
