#pragma once
// How likely a draft is to be accepted, before it is verified: from what the draft model shows of
// its own certainty, learnt online. Pure: no device, no model, no clock.
//
// A score is of the distribution that a draft is drawn from, or of drafts before it: never of the
// drawn token itself, as far as whether that token is verified depends on it (draft_policy.h).

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/batch.h"

namespace godwit {

// Greedy rows, rows that match a seed and rows of the standard rule accept differently.
enum class AcceptanceClass { kGreedy, kCoupled, kStandard };
inline constexpr int kNumAcceptanceClasses = 3;

// P(draft is accepted | all before it are) as a logistic in one number that the draft model shows,
// one for each class and place in the round. Learnt from verified drafts by Newton steps whose
// memory fades, 2 numbers a place. Before anything is learnt it is the sigmoid of that number.
class AcceptanceEstimator {
 public:
  double Predict(AcceptanceClass acceptance_class, int place, double x) const;
  void Observe(AcceptanceClass acceptance_class, int place, double x, bool accepted);

  // Over all drafts: recent share of accepted ones.
  double Mean(AcceptanceClass acceptance_class) const;
  int64_t num_observed(AcceptanceClass acceptance_class) const;

 private:
  struct Logistic {
    double weight[2] = {0, 1};
    double hessian[3] = {4, 0, 4};  // 00, 01, 11; also the strength of the prior
  };
  struct Class {
    Logistic places[kMaxDraftTokens];
    double accepted = 1, total = 2;
    int64_t num_observed = 0;
  };
  Class classes_[kNumAcceptanceClasses];
};

// What the draft model shows of one draft.
struct DraftSigns {
  double margin = 0;           // of the two largest logits that it is drawn from
  std::optional<double> head;  // logit of its acceptance by the acceptance head, if there is one
};

// By the head where there is one and the policy follows it (specdecpp, throughput), else by the
// margin. The head's own probability is corrected online as the margin's is: two numbers a place.
class AcceptanceScore {
 public:
  explicit AcceptanceScore(bool has_head) : has_head_(has_head) {}

  // The policy's predictions are the head's, which was trained and need not be learnt first.
  bool FollowsHead(DraftPolicy policy) const {
    return has_head_ && (policy == DraftPolicy::kSpecDecPP || policy == DraftPolicy::kThroughput);
  }

  double Predict(DraftPolicy policy, AcceptanceClass acceptance_class, int place,
                 const DraftSigns& signs) const;
  // Of a draft of which nothing is known yet.
  double Mean(AcceptanceClass acceptance_class) const { return by_margin_.Mean(acceptance_class); }
  // A verified draft, all before it accepted.
  void Observe(AcceptanceClass acceptance_class, int place, const DraftSigns& signs, bool accepted);
  int64_t num_observed(AcceptanceClass acceptance_class) const {
    return by_margin_.num_observed(acceptance_class);
  }

 private:
  bool has_head_;
  AcceptanceEstimator by_margin_, by_head_;
};

}  // namespace godwit
