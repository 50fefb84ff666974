#pragma once
// The ops: each struct's comment is its specification. Every back end implements each op;
// kernels/ref holds the obvious loops with double accumulators (tests only); Validate() in ops.cc
// is shared by all back ends.
//
// Notation: T tokens of a step, R logit rows, V vocabulary, d model width. "act" is the activation
// type: bf16, or f32 when the model computes in f32 throughout. Accumulators are f32. A value is
// rounded to act exactly where this page says so.
//
// Token order of a step: decode (and draft, verify) tokens first, then prefill tokens. Ops whose
// arithmetic depends on the phase take `num_decode_tokens`: tokens [0, num_decode_tokens) are
// computed by path D, the rest by path P. Inside a path the bits of a row never depend on how many
// rows the step has, nor on their neighbours (batch invariance).
//
// Padding. A step that is replayed (Backend::BeginReplay) has a fixed number of tokens, rows and
// draws; what it does not need is padding: a StepRow of no tokens, a SampleRow of slot -1. Padding
// rows touch no slot, no block and no output. Tokens that belong to no row are computed row by row
// like any other (their values go nowhere); outputs of attention for them are unspecified but
// written or finite before, so that they poison nothing.

#include <cstdint>

#include "kernels/base/tensor.h"

namespace godwit {

inline constexpr int kWindow = 16;  // W: rows of an open window of lightning attention
inline constexpr int kPrefillBlock =
    64;  // P: prompt rows folded as one block; prompts are cut only at multiples of P
inline constexpr int kPagedBlock = 16;  // tokens of a KV block
inline constexpr int kAttentionSplit =
    1024;  // softmax attention merges partial results of fixed ranges of this many keys
static_assert(kPrefillBlock % kWindow == 0);
static_assert(kAttentionSplit % kPagedBlock == 0);

enum class Activation : int32_t { kNone = 0, kSilu = 1 };
enum class NormKind : int32_t { kNone = 0, kRms = 1 };  // SRMSNorm is kRms without a weight

// y = x / sqrt(mean(x^2) + epsilon) * (weight_offset + weight), over the whole row, in f32.
struct NormSpec {
  NormKind kind = NormKind::kNone;
  TensorView weight;  // [d] f32, or absent: factor 1 (SRMSNorm)
  float epsilon = 0;
  float weight_offset = 0;  // 0 Llama, 1 Gemma
};

// The input of a product, formed row by row before it: round_act( gate * norm(x) ). gate is
// multiplied in f32.
struct RowInput {
  TensorView x;  // [T, k] f32 or act
  NormSpec norm;
  TensorView gate;  // [T, k] act, or absent
};

// y[t] = scale * table[id], id = token_ids[t], or drawn[~token_ids[t]] where that is negative: the
// token that an earlier step drew and only the device knows. An id that is still negative (a draw
// that failed) counts as 0.
struct EmbedTokensArgs {
  MatrixView table;      // [V, d]
  TensorView token_ids;  // i32 [T], each in [0, V), or ~index into drawn
  TensorView drawn;      // i32 [n], or absent: then no id is negative
  float scale = 1;
  TensorView y;  // [T, d] f32
};

// y = input . w^T (store), or y += input . w^T (add; the residual stream).
enum class Epilogue : int32_t { kStore = 0, kAdd = 1 };
struct LinearArgs {
  RowInput input;
  MatrixView w;  // [n, k]
  Epilogue epilogue = Epilogue::kStore;
  TensorView y;  // [T, n] f32 or act (kAdd: f32)
  int64_t num_decode_tokens = 0;
};

// y = round_act( activation(input . gate^T) * (input . up^T) ), both products in f32. SGLU: kNone;
// SwiGLU: kSilu.
struct GatedLinearArgs {
  RowInput input;
  MatrixView gate;  // [n, k]
  MatrixView up;    // [n, k]
  Activation activation = Activation::kNone;
  TensorView y;  // [T, n] act
  int64_t num_decode_tokens = 0;
};

// y[r] = x[rows[r]]
struct GatherRowsArgs {
  TensorView x;     // [T, d] f32
  TensorView rows;  // i32 [R]
  TensorView y;     // [R, d] f32
};

// One sequence's tokens in a step. Device data: the same for every layer. Decode rows come first,
// in token order.
struct StepRow {
  int32_t first_token = 0;  // index of its first token in the step's token order
  int32_t num_tokens = 0;   // 0: padding; nothing else of the row is read
  int32_t slot = 0;         // state slot
  int32_t is_prefill = 0;
  // Of the first token, among those that the sequence's state holds: less than its position in the
  // text where tokens were dropped (TurnKeys), which only sequences without a lightning state do.
  int64_t position = 0;
  int64_t base =
      0;  // where the stored lightning base stands before the step, a multiple of W, <= position
  // Where the op leaves it: a multiple of W in [base, position + num_tokens]. Decode: W *
  // floor(confirmed / W). Prefill: W * floor(end / W), because prompt rows are never rolled back.
  int64_t base_after = 0;
  // [p_begin, p_end): whole blocks of P at absolute multiples of P, computed and folded in P-form.
  // Empty (0, 0) in decode.
  int64_t p_begin = 0;
  int64_t p_end = 0;
  int64_t block_table =
      0;  // offset of this sequence's first entry in PagedAttentionArgs.block_tables
};

// Decay tables of one lightning layer, f32, made on the host from the double rate s[h] (never
// products of lambda).
struct LightningDecay {
  TensorView decay;         // [H, P + 1]: exp(-s * m), m = 0..P
  TensorView fold_epsilon;  // [H, 2]: -expm1(-s * W), -expm1(-s * P)
};

// Lightning attention with a windowed state, docs/architecture.md §3.2. Per head, lambda = exp(-s):
//   S_t = lambda S_{t-1} + k_t v_t^T,   o_t = q_scale * q_t^T S_t         (2401.04658 eq. 4)
// q, k <- qk_activation(q, k); with theta (LRPE): q -> [q cos(theta pos), q sin(theta pos)], same
// for k, d_k = 2 head_dim, angles formed and reduced mod 2 pi in double; then k (and v) are rounded
// once to act, the same in every phase. W-form, position t, b = W floor(t / W):  o_t =
// lambda^(t-b+1) q S_b + sum_{j=b..t} lambda^(t-j) (q . k_j) v_j.
//   A row block that ends at a multiple of W folds:  S <- S + (dS - eps S), dS = sum_j
//   lambda^(W-1-j) k_j v_j^T from zero in token order, eps = fold_epsilon[h][0]. Rows after such a
//   boundary use the folded S, formed outside the stored base unless base_after allows storing it;
//   the same code (same bits) serves both.
// P-form, blocks of P tokens: the same with P for W (fold_epsilon[h][1]), as matrix products:
//   O = [(Q K^T) . M] V + diag(lambda^(i+1)) Q S,  M_ij = lambda^(i-j) for i >= j else 0.
// Where act is bf16, P-form may round q, (Q K^T) . M and the S it reads (never the one it keeps) to
// bf16.
// Rows not folded into the stored base by this step are written to the window; row of position p is
// p % window_rows. A decode row ends at most window_rows after its base: what is written never lies
// over what is read.
struct LightningAttentionArgs {
  TensorView q, k, v;  // [T, H * head_dim] act each (columns of the fused projection)
  Activation qk_activation = Activation::kSilu;
  float q_scale = 1;
  TensorView theta;  // [H, head_dim] f32, or absent
  LightningDecay decay;
  int32_t num_heads = 0;
  int32_t head_dim = 0;  // of q, k, v; d_v = head_dim; d_k = head_dim, or 2 head_dim with theta
  TensorView state;      // [num_slots, H, d_k, d_v] f32: the bases
  TensorView window;     // [num_slots, window_rows, H * d_k + H * d_v] act: k then v of a position
  const StepRow* rows = nullptr;  // [num_rows], device
  int32_t num_rows = 0;
  int32_t num_decode_rows =
      0;  // rows before it are decode rows (is_prefill 0) of at most W tokens each, or padding
  int64_t num_decode_tokens = 0;
  TensorView o;  // [T, H * d_v] f32 or act
};

// cos/sin of position * inv_freq, times attention_factor, both of the token's table; the product
// and its reduction mod 2 pi in double. Tables are per sequence: what one request rotates with
// never depends on another's.
struct RopeArgs {
  TensorView positions;  // i64 [T]
  TensorView table_ids;  // i32 [T], each in [0, num_tables)
  const double* tables =
      nullptr;  // [num_tables, num_freqs + 1], device: inv_freq, attention_factor
  int32_t num_tables = 0;
  int32_t num_freqs = 0;  // rotary_dim / 2
  TensorView cos, sin;    // [T, num_freqs] f32
};

enum class PairLayout : int32_t { kHalfSplit = 0, kInterleaved = 1 };

// Causal softmax attention over paged KV. Writes the step's k (rotated) and v into the cache,
// rounded to act; then
//   o_t = sum_{j <= t} softmax_j(scale * q_t . k_j) v_j,
// q rotated and kept in f32 or act. Keys are taken in ranges that begin at absolute multiples of a
// fixed size, and their partial results merged in ascending order, in f32: ranges of
// kAttentionSplit, or tiles that divide them (in path P the weights may then be rounded to act
// before they multiply v). Query head h reads kv head h / (num_heads /
// num_kv_heads). Path P may overwrite what lies past the sequence's end in its last block.
struct PagedAttentionArgs {
  TensorView q;     // [T, num_heads * head_dim] act
  TensorView k, v;  // [T, num_kv_heads * head_dim] act
  TensorView cos,
      sin;  // [T, rotary_dim / 2] f32; absent: no rotation. Columns >= rotary_dim pass through
  PairLayout pair_layout = PairLayout::kHalfSplit;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 0;
  TensorView
      blocks;  // [num_blocks, 2, num_kv_heads, kPagedBlock * head_dim] act: keys, then values
  const int32_t* block_tables =
      nullptr;  // device; entry i of a sequence holds positions [16 i, 16 i + 16)
  const StepRow* rows = nullptr;
  int32_t num_rows = 0;
  int32_t num_decode_rows = 0;  // as in LightningAttentionArgs
  int64_t num_decode_tokens = 0;
  TensorView o;  // [T, num_heads * head_dim] f32 or act
};

// A block of cached keys at another position: the first tokens of a sequence, whose distance to the
// rest shrinks when tokens between them are dropped.
struct BlockTurn {
  int32_t from_block = 0;  // keys as PagedAttention wrote them
  int32_t to_block = 0;    // another one; no block is in two turns
  int32_t table_id = 0;    // of the sequence
  int64_t delta = 0;       // positions
};

// Per turn and kv head: each key of from_block, rotated by delta * inv_freq, is written to
// to_block, and each value copied. Angles as in Rope, but without the table's attention factor,
// which stored keys carry; products in f32, rounded once to act. Columns >= 2 num_freqs are copied.
struct TurnKeysArgs {
  TensorView blocks;  // as PagedAttentionArgs.blocks
  PairLayout pair_layout = PairLayout::kHalfSplit;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  const double* tables = nullptr;  // RopeArgs.tables
  int32_t num_tables = 0;
  int32_t num_freqs = 0;
  const BlockTurn* turns = nullptr;  // [num_turns], device
  int32_t num_turns = 0;
};

// Token counts of a slot, for penalties: count[slot][id] = (in prompt ? kPromptBit : 0) |
// occurrences in the output.
inline constexpr uint32_t kPromptBit = 0x80000000u;
struct CountTokensArgs {
  TensorView counts;  // u32 [num_slots, V]
  int32_t slot = 0;
  TensorView token_ids;  // i32 [n]
  int32_t is_prompt = 0;
};

struct TokenBias {
  int32_t token_id = 0;
  float bias = 0;  // -inf bans the token
};

// One draw. Order: bias -> penalties -> temperature -> top_k -> top_p -> min_p.
//   repetition: logit > 0 ? logit / r : logit * r for tokens of prompt or output; presence: - p
//   once; frequency: - f * count, both over the output only.  temperature 0: argmax (lowest id wins
//   a tie) after bias and penalties. top_k keeps the k largest (ties by lower id first), 0 = all;
//   top_p the shortest prefix, in descending order, whose probability sum reaches p (>= 1 keeps
//   all); min_p what has probability >= min_p * max. The draw is Gumbel-max over what is kept:
//   argmax logit'/temperature + gumbel(u_id), u_id from Philox4x32-10 with key = seed, counter =
//   (token_id / 4, output_index, position lo, position hi), lane token_id % 4, u = (x + 0.5) /
//   2^32. So it depends on (seed, output_index, position) alone: not on the batch, and equal on
//   every back end up to logit rounding.
struct SampleRow {
  int32_t logit_row = 0;  // index into logits
  int32_t slot = 0;       // for the counts; -1: padding, nothing else of the row is read
  int32_t output_index = 0;
  int32_t num_logprobs = -1;  // -1: none; 0: of the drawn token; n: also of the n most likely
  int64_t position = 0;       // absolute position of the token that is drawn
  uint64_t seed = 0;
  float temperature = 1;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int32_t top_k = 0;
  int32_t num_biases = 0;
  const TokenBias* biases = nullptr;  // device
  int32_t probability_row = -1;       // of SampleArgs.probabilities, or -1
};

// Log-probabilities are natural logs of softmax(raw logits), before bias and everything after. The
// drawn token is counted in its slot (CountTokens with is_prompt 0), so no two rows share a slot
// where counts are given. A row whose logits hold a NaN or +inf draws -1 and counts nothing; its
// other outputs are unspecified.
struct SampleArgs {
  TensorView logits;                // [R, V] f32; not changed
  const SampleRow* rows = nullptr;  // [num_rows], device
  int32_t num_rows = 0;
  TensorView counts;        // u32 [num_slots, V], or absent: no penalties, nothing is counted
  TensorView tokens;        // i32 [num_rows]
  TensorView logprobs;      // f32 [num_rows]; written where num_logprobs >= 0
  TensorView top_ids;       // i32 [num_rows, max_top], descending, ties by lower id; entries >=
                            // num_logprobs unspecified
  TensorView top_logprobs;  // f32 [num_rows, max_top]
  // f32 [n, V], or absent: receives the distribution that the token was drawn from (after
  // everything; a point mass where the draw is an argmax) of each row with a probability_row.
  TensorView probabilities;
  // f32 [num_rows], or absent: distance of the two largest logits after bias and penalties; 0 where
  // it is not finite, or V = 1. Not written for padding and rows that draw -1.
  TensorView margins;
  // f32 [num_rows, 2], or absent: largest probability and entropy (nats) of softmax(logits after
  // bias and penalties), at temperature 1; (1, 0) where nothing is finite. Written as margins are.
  TensorView certainties;
};

// A layer of an acceptance head, and the reading of its last one: the logit of P(the row's draft is
// accepted). The layer's product z = norm(x) . w^T is a Linear before it, or, of a layer small
// enough that a launch costs more than it, the op's own. By features
//   f = (ln(1 + margin), largest probability, entropy, min(temperature, 2), place)
//   y = norm(x) + silu(z + bias + f . feature_weights), without norm(x) where weight is given
//   logit = readout . y + f . readout_features + readout_bias
// where what is absent adds nothing. So a SpecDec++ head (2405.19715) is its residual layers with x
// and z and the last one's readout, an MLP one layer with x, weight and the readout, a linear head
// the readout of norm(x) alone. All in f32; sums of a row in an order that its sizes alone fix.
inline constexpr int kNumHeadFeatures = 5;
struct AcceptanceHeadArgs {
  TensorView x;                 // [R, n] f32, or absent; with a weight [R, H]
  NormSpec norm;                // of x
  TensorView weight;            // [n, H] f32, or absent: z = norm(x) . weight^T
  TensorView z;                 // [R, n] f32, or absent, as with a weight; without one, x or z is
                                // there
  TensorView bias;              // [n] f32, or absent
  TensorView feature_weights;   // [kNumHeadFeatures, n] f32, or absent
  TensorView y;                 // [R, n] f32, or absent; may be x or z, with a weight neither
  TensorView readout;           // [n] f32, or absent: no logits
  TensorView readout_features;  // [kNumHeadFeatures] f32, or absent
  float readout_bias = 0;
  float place = 0;                  // in the round
  const SampleRow* rows = nullptr;  // [num_rows], device, written by no op: the draws, of which
                                    // logit_row is the row of x, y and z, and temperature a
                                    // feature; padding is skipped
  int32_t num_rows = 0;
  TensorView margins;        // [num_rows] f32, Sample's; needed where a feature is
  TensorView certainties;    // [num_rows, 2] f32, likewise
  TensorView logits;         // [num_rows] f32
  TensorView shown_margins;  // [num_rows] f32, or absent: receives the margins beside the logits
};

// Speculation. What a draft model proposed is checked against the target's own distributions, and
// the tokens that stand are those that the target alone would have drawn:
//   kMatch     the target draws its token at each position as SampleRow says, and a draft is
//              accepted while it equals that. Drafts drawn with the same noise are accepted as
//              often as the two distributions allow with common random numbers, and the tokens are
//              a function of the seed alone. Also the rule of greedy rows.
//   kStandard  draft x from q is accepted when u q(x) <= p(x); at the first rejection the token is
//              drawn from max(0, p - q), normalised (from p where rounding leaves nothing of it);
//              when all are accepted, one more is drawn from p (2211.17192). The tokens follow p,
//              whatever q. u and draws are keyed as kernels/base/accept_rule.h says.
enum class AcceptRule : int32_t { kMatch = 0, kStandard = 1 };

// The drafts of one sequence. Without any, the row draws one token. Padding: the SampleRow at
// first_row has slot -1; nothing is written for it.
struct VerifyRow {
  int32_t first_row = 0;  // of its num_drafts + 1 SampleRows, one per position in order
  int32_t num_drafts = 0;
  int32_t first_draft = 0;  // index into drafts; kStandard: also the row of probabilities
  AcceptRule rule = AcceptRule::kMatch;
  int32_t num_dropped = 0;  // drafts after these: their counts are taken back, nothing else
};

// counts hold each draft of a row on top of what stands, as drawing it left them; they are left
// with the tokens that stand. Row i of a sequence is drawn with the counts of what stands before
// it. A draft that is negative (its draw failed) ends the drafts before it. A row whose logits hold
// a NaN or +inf draws -1, counts nothing and ends the sequence's tokens.
struct VerifyTokensArgs {
  TensorView logits;                // [R, V] f32; not changed
  const SampleRow* rows = nullptr;  // [num_rows], device; output r belongs to row r
  int32_t num_rows = 0;
  const VerifyRow* verify_rows = nullptr;  // [num_verify_rows], device; no two share a slot
  int32_t num_verify_rows = 0;
  TensorView counts;         // u32 [num_slots, V]
  TensorView drafts;         // i32 [n]
  TensorView probabilities;  // f32 [n, V]: q of the drafts; absent where no row is kStandard
  TensorView num_tokens;     // i32 [num_verify_rows]: how many stand, 1..num_drafts + 1
  TensorView tokens;         // i32 [num_rows]; as in SampleArgs, written for those that stand
  TensorView logprobs;
  TensorView top_ids;
  TensorView top_logprobs;
};

// Log-probability of a given token per row, and of the n most likely. NaN for a row whose logits
// hold a NaN or +inf; its top_* are unspecified.
struct ScoreTokensArgs {
  TensorView logits;    // [R, V] f32
  TensorView targets;   // i32 [R]; -1: none (logprob = 0)
  TensorView logprobs;  // f32 [R]
  int32_t num_top = 0;
  TensorView top_ids;       // i32 [R, num_top]
  TensorView top_logprobs;  // f32 [R, num_top]
};

}  // namespace godwit
