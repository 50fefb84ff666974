#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/acceptance_head.h"
#include "engine/forward_plan.h"
#include "engine/memory_plan.h"
#include "engine/rope_store.h"
#include "engine/sampler.h"
#include "engine/speculative_decoder.h"
#include "engine/state_image.h"
#include "engine/step_arena.h"
#include "engine/step_outputs.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr int64_t kMaxSequences = 1 << 16;
constexpr int64_t kMaxTokensPerStep = 1 << 20;
// What is taken where the options say 0. A GPU's weights are read once for all rows of a step, so
// both are as large as what they hold stays small beside the weights.
constexpr int64_t kSequences = 64, kGpuSequences = 256;
constexpr int64_t kTokensPerStep = 2048, kGpuTokensPerStep = 8192;
constexpr uint64_t kVerifyKey = uint64_t{1} << 62;  // of Backend::BeginReplay, steps with drafts
constexpr int kRunsToRecord = 2;              // of a step's ops, until a back end replays them
constexpr int64_t kMostTokensToRecord = 512;  // at start, of a step with drafts
constexpr int64_t kMostTokensOfRow = 8;       // the same, on average

// Of rounds of 1 to `most` drafts, each as often as recording it takes.
int64_t RoundTokens(int64_t most) { return kRunsToRecord * (most * (most + 1) / 2 + most); }

constexpr int64_t kMaxContext = (int64_t{1} << 31) - 1;  // of a model without a limit of its own

absl::Status CheckRange(absl::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " ", value, " not in [", low, ", ", high, "]"));
}

absl::Status CheckOptions(const EngineOptions& options) {
  RETURN_IF_ERROR(CheckRange("max_sequences", options.max_sequences, 0, kMaxSequences));
  // One block, so that a prompt cut at multiples of kPrefillBlock advances; and a token of every
  // sequence.
  if (options.max_tokens_per_step != 0) {
    RETURN_IF_ERROR(CheckRange("max_tokens_per_step", options.max_tokens_per_step,
                               std::max<int64_t>(kPrefillBlock, options.max_sequences),
                               kMaxTokensPerStep));
  }
  RETURN_IF_ERROR(CheckRange("kv_bytes", options.kv_bytes, 0, std::numeric_limits<int64_t>::max()));
  RETURN_IF_ERROR(
      CheckRange("swap_bytes", options.swap_bytes, 0, std::numeric_limits<int64_t>::max()));
  RETURN_IF_ERROR(
      CheckRange("store_bytes", options.store_bytes, 0, std::numeric_limits<int64_t>::max()));
  RETURN_IF_ERROR(CheckRange("prefix_cache_bytes", options.prefix_cache_bytes, kAutoPrefixCache,
                             std::numeric_limits<int64_t>::max()));
  RETURN_IF_ERROR(CheckRange("context_length", options.context_length, 0, kMaxContext));
  RETURN_IF_ERROR(CheckRange("unlimited_output", options.unlimited_output, 0, kMaxContext / 2));
  RETURN_IF_ERROR(
      CheckRange("max_steps_in_flight", options.max_steps_in_flight, 0, kMaxStepsInFlight));
  if (options.records_rounds && options.draft_folder.empty()) {
    return absl::InvalidArgumentError("records_rounds without a draft model");
  }
  if (options.dtype != DType::kBF16 && options.dtype != DType::kF32) {
    return absl::InvalidArgumentError("dtype is neither bf16 nor f32");
  }
  return absl::OkStatus();
}

// What 0 stands for, as far as no model is needed to know it.
EngineOptions WithDefaults(EngineOptions options, const DeviceInfo& device) {
  if (options.max_tokens_per_step == 0) {
    options.max_tokens_per_step =
        std::max(device.replays ? kGpuTokensPerStep : kTokensPerStep, options.max_sequences);
  }
  if (options.max_steps_in_flight == 0) options.max_steps_in_flight = device.replays ? 2 : 1;
  if (options.records_rounds) options.max_steps_in_flight = 1;
  return options;
}

int64_t DefaultSequences(const DeviceInfo& device, int64_t slot_bytes) {
  if (!device.owns_memory) return kSequences;
  return std::clamp<int64_t>(device.free_bytes / 2 / std::max<int64_t>(slot_bytes, 1), 1,
                             kGpuSequences);
}

constexpr int64_t kPrefixCacheBytes = int64_t{128} << 20;
constexpr int64_t kMaxSnapshots = 1024;

int64_t NumSnapshots(int64_t prefix_cache_bytes, const DeviceInfo& device, int64_t slot_bytes) {
  if (prefix_cache_bytes == kAutoPrefixCache) {
    prefix_cache_bytes = device.owns_memory ? device.free_bytes / 16 : kPrefixCacheBytes;
  }
  return std::min(prefix_cache_bytes / std::max<int64_t>(slot_bytes, 1), kMaxSnapshots);
}

// An operator's own length wins, also over the checkpoint's: a file that states 4096 with factor 8
// does not say whether that is before or after scaling.
int64_t ContextLength(const EngineOptions& options, const ModelConfig& config) {
  if (options.context_length > 0) return options.context_length;
  return config.context_length > 0 ? std::min(config.context_length, kMaxContext) : kMaxContext;
}

absl::Status CheckUnlimitedOutput(const EngineOptions& options, const ModelConfig& config) {
  if (options.unlimited_output == 0) return absl::OkStatus();
  const auto refuse = [&](auto... why) {
    return absl::InvalidArgumentError(absl::StrCat("unlimited output of a window of ",
                                                   options.unlimited_output, " tokens: ", why...));
  };
  if (!config.rope) {
    return refuse("model type '", config.family,
                  "' has no softmax attention; the state of lightning attention has one size at "
                  "every length, so its output is limited by the context length alone");
  }
  if (config.decay_rule != DecayRule::kNone) {
    return refuse(
        "model type '", config.family,
        "' has lightning attention beside softmax attention: its state cannot drop tokens");
  }
  if (DependsOnLength(*config.rope)) {
    return refuse("RoPE type '", config.rope->type,
                  "' depends on the length of the request, which has none");
  }
  if (!options.draft_folder.empty()) {
    return refuse("not with a draft model: drafts that are taken back would need dropped tokens");
  }
  const int64_t context = ContextLength(options, config);
  if (CacheGeometry::BoundFor(options.unlimited_output) > context) {
    return refuse("with the first and the last block that is ",
                  CacheGeometry::BoundFor(options.unlimited_output), ", beyond the context of ",
                  context, ": positions within the window would be none that the model knows");
  }
  return absl::OkStatus();
}

// Entries of the block tables of the largest step: every block once, unless sequences share some.
int64_t MaxTableEntries(const CacheGeometry& geometry, int64_t num_blocks, int64_t context_length) {
  if (!geometry.has_paged() || geometry.num_snapshots == 0) return num_blocks;
  return geometry.num_slots * std::min(num_blocks, geometry.blocks_for(context_length));
}

