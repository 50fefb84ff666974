// Sampling by sorting the whole row.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/base/accept_rule.h"
#include "kernels/base/philox.h"
#include "kernels/ref/elements.h"
#include "kernels/ref/ref_backend.h"

namespace godwit {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool IsBad(const TensorView& logits, int64_t row) {
  for (int64_t id = 0; id < logits.row_elements(); ++id) {
    const double logit = Get(logits, row, id);
    if (std::isnan(logit) || logit == kInfinity) return true;
  }
  return false;
}

std::vector<double> RowOf(const TensorView& logits, int64_t row) {
  std::vector<double> result(static_cast<size_t>(logits.row_elements()));
  for (size_t id = 0; id < result.size(); ++id)
    result[id] = Get(logits, row, static_cast<int64_t>(id));
  return result;
}

// Ids in descending order, ties by lower id.
std::vector<int32_t> Descending(const std::vector<double>& x) {
  std::vector<int32_t> ids(x.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
  });
  return ids;
}

double LogSumExp(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  if (max == -kInfinity) return 0;
  double sum = 0;
  for (const double value : x) sum += std::exp(value - max);
  return max + std::log(sum);
}

void WriteTop(const std::vector<double>& logits, int64_t count, const TensorView& ids,
              const TensorView& logprobs, int64_t row) {
  const std::vector<int32_t> order = Descending(logits);
  const double log_sum = LogSumExp(logits);
  for (int64_t i = 0; i < std::min(count, static_cast<int64_t>(order.size())); ++i) {
    const int32_t id = order[static_cast<size_t>(i)];
    ids.row<int32_t>(row)[i] = id;
    Set(logprobs, row, i, logits[static_cast<size_t>(id)] - log_sum);
  }
}

void Penalise(const SampleRow& row, const TensorView& counts, std::vector<double>& logits) {
  for (int32_t i = 0; i < row.num_biases; ++i) {
    logits[static_cast<size_t>(row.biases[i].token_id)] += static_cast<double>(row.biases[i].bias);
  }
  if (!counts) return;
  for (size_t id = 0; id < logits.size(); ++id) {
    const uint32_t count = counts.row<const uint32_t>(row.slot)[id];
    if (count == 0) continue;
    const double r = static_cast<double>(row.repetition_penalty);
    logits[id] = logits[id] > 0 ? logits[id] / r : logits[id] * r;
    const uint32_t in_output = count & ~kPromptBit;
    if (in_output == 0) continue;
    logits[id] -= static_cast<double>(row.presence_penalty) +
                  static_cast<double>(row.frequency_penalty) * static_cast<double>(in_output);
  }
}

// The ids that top_k, top_p and min_p keep, of logits over temperature.
std::vector<int32_t> Kept(const SampleRow& row, const std::vector<double>& scaled) {
  std::vector<int32_t> order = Descending(scaled);
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order.size()) {
    order.resize(static_cast<size_t>(row.top_k));
  }
  const double max = scaled[static_cast<size_t>(order[0])];
  auto weight = [&](int32_t id) { return std::exp(scaled[static_cast<size_t>(id)] - max); };
  double total = 0;
  for (const int32_t id : order) total += weight(id);
  if (row.top_p < 1) {
    double sum = 0;
    size_t length = 0;
    while (length < order.size()) {
      sum += weight(order[length++]);
      if (sum >= static_cast<double>(row.top_p) * total) break;
    }
    order.resize(length);
  }
  const double least = std::min(static_cast<double>(row.min_p), 1.0);
  std::erase_if(order, [&](int32_t id) { return weight(id) < least; });
  return order;
}

double GumbelOf(const SampleRow& row, int64_t position, int32_t id) {
  const PhiloxWords words =
      SampleWords(row.seed, static_cast<uint32_t>(id) / 4, row.output_index, position);
  const double u = (static_cast<double>(words.word[id % 4]) + 0.5) / 4294967296.0;
  return -std::log(-std::log(u));
}

