#include "tests/engine/toy_pair.h"

#include <utility>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/head_files.h"
#include "tests/engine/toy_texts.h"
#include "tests/engine/wrapped_backend.h"

namespace godwit {
namespace {

// At such costs throughput drops about half of the drafts that it draws.
constexpr double kSecondsPerOp = 5e-7, kSecondsPerRow = 3e-8;

TinyModelOptions Toy(TinyFamily family, uint64_t seed) {
  return {.family = family,
          .seed = seed,
          .vocab_size = ToyPair::kVocabSize,
          .d_model = 32,
          .num_layers = 2,
          .num_heads = 2,
          .num_kv_heads = 1,
          .d_ff = 32,
          .scale = 0.55};
}

TinyFamily OtherFamily(TinyFamily family) {
  return family == TinyFamily::kLlama ? TinyFamily::kTransnormer : TinyFamily::kLlama;
}

OpStatus ShowDraws(Backend& inner, const SampleArgs& args) {
  const OpStatus status = inner.Sample(args);
  if (!status.ok() || !args.margins) return status;
  for (int32_t row = 0; row < args.num_rows; ++row) {
    if (args.rows[row].slot < 0) continue;
    const float* const q = args.probabilities.row<const float>(args.rows[row].probability_row);
    *args.margins.row<float>(row) = 4 * q[*args.tokens.row<const int32_t>(row)];
  }
  return status;
}

}  // namespace

ToyPair::ToyPair(const ToyPairOptions& options)
    : target_(Toy(options.target, 2)), draft_(Toy(OtherFamily(options.target), 5)) {
  if (options.with_head) {
    const HeadFiles head = RandomHead(HeadKind::kMlp, HeadLabel::kPre, draft_.options().d_model);
    EXPECT_TRUE(head.Write(draft_.folder()).ok());
  }
  WrapOptions wrap;
  wrap.fault = [this](const char*) {
    seconds_ += kSecondsPerOp;
    return OpStatus();
  };
  wrap.verify = [this, mistake = options.mistake](Backend& inner, const VerifyTokensArgs& args) {
    seconds_ += kSecondsPerRow * args.num_rows;
    return MistakenVerify(inner, args).Run(mistake);
  };
  wrap.clock = [this] { return seconds_; };
  if (options.shows_draws) wrap.sample = ShowDraws;
  std::unique_ptr<Backend, BackendDeleter> backend(
      new WrappedBackend(*CreateCpuBackend({.num_threads = 1}), std::move(wrap)));
  engine_ = MakeEngine(target_,
                       {.draft_folder = draft_.folder(),
                        .dtype = DType::kF32,
                        .max_sequences = kMaxSequences,
                        .max_tokens_per_step = 2048,
                        .kv_bytes = 8 << 20},
                       std::move(backend));
}

DriverRequest ToyRequest() {
  DriverRequest request = {.prompt = {3, 4, 1, 3, 2},
                           .max_tokens = ToyTexts::kLength + 2,
                           .draft_threshold = 0.4f,
                           .coupled = false,
                           .is_probed = false};
  request.sampling.temperature = 0.7f;
  request.sampling.frequency_penalty = 0.4f;
  return request;
}

}  // namespace godwit