// Token ids, positions, rope tables, rows, block tables and turns of the largest step, besides what
// the sampler uploads.
int64_t ArenaBytes(const EngineOptions& options, const SamplerOptions& sampler,
                   int64_t num_table_entries) {
  const int64_t tokens = options.max_tokens_per_step;
  return StepArena::Footprint(tokens * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(tokens * DTypeBytes(DType::kI64)) +
         StepArena::Footprint(tokens * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(options.max_sequences * int64_t{sizeof(StepRow)}) +
         StepArena::Footprint(num_table_entries * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(options.max_sequences * int64_t{sizeof(BlockTurn)}) +
         Sampler::ArenaBytes(sampler);
}

BackendLimits Limits(const EngineOptions& options, const ModelConfig& config, int64_t num_blocks) {
  const int64_t width = config.num_heads * config.head_dim;
  const bool has_lrpe = std::find(config.lrpe_layers.begin(), config.lrpe_layers.end(), true) !=
                        config.lrpe_layers.end();
  const bool has_softmax = config.rope.has_value();
  return {.max_tokens = options.max_tokens_per_step,
          .max_rows = options.max_sequences,
          .max_input_columns = std::max({config.d_model, width, config.d_ff}),
          .max_gated_columns = config.d_ff,
          .max_key_columns = config.decay_rule == DecayRule::kNone ? 0
                             : has_lrpe                            ? 2 * width
                                                                   : width,
          .num_heads = has_softmax ? config.num_heads : 0,
          .head_dim = has_softmax ? config.head_dim : 0,
          .num_blocks = num_blocks,
          .max_draws = options.max_sequences,
          .vocab_size = config.vocab_size,
          .deterministic = options.deterministic};
}

// What an allocation that fails at start tells an operator; PlanMemory says it for itself.
absl::Status WithPlan(const absl::Status& status, const std::string& plan, int64_t free_bytes) {
  if (!absl::IsResourceExhausted(status) || absl::StrContains(status.message(), "memory plan")) {
    return status;
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      status.message(), "; memory plan: ", plan.empty() ? "not reached, weights do not fit" : plan,
      "; ", FormatBytes(free_bytes), " were free at start"));
}

// What serves both models.
BackendLimits Union(BackendLimits a, const BackendLimits& b) {
  a.max_input_columns = std::max(a.max_input_columns, b.max_input_columns);
  a.max_gated_columns = std::max(a.max_gated_columns, b.max_gated_columns);
  a.max_key_columns = std::max(a.max_key_columns, b.max_key_columns);
  a.num_heads = std::max(a.num_heads, b.num_heads);
  a.head_dim = std::max(a.head_dim, b.head_dim);
  return a;
}

SampledToken MakeToken(int32_t token_id, float logprob, const int32_t* top_ids,
                       const float* top_logprobs, int32_t num_top) {
  SampledToken token = {.token_id = token_id, .logprob = logprob};
  token.top.reserve(static_cast<size_t>(std::max(num_top, 0)));
  for (int32_t rank = 0; rank < num_top; ++rank)
    token.top.push_back({top_ids[rank], top_logprobs[rank]});
  return token;
}

}  // namespace

struct Engine::Impl {
  // A submitted step until it is collected.
  struct Step {
    StepId id = 0;
    std::vector<BatchRow> rows;
    std::vector<RowOutputs> outputs;       // per row
    std::vector<int64_t> positions_after;  // per row; before its drafts are judged: without them
    int64_t num_tokens = 0;
    std::vector<bool> asked;                    // per row: for drafts
    std::vector<std::vector<float>> predicted;  // per row, of its drafts
    bool replayable = false;                    // every row decodes, on a back end that records
    bool verifies = false;                      // some row has drafts
    bool follows = false;                       // the step before it was in flight
    bool is_new = false;                        // its ops were not replayed yet
  };

  absl::Status Init(EngineOptions options);
  absl::Status MakeModel(const EngineOptions& options);
  absl::Status LoadDraft(const EngineOptions& options);
  CacheGeometry MakeGeometry(const EngineOptions& options) const;
  absl::Status PlanCaches(const EngineOptions& options, CacheGeometry geometry);
  absl::Status MakeStepBuffers(const EngineOptions& options);
  absl::Status MakeSpeculator(const EngineOptions& options, const TensorView& counts);
  BackendLimits MakeLimits(const EngineOptions& options, int64_t num_blocks) const;
  SamplerOptions MakeSamplerOptions(const EngineOptions& options) const;
  SpeculativeDecoderOptions MakeSpeculatorOptions(const EngineOptions& options) const;
  RoundRecorderOptions MakeRecorderOptions(const EngineOptions& options) const;
  // Draws of a step, then its drafts.
  int64_t MaxDrawn(const EngineOptions& options) const;

  absl::Status RunPadding(int64_t num_rows, int64_t num_tokens, bool verifies);
  absl::Status RecordRounds();

  absl::StatusOr<ForwardPlan> Upload(const StepArrays& arrays, Step& step);
  absl::Status ZeroFreshSlots(std::span<const BatchRow> rows);
  absl::Status AssignRopes(std::span<const BatchRow> rows);
  absl::Status Fork(std::span<const BatchRow> rows, const StepArrays& arrays);
  absl::Status ForwardAndDraw(std::span<const BatchRow> rows, const StepArrays& arrays,
                              const ForwardPlan& plan);
  absl::Status Replay(const StepArrays& arrays, const ForwardPlan& plan, Step& step);
  void Pad(const StepArrays& arrays, Step& step);
  absl::Status RunPlanned(const StepArrays& arrays, Step& step);
  absl::Status Run(Step& step);
  void Commit(const StepArrays& arrays, Step& step);

  int64_t NumTokens(const Step& step, size_t row) const;
  RowResult Result(const Step& step, size_t row) const;
  bool AppendScores(const Step& step, size_t row, RowResult& result) const;
  void ResolveTokens(Step& step);
  void Measure(const Step& step, const StepResult& result);
  absl::Status Record(const Step& step);
  absl::Status CopyOne(const CacheCopy& copy);
  absl::Status CopyFromHost(const CacheCopy& copy);
  void ZeroRowsNotHeld(const CacheCopy& copy, const SlotState& from);
  absl::Status Trim(const CacheCopy& copy);
  void DropReleasedHostCopies();

  // Three marks a step: when the queue begins it, has its drafts, and has ended it. Those of the
  // step before the oldest in flight are kept too.
  static int BeginMark(StepId id) { return static_cast<int>(id % (kMaxStepsInFlight + 1)) * 3; }
  static int DraftMark(StepId id) { return BeginMark(id) + 1; }
  static int EndMark(StepId id) { return BeginMark(id) + 2; }
  static_assert(3 * (kMaxStepsInFlight + 1) <= kNumMarks);

  SlotState& slot(int32_t index) { return slots[static_cast<size_t>(index)]; }

  // Destroyed in reverse: everything that holds device memory before the back end.
  std::unique_ptr<Backend, BackendDeleter> backend;
  std::unique_ptr<Model> model;
  std::unique_ptr<Model> draft;          // null: no speculation
  std::unique_ptr<AcceptanceHead> head;  // beside the draft model, or null
  std::unique_ptr<CacheManager> caches;
  std::unique_ptr<CachePool> pool;
  std::vector<int32_t> fresh_slots;  // of ZeroFreshSlots: kept for its memory
  std::unique_ptr<Sampler> sampler;
  std::unique_ptr<StepArena> arena;
  std::optional<RopeStore> ropes;  // none for a model without RoPE
  std::unique_ptr<StepPlanner> planner;
  std::unique_ptr<StepOutputs> outputs;
  std::unique_ptr<SpeculativeDecoder> speculator;  // with a draft model
  std::unique_ptr<RoundRecorder> recorder;         // records_rounds
  ModelCard card;
  int max_steps_in_flight = 1;
  bool replays = false;  // DeviceInfo's

  // As the queue will have left them after the last submitted step; then those of snapshots.
  std::vector<SlotState> slots;
  std::map<int64_t, SlotState> host_slots;  // of swapped and stored states, by host id
  std::deque<Step> in_flight;
  StepId next_step = 0;
};

// --- Create
// -------------------------------------------------------------------------------------------------------------

SamplerOptions Engine::Impl::MakeSamplerOptions(const EngineOptions& options) const {
  return {.max_tokens_per_step = options.max_tokens_per_step,
          .num_slots = options.max_sequences,
          .vocab_size = model->config().vocab_size,
          .d_model = model->config().d_model,
          .max_drafts = card.max_draft_tokens,
          .recorder = recorder.get()};
}

SpeculativeDecoderOptions Engine::Impl::MakeSpeculatorOptions(const EngineOptions& options) const {
  return {.max_tokens_per_step = options.max_tokens_per_step,
          .num_slots = options.max_sequences,
          .num_snapshots = card.geometry.num_snapshots,
          .num_table_entries =
              MaxTableEntries(card.geometry, card.geometry.num_blocks, card.context_length),
          .max_drafts = card.max_draft_tokens,
          .first_draft = Sampler::MaxDraws(MakeSamplerOptions(options)),
          .head = head.get(),
          .recorder = recorder.get()};
}

RoundRecorderOptions Engine::Impl::MakeRecorderOptions(const EngineOptions& options) const {
  return {.num_slots = options.max_sequences,
          .max_drafts = card.max_draft_tokens,
          .vocab_size = card.config.vocab_size,
          .draft_d_model = card.draft_config.d_model};
}

int64_t Engine::Impl::MaxDrawn(const EngineOptions& options) const {
  return Sampler::MaxDraws(MakeSamplerOptions(options)) +
         options.max_sequences * card.max_draft_tokens;
}

BackendLimits Engine::Impl::MakeLimits(const EngineOptions& options, int64_t num_blocks) const {
  const BackendLimits limits = Limits(options, model->config(), num_blocks);
  return draft == nullptr ? limits : Union(limits, Limits(options, draft->config(), num_blocks));
}

// Without blocks.
CacheGeometry Engine::Impl::MakeGeometry(const EngineOptions& options) const {
  CacheGeometry geometry = {.components = model->state_components(),
                            .window_rows = WindowRows(options.max_steps_in_flight, kMaxDraftTokens),
                            .num_slots = options.max_sequences,
                            .swap_bytes = options.swap_bytes,
                            .store_bytes = options.store_bytes};
  if (options.unlimited_output > 0) {
    geometry.bound_tokens = CacheGeometry::BoundFor(options.unlimited_output);
    geometry.bound_beyond = card.context_length;
  }
  geometry.components.push_back(
      {.name = "penalties", .base_bytes = model->config().vocab_size * DTypeBytes(DType::kU32)});
  if (draft == nullptr) return geometry;
  for (StateComponent component : draft->state_components()) {
    component.name = absl::StrCat("draft.", component.name);
    geometry.components.push_back(std::move(component));
  }
  return geometry;
}

absl::Status Engine::Impl::PlanCaches(const EngineOptions& options, CacheGeometry geometry) {
  const ModelConfig& config = model->config();
  MemoryPlan plan;
  plan.geometry = std::move(geometry);
  plan.weight_bytes = model->weight_bytes();
  plan.workspace_bytes = model->workspace_bytes();
  if (draft != nullptr) {
    plan.weight_bytes += draft->weight_bytes();
    plan.workspace_bytes += draft->workspace_bytes();
  }
  if (head != nullptr) plan.weight_bytes += head->weight_bytes();
  RETURN_IF_ERROR(backend->Reserve(MakeLimits(options, 0)));  // before what is free is read
  plan.free_bytes = backend->Info().free_bytes;
  plan.owns_memory = backend->Info().owns_memory;
  const SamplerOptions sampler_options = MakeSamplerOptions(options);
  const int64_t most_blocks =
      plan.geometry.has_paged() ? plan.free_bytes / plan.geometry.block_bytes() : 0;
  const int64_t num_table_entries =
      plan.geometry.num_snapshots == 0
          ? 0
          : MaxTableEntries(plan.geometry, most_blocks, card.context_length);
  plan.step_bytes = ArenaBytes(options, sampler_options, num_table_entries) +
                    Sampler::DeviceBytes(sampler_options) +
                    StepOutputs::DeviceBytes(MaxDrawn(options), options.max_tokens_per_step);
  if (config.rope) {
    plan.step_bytes += RopeStore::DeviceBytes(config.rope->rotary_dim, options.max_sequences);
  }
  if (draft != nullptr) {
    plan.step_bytes +=
        SpeculativeDecoder::DeviceBytes(draft->config(), MakeSpeculatorOptions(options));
  }
  if (options.records_rounds) {
    plan.step_bytes += RoundRecorder::DeviceBytes(MakeRecorderOptions(options));
  }
  ASSIGN_OR_RETURN(plan, PlanMemory(std::move(plan), options.kv_bytes));
  card.weight_bytes = plan.weight_bytes;
  card.workspace_bytes = plan.workspace_bytes + plan.step_bytes;
  card.memory_plan = Describe(plan);
  RETURN_IF_ERROR(backend->Reserve(MakeLimits(options, plan.geometry.num_blocks)));
  ASSIGN_OR_RETURN(caches, CacheManager::Create(plan.geometry));
  ASSIGN_OR_RETURN(pool, CachePool::Create(*backend, plan.geometry));
  card.geometry = std::move(plan.geometry);
  return absl::OkStatus();
}

absl::Status Engine::Impl::MakeModel(const EngineOptions& options) {
  const ModelOptions model_options = {.dtype = options.dtype,
                                      .max_tokens_per_step = options.max_tokens_per_step};
  if (options.config_json.empty()) {
    ASSIGN_OR_RETURN(
        model, LoadModel(options.model_folder, model_options, options.rope_override, *backend));
  } else {
    ASSIGN_OR_RETURN(model, MakeRandomModel(options.config_json, model_options,
                                            options.rope_override, *backend));
  }
  card.config = model->config();
  card.num_parameters = model->num_parameters();
  card.dtype = options.dtype == DType::kF32 ? "f32" : "bf16";
  card.backend = backend->Info().name;
  card.device = backend->Info().description;
  card.max_tokens_per_step = options.max_tokens_per_step;
  card.max_steps_in_flight = options.max_steps_in_flight;
  card.context_length = ContextLength(options, card.config);
  return CheckUnlimitedOutput(options, card.config);
}

absl::Status Engine::Impl::LoadDraft(const EngineOptions& options) {
  if (options.draft_folder.empty()) return absl::OkStatus();
  const ModelOptions draft_options = {
      .dtype = options.dtype,
      .max_tokens_per_step = options.max_tokens_per_step,
      .first_component = static_cast<int>(model->state_components().size()) + 1};
  // Before the weights are read.
  ASSIGN_OR_RETURN(card.draft_config, ReadModelConfig(options.draft_folder, ""));
  RETURN_IF_ERROR(
      CheckDraftFits(card.config, options.model_folder, card.draft_config, options.draft_folder));
  ASSIGN_OR_RETURN(draft, LoadModel(options.draft_folder, draft_options, "", *backend));
  card.draft_num_parameters = draft->num_parameters();
  ASSIGN_OR_RETURN(
      head, AcceptanceHead::Load(options.draft_folder, card.draft_config, options.dtype, *backend));
  card.has_acceptance_head = head != nullptr;
  card.max_draft_tokens = kMaxDraftTokens;
  return absl::OkStatus();
}

absl::Status Engine::Impl::MakeStepBuffers(const EngineOptions& options) {
  if (options.records_rounds) {
    ASSIGN_OR_RETURN(recorder, RoundRecorder::Create(*backend, MakeRecorderOptions(options)));
  }
  const int penalties = static_cast<int>(model->state_components().size());
  SamplerOptions sampler_options = MakeSamplerOptions(options);
  sampler_options.counts = static_cast<uint32_t*>(pool->bases(penalties));
  ASSIGN_OR_RETURN(Sampler made_sampler, Sampler::Create(*backend, *model, sampler_options));
  sampler = std::make_unique<Sampler>(std::move(made_sampler));
  ASSIGN_OR_RETURN(StepArena made_arena,
                   StepArena::Create(
                       *backend, ArenaBytes(options, sampler_options,
                                            MaxTableEntries(card.geometry, card.geometry.num_blocks,
                                                            card.context_length))));
  arena = std::make_unique<StepArena>(std::move(made_arena));
  ASSIGN_OR_RETURN(StepOutputs made_outputs,
                   StepOutputs::Create(*backend, MaxDrawn(options), options.max_tokens_per_step));
  outputs = std::make_unique<StepOutputs>(std::move(made_outputs));
  if (card.config.rope) {
    ASSIGN_OR_RETURN(const RopeTable own, MakeRopeTable(*card.config.rope));
    ASSIGN_OR_RETURN(ropes, RopeStore::Create(*backend, own, options.max_sequences));
    card.rope_regime = own.regime;
  }
  planner =
      std::make_unique<StepPlanner>(StepLimits{.max_tokens = options.max_tokens_per_step,
                                               .num_slots = options.max_sequences,
                                               .window_rows = card.geometry.window_rows,
                                               .vocab_size = card.config.vocab_size,
                                               .first_draft = Sampler::MaxDraws(sampler_options),
                                               .bound_tokens = card.geometry.bound_tokens,
                                               .max_drafts = card.max_draft_tokens});
  RETURN_IF_ERROR(MakeSpeculator(options, MakeView(sampler_options.counts, DType::kU32,
                                                   options.max_sequences, card.config.vocab_size)));
  slots.resize(static_cast<size_t>(options.max_sequences + card.geometry.num_snapshots));
  max_steps_in_flight = options.max_steps_in_flight;
  return absl::OkStatus();
}

absl::Status Engine::Impl::MakeSpeculator(const EngineOptions& options, const TensorView& counts) {
  if (draft == nullptr) return absl::OkStatus();
  const TensorView drawn = MakeView(outputs->device_draws().tokens, DType::kI32, MaxDrawn(options));
  ASSIGN_OR_RETURN(speculator, SpeculativeDecoder::Create(*backend, *draft, *pool, counts, drawn,
                                                          MakeSpeculatorOptions(options)));
  return absl::OkStatus();
}

absl::Status Engine::Impl::Init(EngineOptions options) {
  RETURN_IF_ERROR(CheckOptions(options));
  const DeviceInfo device = backend->Info();
  replays = device.replays;
  options = WithDefaults(std::move(options), device);
  RETURN_IF_ERROR(MakeModel(options));
  RETURN_IF_ERROR(LoadDraft(options));
  CacheGeometry geometry = MakeGeometry(options);
  if (options.max_sequences == 0) {
    options.max_sequences = geometry.num_slots = std::min(
        DefaultSequences(backend->Info(), geometry.slot_bytes()), options.max_tokens_per_step);
  }
  geometry.num_snapshots =
      NumSnapshots(options.prefix_cache_bytes, backend->Info(), geometry.slot_bytes());
  RETURN_IF_ERROR(PlanCaches(options, std::move(geometry)));
  return MakeStepBuffers(options);
}

// What a first request would wait for: whatever a back end loads or chooses when it sees a prompt
// of full length or a row with drafts, and the recordings of all numbers of rows. Padding alone
// makes a decode step, so only the first two need a slot, which is zeroed again when it is handed
// out.
absl::Status Engine::WarmUp() {
  Impl& impl = *impl_;
  const ModelCard& card = impl.card;
  int64_t room = std::min(card.max_tokens_per_step, card.context_length);
  if (card.geometry.has_paged()) room = std::min(room, card.geometry.num_blocks * kPagedBlock);
  const auto num_drafts = static_cast<int>(std::clamp<int64_t>(room - 2, 0, card.max_draft_tokens));
  // Rounds of every number of drafts, where there is room.
  const int64_t all = RoundTokens(num_drafts);
  const bool has_room = all < room / 2;
  const int64_t length = num_drafts == 0 ? room : room - 1 - (has_room ? all : num_drafts);
  {
    const std::vector<int32_t> prompt(static_cast<size_t>(length), 0);
    const SamplingParams sampling = {.temperature = 0};
    ASSIGN_OR_RETURN(CacheLease lease, caches().Reserve(room));
    const RowOutput output = {.lease = &lease, .sampling = &sampling};
    BatchRow row = {.token_ids = prompt,
                    .prompt_length = length,
                    .lease = &lease,
                    .outputs = std::span(&output, 1),
                    .max_draft_tokens = num_drafts};
    ASSIGN_OR_RETURN(StepId id, Submit(std::span(&row, 1)));
    RETURN_IF_ERROR(Collect(id).status());
    row.token_ids = {};
    for (int round = 0; round < (has_room ? kRunsToRecord * num_drafts : num_drafts > 0); ++round) {
      row.max_draft_tokens = num_drafts - round / kRunsToRecord;
      row.confirmed_position = lease.position();
      ASSIGN_OR_RETURN(id, Submit(std::span(&row, 1)));
      RETURN_IF_ERROR(Collect(id).status());
    }
  }
  const int64_t most = card.geometry.num_slots;
  for (int64_t num_rows = 0; num_rows < most;) {
    num_rows = PaddedRows(num_rows + 1, most);
    for (int run = 0; run < kRunsToRecord; ++run) {
      RETURN_IF_ERROR(impl.RunPadding(num_rows, num_rows, false));
    }
  }
  if (impl.speculator == nullptr) return absl::OkStatus();
  RETURN_IF_ERROR(impl.RecordRounds());
  impl.speculator->ForgetCosts();
  return absl::OkStatus();
}

// Passes of the draft model, and the steps that judge them as far as recording makes them faster:
// the ops of many tokens take longer than their launches.
absl::Status Engine::Impl::RecordRounds() {
  RETURN_IF_ERROR(speculator->WarmUp(kRunsToRecord));
  const int64_t most =
      std::min({sampler->max_logits(), card.max_tokens_per_step, kMostTokensToRecord});
  int64_t fewer = 0;  // rows that the numbers before are for
  for (int64_t num_rows = 0; fewer < card.geometry.num_slots; fewer = num_rows) {
    num_rows = PaddedCoarsely(fewer + 1, card.geometry.num_slots, 1);
    const int64_t most_tokens = std::min(num_rows * kMostTokensOfRow, most);
    for (int64_t num_tokens = fewer + 1; num_tokens <= most_tokens; ++num_tokens) {
      num_tokens = PaddedTokens(num_tokens, most);
      for (int run = 0; run < kRunsToRecord; ++run) {
        RETURN_IF_ERROR(RunPadding(num_rows, num_tokens, true));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::Impl::RunPadding(int64_t num_rows, int64_t num_tokens, bool verifies) {
  const StepArrays& arrays = planner->Plan({}, slots);
  planner->Pad(num_rows, num_tokens);
  Step step = {.id = next_step, .replayable = true, .verifies = verifies};
  RETURN_IF_ERROR(RunPlanned(arrays, step));
  return ToStatus(backend->Synchronize());
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    const EngineOptions& options, std::unique_ptr<Backend, BackendDeleter> backend) {
  auto impl = std::make_unique<Impl>();
  impl->backend = std::move(backend);
  const int64_t free_bytes = impl->backend->Info().free_bytes;
  if (const absl::Status status = impl->Init(options); !status.ok()) {
    return WithPlan(status, impl->card.memory_plan, free_bytes);
  }
  std::unique_ptr<Engine> engine(new Engine(std::move(impl)));
  if (options.warm_up && engine->impl_->replays) {
    if (const absl::Status status = engine->WarmUp(); !status.ok()) {
      return WithPlan(status, engine->card().memory_plan, free_bytes);
    }
  }
  return engine;
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;
const ModelCard& Engine::card() const { return impl_->card; }
CacheManager& Engine::caches() { return *impl_->caches; }

// --- Submit
// -------------------------------------------------------------------------------------------------------------

absl::StatusOr<ForwardPlan> Engine::Impl::Upload(const StepArrays& arrays, Step& step) {
  arena->Begin(step.id);
  ForwardPlan plan;
  plan.num_tokens = std::ssize(arrays.token_ids);
  plan.num_decode_tokens = arrays.num_decode_tokens;
  plan.token_ids = MakeView(arena->Push(arrays.token_ids), DType::kI32, plan.num_tokens);
  plan.drawn = MakeView(outputs->device_draws().tokens, DType::kI32,
                        card.geometry.num_slots * (1 + 2 * card.max_draft_tokens));
  plan.positions = MakeView(arena->Push(arrays.positions), DType::kI64, plan.num_tokens);
  if (ropes) {
    plan.rope_table_ids =
        MakeView(arena->Push(arrays.rope_table_ids), DType::kI32, plan.num_tokens);
    plan.rope_tables = ropes->tables();
    plan.num_rope_tables = ropes->num_tables();
  }
  plan.rows = arena->Push(arrays.rows);
  plan.num_rows = static_cast<int32_t>(arrays.rows.size());
  plan.num_decode_rows = arrays.num_decode_rows;
  const std::span<const RowOutputs> row_outputs =
      sampler->Plan(step.rows, arrays,
                    {.num_draws = step.replayable ? plan.num_tokens : 0,
                     .num_verify = step.replayable && step.verifies ? plan.num_rows : 0},
                    *arena);
  step.outputs.assign(row_outputs.begin(), row_outputs.end());
  plan.block_tables = arena->Push(arrays.block_tables);
  plan.turns = arena->Push(arrays.turns);
  plan.num_turns = static_cast<int32_t>(arrays.turns.size());
  sampler->PushBiases(*arena);
  RETURN_IF_ERROR(arena->Upload());
  return plan;
}

absl::Status Engine::Impl::ZeroFreshSlots(std::span<const BatchRow> rows) {
  fresh_slots.clear();
  for (const BatchRow& row : rows) {
    if (row.lease->fresh()) fresh_slots.push_back(row.lease->slot());
  }
  return pool->ZeroSlots(fresh_slots);
}

// A slot's table is the row's: after a fork or a move the first row in the new slot brings it.
absl::Status Engine::Impl::AssignRopes(std::span<const BatchRow> rows) {
  for (const BatchRow& row : rows) {
    if (row.rope == nullptr) continue;
    GODWIT_CHECK(ropes.has_value());
    RETURN_IF_ERROR(ropes->Assign(row.lease->slot(), *row.rope));
  }
  return absl::OkStatus();
}

absl::Status Engine::Impl::Fork(std::span<const BatchRow> rows, const StepArrays& arrays) {
  for (size_t batch_row = 0; batch_row < rows.size(); ++batch_row) {
    const BatchRow& row = rows[batch_row];
    if (row.outputs.size() < 2) continue;
    const StepRow& step_row = arrays.rows[static_cast<size_t>(arrays.row_of_batch[batch_row])];
    const int64_t position = step_row.position + step_row.num_tokens;
    const int64_t num_blocks = card.geometry.blocks_for(position);
    const auto blocks = [&](const CacheLease& lease) {
      return std::vector<int32_t>(lease.blocks().begin(), lease.blocks().begin() + num_blocks);
    };
    for (const RowOutput& output : row.outputs.subspan(1)) {
      RETURN_IF_ERROR(pool->Copy({.kind = CacheCopy::Kind::kFork,
                                  .from_slot = row.lease->slot(),
                                  .to_slot = output.lease->slot(),
                                  .from_blocks = blocks(*row.lease),
                                  .to_blocks = blocks(*output.lease),
                                  .position = position}));
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::Impl::ForwardAndDraw(std::span<const BatchRow> rows, const StepArrays& arrays,
                                          const ForwardPlan& plan) {
  ASSIGN_OR_RETURN(const TensorView hidden, model->Forward(plan, *pool));
  RETURN_IF_ERROR(sampler->CountPrompts(arrays, plan.token_ids));
  RETURN_IF_ERROR(Fork(rows, arrays));
  const Sampler::Drafts drafts = speculator == nullptr ? Sampler::Drafts() : speculator->drafts();
  RETURN_IF_ERROR(sampler->Draw(hidden, drafts, *outputs));
  return sampler->Score(hidden, *outputs);
}

// A step of decode rows is a function of its numbers of rows and tokens, and of whether there are
// drafts: everything else is in the arena.
absl::Status Engine::Impl::Replay(const StepArrays& arrays, const ForwardPlan& plan, Step& step) {
  bool replayed = false;
  const uint64_t key = (step.verifies ? kVerifyKey : 0) |
                       static_cast<uint64_t>(plan.num_rows) << 32 |
                       static_cast<uint64_t>(plan.num_tokens);
  absl::Status status = ToStatus(backend->BeginReplay(key, &replayed));
  if (status.ok() && !replayed) status = ForwardAndDraw(step.rows, arrays, plan);
  step.is_new = !replayed;
  const absl::Status ended = ToStatus(backend->EndReplay());
  return status.ok() ? ended : status;
}

// A step of decode rows, unless it has more draws than there are rows of logits.
void Engine::Impl::Pad(const StepArrays& arrays, Step& step) {
  const int64_t num_rows = std::ssize(arrays.rows);
  step.verifies = arrays.num_draft_rows > 0;
  if (!step.verifies) {
    const int64_t padded_rows = PaddedRows(num_rows, card.geometry.num_slots);
    planner->Pad(padded_rows, padded_rows);
    step.replayable = true;
    return;
  }
  // Rows of padding have no tokens here, so there may be many; they share a draw of padding.
  const int64_t padded_rows = PaddedCoarsely(num_rows, card.geometry.num_slots, 1);
  const int64_t num_tokens = step.num_tokens + (padded_rows > num_rows ? 1 : 0);
  const int64_t most = std::min(sampler->max_logits(), card.max_tokens_per_step);
  step.replayable = num_tokens <= most;
  if (step.replayable) planner->Pad(padded_rows, PaddedTokens(num_tokens, most));
}

// The step of the target.
absl::Status Engine::Impl::RunPlanned(const StepArrays& arrays, Step& step) {
  ASSIGN_OR_RETURN(const ForwardPlan plan, Upload(arrays, step));
  if (plan.num_turns > 0) RETURN_IF_ERROR(model->TurnKeys(plan, *pool));
  RETURN_IF_ERROR(step.replayable ? Replay(arrays, plan, step)
                                  : ForwardAndDraw(step.rows, arrays, plan));
  return sampler->ReadBack(step.id, *outputs);
}

// Drafts, then the step of the target that judges them.
absl::Status Engine::Impl::Run(Step& step) {
  RETURN_IF_ERROR(backend->SetMark(BeginMark(step.id)));
  RETURN_IF_ERROR(ZeroFreshSlots(step.rows));
  RETURN_IF_ERROR(AssignRopes(step.rows));
  for (const BatchRow& row : step.rows) step.asked.push_back(HasDrafts(row));
  if (speculator != nullptr && !in_flight.empty()) {
    const StepId before = in_flight.back().id;
    RETURN_IF_ERROR(speculator->KeepSigns(before, DraftMark(before)));
  }
  if (speculator != nullptr) RETURN_IF_ERROR(speculator->Draft(step.id, step.rows, slots));
  RETURN_IF_ERROR(backend->SetMark(DraftMark(step.id)));
  const StepArrays& arrays = planner->Plan(step.rows, slots);
  step.num_tokens = std::ssize(arrays.token_ids);
  if (replays && arrays.num_decode_rows == std::ssize(arrays.rows)) Pad(arrays, step);
  RETURN_IF_ERROR(RunPlanned(arrays, step));
  RETURN_IF_ERROR(backend->SetMark(EndMark(step.id)));
  Commit(arrays, step);
  return absl::OkStatus();
}

void Engine::Impl::Commit(const StepArrays& arrays, Step& step) {
  for (size_t batch_row = 0; batch_row < step.rows.size(); ++batch_row) {
    const BatchRow& row = step.rows[batch_row];
    const StepRow& step_row = arrays.rows[static_cast<size_t>(arrays.row_of_batch[batch_row])];
    const bool has_drafts = HasDrafts(row);
    const int64_t num_tokens = has_drafts ? 0 : step_row.num_tokens;
    const int64_t position = arrays.positions[static_cast<size_t>(step_row.first_token)];
    const SlotState after = {
        .position = position + num_tokens, .base = step_row.base_after, .unresolved = has_drafts};
    step.positions_after.push_back(after.position);
    slot(row.lease->slot()) = after;
    row.lease->clear_fresh();
    if (has_drafts) continue;
    int32_t draw = static_cast<int32_t>(step.outputs[batch_row].draw_begin);
    for (const RowOutput& output : row.outputs) {
      SlotState& state = slot(output.lease->slot());
      state = after;
      state.pending_step = step.id;
      state.pending_draw = draw++;
      output.lease->clear_fresh();
      if (speculator != nullptr && output.lease != row.lease) {
        speculator->Fork(row.lease->slot(), output.lease->slot());
      }
    }
  }
}

absl::StatusOr<StepId> Engine::Submit(std::span<const BatchRow> rows) {
  Impl& impl = *impl_;
  GODWIT_CHECK(std::ssize(impl.in_flight) < impl.max_steps_in_flight);
  impl.DropReleasedHostCopies();
  RETURN_IF_ERROR(impl.planner->Check(rows, impl.slots));
  for (const BatchRow& row : rows) {
    // A token that the host has not seen is read where the last step left it.
    const StepId pending = StartState(*row.lease, impl.slots).pending_step;
    GODWIT_CHECK(pending < 0 || pending + 1 == impl.next_step);
  }
  Impl::Step step = {
      .id = impl.next_step, .rows = {rows.begin(), rows.end()}, .follows = !impl.in_flight.empty()};
  RETURN_IF_ERROR(impl.Run(step));
  if (impl.speculator != nullptr) impl.speculator->Learn();
  ++impl.next_step;
  impl.in_flight.push_back(std::move(step));
  return impl.in_flight.back().id;
}

// --- Collect
// ------------------------------------------------------------------------------------------------------------

// That an output of the row drew.
int64_t Engine::Impl::NumTokens(const Step& step, size_t row_index) const {
  const int32_t verify = step.outputs[row_index].verify;
  return verify < 0 ? 1 : sampler->num_tokens(step.id, verify);
}

RowResult Engine::Impl::Result(const Step& step, size_t row_index) const {
  const BatchRow& row = step.rows[row_index];
  const RowOutputs& range = step.outputs[row_index];
  RowResult result;
  result.num_computed = step.positions_after[row_index];
  result.num_drafts = HasDrafts(row) ? row.max_draft_tokens : 0;
  result.num_dropped = row.num_dropped;
  if (step.asked[row_index]) result.draft_stop = row.draft_limit;
  if (!step.predicted.empty()) result.predicted = step.predicted[row_index];
  const OutputArrays& draws = outputs->draws(step.id);
  const int64_t num_tokens = NumTokens(step, row_index);
  bool failed = false;
  for (size_t output = 0; output < row.outputs.size(); ++output) {
    const int32_t num_logprobs = row.outputs[output].sampling->num_logprobs;
    std::vector<SampledToken>& tokens = result.outputs.emplace_back();
    for (int64_t token = 0; token < num_tokens; ++token) {
      const int64_t draw = range.draw_begin + static_cast<int64_t>(output) + token;
      failed |= draws.tokens[draw] < 0;
      tokens.push_back(MakeToken(draws.tokens[draw],
                                 num_logprobs >= 0 ? draws.logprobs[draw] : 0.0f,
                                 draws.top_ids + draw * kMaxTopLogprobs,
                                 draws.top_logprobs + draw * kMaxTopLogprobs, num_logprobs));
    }
  }
  if (!row.score_targets.empty()) failed |= !AppendScores(step, row_index, result);
  if (failed) {
    result.status = absl::InternalError(
        absl::StrCat("logits at position ", result.num_computed - 1, " hold a NaN or infinity"));
  }
  return result;
}

// False: a score is no number.
bool Engine::Impl::AppendScores(const Step& step, size_t row_index, RowResult& result) const {
  const BatchRow& row = step.rows[row_index];
  const RowOutputs& range = step.outputs[row_index];
  const OutputArrays& scores = outputs->scores(step.id);
  bool numbers = true;
  int64_t score = 0;
  for (const int32_t target : row.score_targets) {
    // With row.logits every token was scored, else only those with a target.
    if (target >= 0) {
      const int64_t top = StepOutputs::ScoreTop(range.score_begin, score, range.num_score_top);
      result.scores.push_back(MakeToken(target, scores.logprobs[range.score_begin + score],
                                        scores.top_ids + top, scores.top_logprobs + top,
                                        range.num_score_top));
      numbers &= !std::isnan(result.scores.back().logprob);
    }
    if (target >= 0 || row.logits != nullptr) ++score;
  }
  GODWIT_CHECK(score == range.score_end - range.score_begin);
  return numbers;
}

// The host now knows the tokens that this step drew. A slot that a later step has written since
// keeps what that said. What could not be drawn counts as token 0: its sequence is about to end.
void Engine::Impl::ResolveTokens(Step& step) {
  const int32_t* const drawn = outputs->draws(step.id).tokens;
  if (speculator != nullptr) step.predicted.resize(step.rows.size());
  for (size_t row_index = 0; row_index < step.rows.size(); ++row_index) {
    const BatchRow& row = step.rows[row_index];
    int64_t draw = step.outputs[row_index].draw_begin;
    const int64_t num_tokens = NumTokens(step, row_index);
    // The state holds the row's old input and the drafts that stand: all but the last token.
    if (HasDrafts(row)) step.positions_after[row_index] += num_tokens;
    row.lease->set_position(step.positions_after[row_index]);
    for (const RowOutput& output : row.outputs) {
      output.lease->set_position(step.positions_after[row_index]);
      const std::span tokens(drawn + draw++, static_cast<size_t>(num_tokens));
      SlotState& state = slot(output.lease->slot());
      if (HasDrafts(row)) {
        GODWIT_CHECK(state.unresolved);
        state.position = step.positions_after[row_index];
        state.last_token = std::max(tokens.back(), 0);
        state.unresolved = false;
      } else if (state.pending_step == step.id) {
        state.last_token = std::max(tokens.back(), 0);
        state.pending_step = -1;
      }
      if (speculator != nullptr) {
        std::vector<float> predicted =
            speculator->Accept(step.id, output.lease->slot(), tokens,
                               HasDrafts(row) ? row.max_draft_tokens : 0, row.num_dropped);
        if (HasDrafts(row)) step.predicted[row_index] = std::move(predicted);
      }
    }
  }
}

// What a step without prompts cost.
void Engine::Impl::Measure(const Step& step, const StepResult& result) {
  if (step.is_new) return;  // recording it took as long as many of its kind
  int64_t num_tokens = 0;
  for (size_t row = 0; row < step.rows.size(); ++row) {
    if (!step.rows[row].token_ids.empty()) return;
    num_tokens += NumTokens(step, row);
  }
  speculator->Measure(step.id, std::ssize(step.rows),
                      {.draft_seconds = result.draft_seconds,
                       .num_rows = step.num_tokens,
                       .verify_seconds = result.forward_seconds - result.draft_seconds,
                       .num_tokens = num_tokens});
}

absl::Status Engine::Impl::Record(const Step& step) {
  std::vector<RoundRecorder::Round> rounds;
  for (size_t row_index = 0; row_index < step.rows.size(); ++row_index) {
    const BatchRow& row = step.rows[row_index];
    if (!HasDrafts(row)) continue;
    const RowOutput& output = row.outputs[0];
    rounds.push_back({.batch_row = static_cast<int32_t>(row_index),
                      .num_drafts = row.max_draft_tokens,
                      .num_accepted = static_cast<int32_t>(NumTokens(step, row_index)) - 1,
                      .temperature = output.sampling->temperature,
                      .coupled = IsCoupled(output)});
  }
  return recorder->Read(rounds, speculator->drafts().tokens, speculator->drafts().probabilities);
}

std::span<const RecordedDraft> Engine::recorded() const { return impl_->recorder->drafts(); }

absl::StatusOr<StepResult> Engine::Collect(StepId id) {
  Impl& impl = *impl_;
  GODWIT_CHECK(!impl.in_flight.empty());
  GODWIT_CHECK(impl.in_flight.front().id == id);
  Impl::Step step = std::move(impl.in_flight.front());
  impl.in_flight.pop_front();
  StepResult result;
  const auto before = std::chrono::steady_clock::now();
  RETURN_IF_ERROR(impl.backend->WaitMark(Impl::EndMark(id)));
  result.wait_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  result.num_tokens = step.num_tokens;
  RETURN_IF_ERROR(impl.backend->SecondsBetween(Impl::BeginMark(id), Impl::EndMark(id),
                                               &result.forward_seconds));
  RETURN_IF_ERROR(impl.backend->SecondsBetween(Impl::BeginMark(id), Impl::DraftMark(id),
                                               &result.draft_seconds));
  if (step.follows) {
    double seconds = 0;
    RETURN_IF_ERROR(
        impl.backend->SecondsBetween(Impl::EndMark(id - 1), Impl::BeginMark(id), &seconds));
    result.idle_seconds = std::max(seconds, 0.0);
  }
  impl.ResolveTokens(step);
  if (impl.speculator != nullptr) {
    if (!impl.replays) impl.speculator->Learn();  // nothing runs meanwhile
    impl.Measure(step, result);
  }
  if (impl.recorder != nullptr) RETURN_IF_ERROR(impl.Record(step));
  result.rows.reserve(step.rows.size());
  for (size_t row = 0; row < step.rows.size(); ++row) result.rows.push_back(impl.Result(step, row));
  return result;
}

// --- Copy
// ---------------------------------------------------------------------------------------------------------------

absl::Status Engine::Impl::CopyFromHost(const CacheCopy& copy) {
  const auto found = host_slots.find(copy.host_id);
  GODWIT_CHECK(found != host_slots.end());
  GODWIT_CHECK(found->second.position == copy.position);
  RETURN_IF_ERROR(pool->Copy(copy));
  slot(copy.to_slot) = found->second;
  if (copy.kind == CacheCopy::Kind::kLoad) {
    if (speculator != nullptr) speculator->Load(copy.host_id, copy.to_slot);
    return absl::OkStatus();
  }
  host_slots.erase(found);
  if (speculator != nullptr) speculator->SwapIn(copy.host_id, copy.to_slot);
  return absl::OkStatus();
}

// Nothing was folded beyond what the host had confirmed, so that the rows of what is cut off are
// just not read again.
absl::Status Engine::Impl::Trim(const CacheCopy& copy) {
  SlotState& state = slot(copy.from_slot);
  GODWIT_CHECK(state.pending_step < 0 && !state.unresolved);
  GODWIT_CHECK(state.base <= copy.position && copy.position <= state.position);
  state.position = copy.position;
  state.last_token = copy.next_token;
  if (speculator != nullptr) speculator->Trim(copy.from_slot, copy.position, copy.next_token);
  return sampler->Uncount(copy.from_slot, copy.dropped_tokens);
}

// A stored state may be exported (a swapped one is not). Rows from the base to the position are
// read again; the draft's by its own.
void Engine::Impl::ZeroRowsNotHeld(const CacheCopy& copy, const SlotState& from) {
  const auto add = [](const std::vector<StateComponent>& components, int64_t base, int64_t position,
                      std::vector<CachePool::HeldRows>& held) {
    for (const StateComponent& component : components) {
      held.push_back({.begin = component.paged() ? 0 : base, .end = position});
    }
  };
  std::vector<CachePool::HeldRows> held;
  add(model->state_components(), from.base, from.position, held);
  held.emplace_back();  // penalty counts have no rows
  if (draft != nullptr) {
    const DraftImage image = speculator->Export(copy.host_id).value_or(DraftImage{});
    add(draft->state_components(), image.base, image.position, held);
  }
  pool->ZeroRowsNotHeld(copy, held);
}

absl::Status Engine::Impl::CopyOne(const CacheCopy& copy) {
  if (copy.kind == CacheCopy::Kind::kSwapIn || copy.kind == CacheCopy::Kind::kLoad) {
    return CopyFromHost(copy);
  }
  if (copy.kind == CacheCopy::Kind::kTrim) return Trim(copy);
  // Copied where no step in flight can still change it; position 0: never used, so the slot's
  // record is another sequence's.
  const SlotState from = copy.position == 0 ? SlotState{} : slot(copy.from_slot);
  GODWIT_CHECK(from.position == copy.position);
  GODWIT_CHECK(from.pending_step < 0 && !from.unresolved);
  RETURN_IF_ERROR(pool->Copy(copy));
  if (speculator != nullptr && copy.position == 0) speculator->Forget(copy.from_slot);
  if (copy.kind == CacheCopy::Kind::kFork) {
    slot(copy.to_slot) = from;
    if (speculator != nullptr) speculator->Fork(copy.from_slot, copy.to_slot);
    return absl::OkStatus();
  }
  host_slots[copy.host_id] = from;
  const bool saves = copy.kind == CacheCopy::Kind::kSave;
  if (speculator != nullptr && saves) speculator->Save(copy.from_slot, copy.host_id);
  if (speculator != nullptr && !saves) speculator->SwapOut(copy.from_slot, copy.host_id);
  if (saves) ZeroRowsNotHeld(copy, from);
  return absl::OkStatus();
}

void Engine::Impl::DropReleasedHostCopies() {
  const std::vector<int64_t> host_ids = caches->TakeReleasedHostIds();
  pool->DropHostCopies(host_ids);
  for (const int64_t host_id : host_ids) host_slots.erase(host_id);
  if (speculator != nullptr) speculator->Drop(host_ids);
}

std::shared_ptr<const StateImage> Engine::ExportState(int64_t host_id) {
  const auto state = impl_->host_slots.find(host_id);
  GODWIT_CHECK(state != impl_->host_slots.end());
  const CachePool::HostCopy& copy = impl_->pool->host_copy(host_id);
  auto image = std::make_shared<StateImage>();
  image->position = state->second.position;
  image->base = state->second.base;
  image->last_token = state->second.last_token;
  if (impl_->speculator != nullptr) image->draft = impl_->speculator->Export(host_id);
  image->bytes = copy.bytes;
  image->num_bytes = copy.num_bytes;
  return image;
}

absl::Status Engine::ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) {
  if (image->num_bytes != impl_->caches->StateBytes(image->position)) {
    return absl::InvalidArgumentError(absl::StrCat("a state of ", image->position, " tokens has ",
                                                   image->num_bytes, " bytes, expected ",
                                                   impl_->caches->StateBytes(image->position)));
  }
  impl_->host_slots[host_id] = {
      .position = image->position, .base = image->base, .last_token = image->last_token};
  if (impl_->speculator != nullptr) impl_->speculator->Import(host_id, image->draft);
  impl_->pool->Adopt(host_id, {.bytes = image->bytes, .num_bytes = image->num_bytes});
  return absl::OkStatus();
}

absl::Status Engine::Copy(std::span<const CacheCopy> copies) {
  for (const CacheCopy& copy : copies) RETURN_IF_ERROR(impl_->CopyOne(copy));
  impl_->DropReleasedHostCopies();
  return absl::OkStatus();
}

}  // namespace godwit