// The distribution that a row's token is drawn from: a point mass where that is an argmax.
std::vector<double> Distribution(const SampleRow& row, const std::vector<double>& logits) {
  const int32_t largest = Descending(logits)[0];
  const double max = logits[static_cast<size_t>(largest)];
  std::vector<double> p(logits.size());
  if (row.temperature == 0 || max == -kInfinity) {
    p[static_cast<size_t>(largest)] = 1;
    return p;
  }
  std::vector<double> scaled(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) {
    scaled[id] = (logits[id] - max) / static_cast<double>(row.temperature);
  }
  double sum = 0;
  for (const int32_t id : Kept(row, scaled)) {
    p[static_cast<size_t>(id)] = std::exp(scaled[static_cast<size_t>(id)]);
    sum += p[static_cast<size_t>(id)];
  }
  for (double& value : p) value /= sum;
  return p;
}

// By Gumbel noise of `position` over weights that need not be normalised.
int32_t Draw(const SampleRow& row, int64_t position, const std::vector<double>& weights) {
  int32_t best = 0;
  double best_value = -kInfinity;
  for (size_t id = 0; id < weights.size(); ++id) {
    if (weights[id] <= 0) continue;
    const auto token = static_cast<int32_t>(id);
    const double value = std::log(weights[id]) + GumbelOf(row, position, token);
    if (value <= best_value) continue;
    best = token;
    best_value = value;
  }
  return best;
}

double Margin(std::vector<double> logits) {
  std::sort(logits.rbegin(), logits.rend());
  return logits.size() < 2 || std::isinf(logits[1]) ? 0 : logits[0] - logits[1];
}

// Largest probability and entropy of the softmax.
std::pair<double, double> CertaintyOf(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  if (max == -kInfinity) return {1, 0};
  const double log_sum = LogSumExp(logits);
  double entropy = 0;
  for (const double logit : logits) {
    if (logit > -kInfinity) entropy -= std::exp(logit - log_sum) * (logit - log_sum);
  }
  return {std::exp(max - log_sum), entropy};
}

struct VerifiedToken {
  int32_t token = -1;
  bool accepted = false;
};

// draft: -1 where there is none.
VerifiedToken VerifyMatch(const SampleRow& row, const std::vector<double>& p, int32_t draft) {
  const int32_t token = Draw(row, row.position, p);
  return {token, draft == token};
}

VerifiedToken VerifyStandard(const SampleRow& row, int64_t round_position, int32_t index,
                             const std::vector<double>& p, int32_t draft, const float* q) {
  const int64_t noise = NoisePosition(round_position, StandardRule::ReplaceStream(index));
  if (draft < 0) return {Draw(row, noise, p), false};
  const auto x = static_cast<size_t>(draft);
  const double u = UniformOf(row.seed, row.output_index,
                             NoisePosition(round_position, StandardRule::AcceptStream(index)));
  if (u * static_cast<double>(q[x]) <= p[x]) return {draft, true};
  std::vector<double> residual(p.size());
  double sum = 0;
  for (size_t id = 0; id < p.size(); ++id) {
    residual[id] = std::max(0.0, p[id] - static_cast<double>(q[id]));
    sum += residual[id];
  }
  return {Draw(row, noise, sum > 0 ? residual : p), false};
}

}  // namespace

void RefCountTokens(const CountTokensArgs& args) {
  for (int64_t i = 0; i < args.token_ids.rows(); ++i) {
    uint32_t& count = args.counts.row<uint32_t>(args.slot)[*args.token_ids.row<const int32_t>(i)];
    count = args.is_prompt != 0 ? count | kPromptBit : count + 1;
  }
}

