#include "engine/model_registry.h"

#include "absl/strings/str_cat.h"
#include "engine/models/llama.h"
#include "engine/models/transnormer.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr ModelFamily kFamilies[] = {
    // Softmax attention; every RoPE table of rope_table.h; RMSNorm with weights; SwiGLU.
    {"llama", ParseLlamaConfig, LoadLlama},
    // Lightning attention with decay by ALiBi slope and layer; LRPE; SRMSNorm; SGLU.
    {"transnormer", ParseTransnormerConfig, LoadTransnormer},
};

}  // namespace

std::span<const ModelFamily> ModelFamilies() { return kFamilies; }

const ModelFamily* FindModelFamily(absl::string_view name) {
  for (const ModelFamily& family : kFamilies) {
    if (family.name == name) return &family;
  }
  return nullptr;
}

std::string ModelFamilyNames() {
  std::string names;
  for (const ModelFamily& family : kFamilies)
    absl::StrAppend(&names, names.empty() ? "'" : ", '", family.name, "'");
  return names;
}

namespace {

absl::StatusOr<std::unique_ptr<Model>> Load(const ModelConfig& config, const WeightSource& source,
                                            const ModelOptions& options, Backend& backend) {
  GODWIT_CHECK(options.max_tokens_per_step > 0);
  GODWIT_CHECK(options.dtype == DType::kF32 || options.dtype == DType::kBF16);
  if (options.world != 1 || options.rank != 0) {
    return absl::UnimplementedError(
        absl::StrCat("a model over ", options.world, " devices is not built in, only 1"));
  }
  const ModelFamily* family = FindModelFamily(config.family);
  GODWIT_CHECK(family != nullptr);
  return family->load(config, source, options, backend);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const std::string& folder,
                                                 const ModelOptions& options,
                                                 absl::string_view rope_override,
                                                 Backend& backend) {
  ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(folder, rope_override));
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsReader> reader,
                   SafetensorsReader::OpenFolder(folder));
  return Load(config, {.stored = reader.get()}, options, backend);
}

absl::StatusOr<std::unique_ptr<Model>> MakeRandomModel(absl::string_view config_json,
                                                       const ModelOptions& options,
                                                       absl::string_view rope_override,
                                                       Backend& backend) {
  ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(config_json, rope_override));
  return Load(config, {}, options, backend);
}

}  // namespace godwit
