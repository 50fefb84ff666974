#pragma once
// How likely a draft is to be accepted, before it is verified: from what the draft model shows of
// its own certainty and from what became of the sequence's drafts before, learnt online. Pure: no
// device, no model, no clock.
//
// A score is of the distribution that a draft is drawn from, or of what lies before it: never of
// the drawn token itself, as far as whether that token is verified depends on it (draft_policy.h).

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/batch.h"

namespace godwit {

// Greedy rows, rows that match a seed and rows of the standard rule accept differently.
enum class AcceptanceClass { kGreedy, kCoupled, kStandard };
inline constexpr int kNumAcceptanceClasses = 3;

// Accepted share of a sequence's latest drafts, about 16 of them, beginning at a half.
class SequenceHistory {
 public:
  void Observe(bool accepted);
  double logit() const;

 private:
  double accepted_ = 2, total_ = 4;
};

// What is known of one draft.
struct DraftSigns {
  // Of the two largest logits that it is drawn from, over temperature; if its pass showed it.
  std::optional<double> margin;
  std::optional<double> head;  // logit of its acceptance by the acceptance head; likewise
  double history = 0;          // SequenceHistory's, before this round
};

// P(draft is accepted | all before it are): a logistic in a few numbers, fitted to verified drafts
// by Newton steps whose memory fades after about 1000 of them, or 60 rounds of many sequences: else
// a large batch would believe what its last few rounds happened to be.
class OnlineLogistic {
 public:
  static constexpr int kFeatures = 4;
  using Features = std::array<double, kFeatures>;

  // strength: of the prior, in each direction, as what observations add to the curvature: one is
  // worth x^2 p (1 - p), a quarter at most where x is 1.
  OnlineLogistic(const Features& prior, const Features& strength) : weights_(prior) {
    for (size_t i = 0; i < kFeatures; ++i) hessian_[i][i] = strength[i];
  }
  double Predict(const Features& x) const;
  // One of num_together that come at once.
  void Observe(const Features& x, bool accepted, int64_t num_together = 1);

 private:
  Features weights_;
  // Curvature, with the strength of the prior on its diagonal.
  std::array<Features, kFeatures> hessian_ = {};
};

// By the head or by the margin; besides by place and history. One fit of each for each class.
class AcceptanceScore {
 public:
  // As Expect does where that sign is not there.
  double Predict(bool by_head, AcceptanceClass acceptance_class, int place,
                 const DraftSigns& signs) const;
  // Of a draft whose distribution is not known.
  double Expect(AcceptanceClass acceptance_class, int place, double history) const;
  // The same in a round that nothing stops: what signs choose is accepted more often.
  double ExpectBlindly(AcceptanceClass acceptance_class, int place, double history) const;
  // What one more draft is worth if it is verified only where that pays: the mean over recent
  // drafts' predictions p of max(survival p - row_cost, 0).
  double ValueOfOption(AcceptanceClass acceptance_class, double survival, double row_cost) const;

  // Those predictions themselves; few as long as little is known.
  std::vector<double> Recent(AcceptanceClass acceptance_class) const;

  // A verified draft, all before it accepted; one of num_together of a step. chosen: by signs of
  // its round.
  void Observe(AcceptanceClass acceptance_class, int place, const DraftSigns& signs, bool accepted,
               int64_t num_together = 1, bool chosen = true);
  // A draft that was drawn, verified or not.
  void Saw(AcceptanceClass acceptance_class, double predicted);
  int64_t num_observed(AcceptanceClass acceptance_class) const;
  double Mean(AcceptanceClass acceptance_class) const;  // of recent verified drafts

 private:
  static constexpr size_t kRecent = 128;
  struct Class {
    OnlineLogistic by_margin{{-0.7, 1.5, 0, 0}, {4, 4, 4, 4}};  // untrained pairs lie near this
    // A head was trained on thousands of drafts: some hundred others do not overrule it. How much
    // the sequence's own history says besides was not.
    OnlineLogistic by_head{{0, 1, 0, 0}, {100, 100, 100, 20}};
    OnlineLogistic by_history{{0.5, 0, 0, 0.5}, {4, 4, 4, 4}};
    OnlineLogistic blindly{{0.5, 0, 0, 0.5}, {4, 4, 4, 4}};
    double accepted = 1, total = 2;
    int64_t num_observed = 0;
    std::array<float, kRecent> recent{};
    size_t num_seen = 0;
  };
  const Class& of(AcceptanceClass acceptance_class) const {
    return classes_[static_cast<size_t>(acceptance_class)];
  }

  std::array<Class, kNumAcceptanceClasses> classes_;
};

}  // namespace godwit