void RefSample(const SampleArgs& args) {
  for (int32_t r = 0; r < args.num_rows; ++r) {
    const SampleRow& row = args.rows[r];
    if (row.slot < 0) continue;
    if (IsBad(args.logits, row.logit_row)) {
      *args.tokens.row<int32_t>(r) = -1;
      continue;
    }
    const std::vector<double> raw = RowOf(args.logits, row.logit_row);
    std::vector<double> logits = raw;
    Penalise(row, args.counts, logits);
    if (args.margins) Set(args.margins, r, 0, Margin(logits));
    if (args.certainties) {
      const auto [top_probability, entropy] = CertaintyOf(logits);
      Set(args.certainties, r, 0, top_probability);
      Set(args.certainties, r, 1, entropy);
    }
    const std::vector<double> p = Distribution(row, logits);
    const int32_t token = Draw(row, row.position, p);
    *args.tokens.row<int32_t>(r) = token;
    if (args.counts) ++args.counts.row<uint32_t>(row.slot)[token];
    if (row.probability_row >= 0) {
      for (size_t id = 0; id < p.size(); ++id) {
        Set(args.probabilities, row.probability_row, static_cast<int64_t>(id), p[id]);
      }
    }
    if (row.num_logprobs < 0) continue;
    Set(args.logprobs, r, 0, raw[static_cast<size_t>(token)] - LogSumExp(raw));
    if (row.num_logprobs > 0) WriteTop(raw, row.num_logprobs, args.top_ids, args.top_logprobs, r);
  }
}

void RefVerifyTokens(const VerifyTokensArgs& args) {
  for (int32_t v = 0; v < args.num_verify_rows; ++v) {
    const VerifyRow& verify = args.verify_rows[v];
    const SampleRow& first = args.rows[verify.first_row];
    if (first.slot < 0) continue;
    uint32_t* const counts = args.counts.row<uint32_t>(first.slot);
    const int32_t* const drafts = args.drafts.row<const int32_t>(verify.first_draft);
    int32_t num_drafts = 0;
    while (num_drafts < verify.num_drafts && drafts[num_drafts] >= 0) ++num_drafts;
    for (int32_t i = 0; i < verify.num_drafts + verify.num_dropped; ++i) {
      if (drafts[i] >= 0) --counts[drafts[i]];
    }
    VerifiedToken verified = {.accepted = true};
    int32_t i = 0;
    for (; verified.accepted; ++i) {
      const int32_t r = verify.first_row + i;
      const SampleRow& row = args.rows[r];
      *args.tokens.row<int32_t>(r) = -1;
      verified.accepted = false;
      if (IsBad(args.logits, row.logit_row)) continue;
      const std::vector<double> raw = RowOf(args.logits, row.logit_row);
      std::vector<double> logits = raw;
      Penalise(row, args.counts, logits);
      const std::vector<double> p = Distribution(row, logits);
      const int32_t draft = i < num_drafts ? drafts[i] : -1;
      verified = verify.rule == AcceptRule::kMatch
                     ? VerifyMatch(row, p, draft)
                     : VerifyStandard(
                           row, first.position, i, p, draft,
                           draft >= 0 ? args.probabilities.row<const float>(verify.first_draft + i)
                                      : nullptr);
      *args.tokens.row<int32_t>(r) = verified.token;
      ++counts[verified.token];
      if (row.num_logprobs < 0) continue;
      Set(args.logprobs, r, 0, raw[static_cast<size_t>(verified.token)] - LogSumExp(raw));
      if (row.num_logprobs > 0) WriteTop(raw, row.num_logprobs, args.top_ids, args.top_logprobs, r);
    }
    *args.num_tokens.row<int32_t>(v) = i;
  }
}

void RefScoreTokens(const ScoreTokensArgs& args) {
  for (int64_t r = 0; r < args.logits.rows(); ++r) {
    if (IsBad(args.logits, r)) {
      Set(args.logprobs, r, 0, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    const std::vector<double> logits = RowOf(args.logits, r);
    const int32_t target = *args.targets.row<const int32_t>(r);
    Set(args.logprobs, r, 0,
        target < 0 ? 0 : logits[static_cast<size_t>(target)] - LogSumExp(logits));
    WriteTop(logits, args.num_top, args.top_ids, args.top_logprobs, r);
  }
}

}  // namespace godwit
