#include "tests/engine/engine_driver.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

#include "engine/rope_table.h"
#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/gpu.h"

namespace godwit {
namespace {

constexpr int64_t kProbeTokens = 3;

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) ADD_FAILURE() << value.status();
  GODWIT_CHECK(value.ok());
  return *std::move(value);
}

bool SameBitsOf(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  // An empty vector's data may be null, which memcmp does not take.
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Sequence {
  const DriverRequest* request = nullptr;
  std::vector<CacheLease> leases;      // per output
  std::vector<StoredState> stored;     // per output, while swapped out by store
  std::vector<RowOutput> row_outputs;  // per output
  std::vector<DriverOutput> outputs;
  std::shared_ptr<const RopeTable> rope;
  int64_t next = 0;  // prompt tokens submitted
  int64_t num_chunks = 0;
  std::vector<int64_t> draws_submitted;  // per output; of a step with drafts: once it is collected
  std::vector<int64_t> steps_in_flight;  // per output
  int64_t resume_step = -1;              // while swapped out
  bool was_swapped = false;

  bool prefilled() const { return next == std::ssize(request->prompt); }
  bool finished() const {
    return std::all_of(outputs.begin(), outputs.end(), [&](const DriverOutput& output) {
      return std::ssize(output.tokens) == request->max_tokens;
    });
  }
  bool in_flight() const {
    return std::any_of(steps_in_flight.begin(), steps_in_flight.end(),
                       [](int64_t count) { return count > 0; });
  }
};

class Driver {
 public:
  Driver(Engine& engine, int steps_in_flight, const std::vector<DriverRequest>& requests)
      : engine_(engine), steps_in_flight_(steps_in_flight) {
    for (const DriverRequest& request : requests) Add(request);
  }

  std::vector<DriverOutput> Run() {
    while (std::any_of(sequences_.begin(), sequences_.end(),
                       [](const Sequence& s) { return !s.finished(); })) {
      Swap();
      if (Plan()) Submit();
      if (!steps_.empty() && (idle_ || std::ssize(steps_) == steps_in_flight_)) Collect();
      ++num_steps_;
      GODWIT_CHECK(num_steps_ < 100'000);
    }
    while (!steps_.empty()) Collect();
    std::vector<DriverOutput> outputs;
    for (Sequence& sequence : sequences_) {
      for (size_t output = 0; output < sequence.outputs.size(); ++output) {
        Probe(sequence, output);
        outputs.push_back(std::move(sequence.outputs[output]));
      }
    }
    return outputs;
  }

 private:
  struct Step {
    StepId id = 0;
    std::vector<BatchRow> rows;
    std::vector<Sequence*> sequences;  // per row
    std::vector<int> outputs;  // per row: the output that a decode row continues; -1: prefill
  };

  void Add(const DriverRequest& request) {
    Sequence& sequence = sequences_.emplace_back();
    sequence.request = &request;
    sequence.rope = Rope(request);
    sequence.leases.resize(static_cast<size_t>(request.num_outputs));
    sequence.outputs.resize(static_cast<size_t>(request.num_outputs));
    sequence.draws_submitted.resize(sequence.outputs.size());
    sequence.steps_in_flight.resize(sequence.outputs.size());
    for (int output = 0; output < request.num_outputs; ++output) {
      CacheLease& lease = sequence.leases[static_cast<size_t>(output)];
      lease = Must(engine_.caches().Reserve(NumReserved(request)));
      sequence.row_outputs.push_back({.lease = &lease,
                                      .sampling = &request.sampling,
                                      .seed = request.seed,
                                      .output_index = request.output_index + output,
                                      .coupled = request.coupled});
    }
  }

  std::shared_ptr<const RopeTable> Rope(const DriverRequest& request) {
    const ModelConfig& config = engine_.card().config;
    std::optional<RopeConfig> chosen;
    if (!request.rope.empty()) chosen = Must(OverrideRope(config, request.rope, "rope"));
    return Must(RopeOfRequest(config, chosen ? &*chosen : nullptr,
                              NumRotatedPositions(std::ssize(request.prompt), request.max_tokens)));
  }

  void Swap() {
    for (Sequence& sequence : sequences_) {
      const DriverRequest& request = *sequence.request;
      if (sequence.resume_step >= 0 && num_steps_ >= sequence.resume_step) {
        if (request.swap_by_store) {
          Load(sequence);
        } else {
          for (CacheLease& lease : sequence.leases) Copy(Must(engine_.caches().SwapIn(lease)));
        }
        sequence.resume_step = -1;
      }
      if (WaitsForSwap(sequence) && !sequence.in_flight()) {
        if (request.swap_by_store) {
          Save(sequence);
        } else {
          for (CacheLease& lease : sequence.leases) Copy(Must(engine_.caches().SwapOut(lease)));
        }
        sequence.was_swapped = true;
        sequence.resume_step = num_steps_ + request.swap_steps;
      }
    }
  }

  void Save(Sequence& sequence) {
    for (CacheLease& lease : sequence.leases) {
      CacheManager::Saved saved = Must(engine_.caches().Save(lease, lease.position()));
      Copy(saved.copy);
      sequence.stored.push_back(std::move(saved.state));
      lease.Release();
    }
  }

  void Load(Sequence& sequence) {
    for (size_t output = 0; output < sequence.leases.size(); ++output) {
      sequence.leases[output] = Must(engine_.caches().Reserve(NumReserved(*sequence.request)));
      Copy(engine_.caches().Load(sequence.stored[output], sequence.leases[output]));
    }
    sequence.stored.clear();
  }

  static int64_t NumReserved(const DriverRequest& request) {
    return std::ssize(request.prompt) + request.max_tokens + kProbeTokens;
  }

  static bool WaitsForSwap(const Sequence& sequence) {
    return !sequence.was_swapped && sequence.request->swap_after >= 0 &&
           sequence.draws_submitted[0] >= sequence.request->swap_after;
  }

  void Copy(const CacheCopy& copy) {
    const absl::Status copied = engine_.Copy(std::span(&copy, 1));
    EXPECT_TRUE(copied.ok()) << copied;
  }

  // False: nothing to run in this step.
  bool Plan() {
    step_ = {};
    for (Sequence& sequence : sequences_) {
      if (num_steps_ < sequence.request->start_step || sequence.resume_step >= 0 ||
          WaitsForSwap(sequence))
        continue;
      if (!sequence.prefilled()) {
        AddPrefill(sequence);
      } else {
        for (size_t output = 0; output < sequence.leases.size(); ++output)
          AddDecode(sequence, output);
      }
    }
    idle_ = step_.rows.empty();
    return !idle_;
  }

  void AddPrefill(Sequence& sequence) {
    const DriverRequest& request = *sequence.request;
    int64_t count = std::ssize(request.prompt) - sequence.next;
    if (sequence.num_chunks < std::ssize(request.cuts)) {
      count = std::min(count, request.cuts[static_cast<size_t>(sequence.num_chunks)]);
    }
    BatchRow row = {.first_position = sequence.next,
                    .confirmed_position = sequence.leases[0].position(),
                    .prompt_length = std::ssize(request.prompt),
                    .rope = sequence.rope.get(),
                    .lease = &sequence.leases[0],
                    .max_draft_tokens = request.draft_tokens.empty() ? 0 : 1};
    row.token_ids = std::span(request.prompt)
                        .subspan(static_cast<size_t>(sequence.next), static_cast<size_t>(count));
    sequence.next += count;
    ++sequence.num_chunks;
    ++sequence.steps_in_flight[0];
    if (sequence.prefilled()) {
      row.outputs = sequence.row_outputs;
      for (int64_t& draws : sequence.draws_submitted) ++draws;
      for (size_t fork = 1; fork < sequence.outputs.size(); ++fork)
        ++sequence.steps_in_flight[fork];
    }
    Push(row, sequence, -1);
  }

  void AddDecode(Sequence& sequence, size_t output) {
    const DriverRequest& request = *sequence.request;
    const int64_t left = request.max_tokens - sequence.draws_submitted[output];
    if (left == 0) return;
    int num_drafts = 0;
    if (!request.draft_tokens.empty()) {
      if (sequence.steps_in_flight[output] > 0) return;
      const size_t index = static_cast<size_t>(num_steps_) % request.draft_tokens.size();
      num_drafts = static_cast<int>(std::min<int64_t>(request.draft_tokens[index], left - 1));
    }
    ++sequence.draws_submitted[output];
    ++sequence.steps_in_flight[output];
    CacheLease& lease = sequence.leases[output];
    Push({.confirmed_position = lease.position(),
          .prompt_length = std::ssize(request.prompt),
          .rope = sequence.rope.get(),
          .lease = &lease,
          .outputs = std::span(&sequence.row_outputs[output], 1),
          .max_draft_tokens = num_drafts,
          .draft_policy = request.draft_policy,
          .draft_threshold = request.draft_threshold},
         sequence, static_cast<int>(output));
  }

  void Push(const BatchRow& row, Sequence& sequence, int output) {
    step_.rows.push_back(row);
    step_.sequences.push_back(&sequence);
    step_.outputs.push_back(output);
  }

  void Submit() {
    step_.id = Must(engine_.Submit(step_.rows));
    steps_.push_back(std::move(step_));
  }

  void Collect() {
    const Step step = std::move(steps_.front());
    steps_.pop_front();
    const StepResult result = Must(engine_.Collect(step.id));
    GODWIT_CHECK(result.rows.size() == step.rows.size());
    for (size_t row = 0; row < step.rows.size(); ++row) {
      Sequence& sequence = *step.sequences[row];
      EXPECT_EQ(result.rows[row].num_computed, step.rows[row].lease->position());
      if (result.rows[row].outputs.empty()) --sequence.steps_in_flight[0];
      for (size_t output = 0; output < result.rows[row].outputs.size(); ++output) {
        const size_t to = step.outputs[row] < 0 ? output : static_cast<size_t>(step.outputs[row]);
        const int64_t num_accepted = std::ssize(result.rows[row].outputs[output]) - 1;
        --sequence.steps_in_flight[to];
        sequence.draws_submitted[to] += num_accepted;
        sequence.outputs[to].num_drafts += result.rows[row].num_drafts;
        sequence.outputs[to].num_accepted += num_accepted;
        sequence.outputs[to].num_dropped += result.rows[row].num_dropped;
        EXPECT_LE(num_accepted, result.rows[row].num_drafts);
        for (const SampledToken& token : result.rows[row].outputs[output]) {
          sequence.outputs[to].tokens.push_back(token);
        }
      }
    }
  }

  void Probe(Sequence& sequence, size_t output) {
    CacheLease& lease = sequence.leases[output];
    if (!sequence.request->is_probed) return;
    if (lease.bounded()) return;  // reads no more than its prompt
    const auto vocab = static_cast<int32_t>(engine_.card().config.vocab_size);
    const std::vector<int32_t> tokens = {sequence.outputs[output].tokens.back().token_id, 7 % vocab,
                                         9 % vocab};
    std::vector<float>& probe = sequence.outputs[output].probe;
    probe.resize(tokens.size() * static_cast<size_t>(engine_.card().config.vocab_size));
    const BatchRow row = {.token_ids = tokens,
                          .first_position = lease.position(),
                          .confirmed_position = lease.position(),
                          .prompt_length = std::ssize(sequence.request->prompt),
                          .rope = sequence.rope.get(),
                          .lease = &lease,
                          .logits = probe.data()};
    Must(engine_.Collect(Must(engine_.Submit(std::span(&row, 1)))));
  }

  Engine& engine_;
  int steps_in_flight_;
  std::deque<Sequence> sequences_;
  std::deque<Step> steps_;
  Step step_;
  bool idle_ = false;
  int64_t num_steps_ = 0;
};

}  // namespace

std::vector<int32_t> DriverOutput::ids() const {
  std::vector<int32_t> ids;
  for (const SampledToken& token : tokens) ids.push_back(token.token_id);
  return ids;
}

bool DriverOutput::SameBits(const DriverOutput& other) const {
  const auto logprobs = [](const DriverOutput& output) {
    std::vector<float> values;
    for (const SampledToken& token : output.tokens) {
      values.push_back(token.logprob);
      for (const TopLogprob& top : token.top) values.push_back(top.logprob);
    }
    return values;
  };
  return ids() == other.ids() && SameBitsOf(logprobs(*this), logprobs(other)) &&
         SameBitsOf(probe, other.probe);
}

std::unique_ptr<Engine> MakeEngine(const TinyModel& model, EngineOptions options) {
  return MakeEngine(model, std::move(options), Must(CreateCpuBackend({.num_threads = 2})));
}

std::unique_ptr<Engine> MakeEngine(const TinyModel& model, EngineOptions options,
                                   std::unique_ptr<Backend, BackendDeleter> backend) {
  options.model_folder = model.folder();
  return Must(Engine::Create(options, std::move(backend)));
}

std::unique_ptr<Engine> MakeDeterministicEngine(const TinyModel& model, EngineOptions options,
                                                const std::string& device) {
  options.deterministic = true;
  options.warm_up = false;
  return MakeEngine(model, std::move(options), Must(OpenDevice(device)));
}

absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> OpenDevice(const std::string& name) {
  return name == "cuda" ? OpenGpu() : CreateCpuBackend({.num_threads = 2});
}

DriverRequest RandomRequest(const TinyModel& model, uint64_t seed, int64_t prompt_length,
                            int64_t max_tokens) {
  DriverRequest request = {.prompt = RandomTokens(seed, prompt_length, model.options().vocab_size),
                           .seed = seed,
                           .max_tokens = max_tokens};
  request.sampling.num_logprobs = kMaxTopLogprobs;
  request.sampling.temperature = seed % 2 == 0 ? 0.0f : 0.8f;
  if (seed % 2 == 0) return request;
  request.sampling.top_p = 0.95f;
  request.sampling.repetition_penalty = 1.1f;
  request.sampling.frequency_penalty = 0.5f;
  return request;
}

std::vector<DriverOutput> Drive(Engine& engine, int steps_in_flight,
                                const std::vector<DriverRequest>& requests) {
  return Driver(engine, steps_in_flight, requests).Run();
}

std::vector<int32_t> RandomTokens(uint64_t seed, int64_t count, int32_t vocab_size) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> uniform(3, vocab_size - 1);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = uniform(random);
  return tokens;
}

}  // namespace godwit
