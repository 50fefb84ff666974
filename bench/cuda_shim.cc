// The CUDA plugin behind C functions on raw device pointers, so that compare_peers.py runs our ops
// on the tensors of the other libraries, in their process. Every function returns null, or what
// went wrong.

#include <dlfcn.h>

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/backend_abi.h"

namespace {

using godwit::DType;
using godwit::MakeView;
using godwit::TensorView;

char error_text[512];
godwit::Backend* backend = nullptr;

const char* Text(const godwit::OpStatus& status) {
  if (status.ok()) return nullptr;
  return status.text == nullptr ? "failed" : status.text;
}

}  // namespace

extern "C" {

#define GODWIT_EXPORT __attribute__((visibility("default")))

// Mirrored field by field in compare_peers.py.
struct GodwitLightning {
  void *q, *k,
      *v;  // [tokens, heads * head_dim], row_stride elements between rows; bf16, or f32 with is_f32
  void* o;  // dense
  void *theta, *decay, *fold_epsilon, *state, *window, *rows;
  int64_t num_tokens, row_stride, num_slots, window_rows, num_decode_tokens;
  int32_t heads, head_dim, num_rows, num_decode_rows, silu, is_f32, o_is_f32;
  float q_scale;
};

struct GodwitPaged {
  void *q, *k, *v;  // row_stride elements between rows; bf16
  void* o;          // [tokens, heads * head_dim] bf16
  void *cos, *sin;  // [tokens, rotary_pairs] f32, or null
  void *blocks, *block_tables, *rows;
  int64_t num_tokens, row_stride, num_blocks, num_decode_tokens;
  int32_t heads, kv_heads, head_dim, rotary_pairs, num_rows, num_decode_rows;
  float scale;
};

GODWIT_EXPORT const char* GodwitOpen(const char* plugin) {
  void* library = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  using Create = godwit::Backend* (*)(uint64_t, char*, size_t);
  const auto create = reinterpret_cast<Create>(dlsym(library, "godwit_backend_v1"));
  if (create == nullptr) return dlerror();
  backend = create(godwit::kBackendAbi, error_text, sizeof(error_text));
  return backend == nullptr ? error_text : nullptr;
}

GODWIT_EXPORT const char* GodwitLightningAttention(const GodwitLightning* x) {
  const DType act = x->is_f32 != 0 ? DType::kF32 : DType::kBF16;
  const int64_t width = int64_t{x->heads} * x->head_dim;
  const int64_t key_dim = x->theta != nullptr ? 2 * x->head_dim : x->head_dim;
  auto columns = [&](void* data) {
    TensorView view = MakeView(data, act, x->num_tokens, width);
    view.row_stride = x->row_stride;
    return view;
  };
  godwit::LightningAttentionArgs args;
  args.q = columns(x->q);
  args.k = columns(x->k);
  args.v = columns(x->v);
  args.qk_activation = x->silu != 0 ? godwit::Activation::kSilu : godwit::Activation::kNone;
  args.q_scale = x->q_scale;
  if (x->theta != nullptr) args.theta = MakeView(x->theta, DType::kF32, x->heads, x->head_dim);
  args.decay.decay = MakeView(x->decay, DType::kF32, x->heads, godwit::kPrefillBlock + 1);
  args.decay.fold_epsilon = MakeView(x->fold_epsilon, DType::kF32, x->heads, 2);
  args.num_heads = x->heads;
  args.head_dim = x->head_dim;
  args.state = MakeView(x->state, DType::kF32, x->num_slots, x->heads, key_dim, x->head_dim);
  args.window = MakeView(x->window, act, x->num_slots, x->window_rows, x->heads * key_dim + width);
  args.rows = static_cast<const godwit::StepRow*>(x->rows);
  args.num_rows = x->num_rows;
  args.num_decode_rows = x->num_decode_rows;
  args.num_decode_tokens = x->num_decode_tokens;
  args.o = MakeView(x->o, x->o_is_f32 != 0 ? DType::kF32 : DType::kBF16, x->num_tokens, width);
  return Text(backend->LightningAttention(args));
}

GODWIT_EXPORT const char* GodwitPagedAttention(const GodwitPaged* x) {
  auto columns = [&](void* data, int32_t heads) {
    TensorView view = MakeView(data, DType::kBF16, x->num_tokens, int64_t{heads} * x->head_dim);
    view.row_stride = x->row_stride;
    return view;
  };
  godwit::PagedAttentionArgs args;
  args.q = columns(x->q, x->heads);
  args.k = columns(x->k, x->kv_heads);
  args.v = columns(x->v, x->kv_heads);
  if (x->cos != nullptr) {
    args.cos = MakeView(x->cos, DType::kF32, x->num_tokens, x->rotary_pairs);
    args.sin = MakeView(x->sin, DType::kF32, x->num_tokens, x->rotary_pairs);
  }
  args.num_heads = x->heads;
  args.num_kv_heads = x->kv_heads;
  args.head_dim = x->head_dim;
  args.scale = x->scale;
  args.blocks = MakeView(x->blocks, DType::kBF16, x->num_blocks, 2, x->kv_heads,
                         int64_t{godwit::kPagedBlock} * x->head_dim);
  args.block_tables = static_cast<const int32_t*>(x->block_tables);
  args.rows = static_cast<const godwit::StepRow*>(x->rows);
  args.num_rows = x->num_rows;
  args.num_decode_rows = x->num_decode_rows;
  args.num_decode_tokens = x->num_decode_tokens;
  args.o = MakeView(x->o, DType::kBF16, x->num_tokens, int64_t{x->heads} * x->head_dim);
  return Text(backend->PagedAttention(args));
}

GODWIT_EXPORT const char* GodwitFillZero(void* data, int64_t num_bytes) {
  const godwit::ByteRange range = {data, num_bytes};
  return Text(backend->FillZero(&range, 1));
}
GODWIT_EXPORT const char* GodwitSetMark(int mark) { return Text(backend->SetMark(mark)); }
GODWIT_EXPORT const char* GodwitSecondsBetween(int from, int to, double* seconds) {
  if (const char* text = Text(backend->WaitMark(to))) return text;
  return Text(backend->SecondsBetween(from, to, seconds));
}
GODWIT_EXPORT const char* GodwitSynchronize() { return Text(backend->Synchronize()); }

}  // extern "C"
