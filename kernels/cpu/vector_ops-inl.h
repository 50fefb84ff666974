// The kernels of vector_ops.h over the vectors of simd_<set>-inl.h; compiled once per instruction set.

#include <cstdint>

#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

// Rows x vectors of an accumulator tile; the last vector of a partial tile has `last` lanes.
template <int kRows, int kVectors, bool kPartial>
inline void ProductTile(const TileProductArgs& args, int row, int column, int last) {
  VecF acc[kRows][kVectors];
  float* const c = args.c + row * args.c_stride + column;
  auto load = [&](const float* p, int v) {
    return kPartial && v == kVectors - 1 ? LoadPartial(p + v * kLanes, last) : Load(p + v * kLanes);
  };
  int32_t common = args.depth[row];
  for (int r = 0; r < kRows; ++r) {
    common = args.depth[row + r] < common ? args.depth[row + r] : common;
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = args.accumulate ? load(c + r * args.c_stride, v) : Zero();
    }
  }
  const float* const a = args.a + row * args.a_stride;
  const float* b = args.b + column;
  for (int32_t i = 0; i < common; ++i, b += args.b_stride) {
    VecF b_row[kVectors];
    for (int v = 0; v < kVectors; ++v) b_row[v] = load(b, v);
    for (int r = 0; r < kRows; ++r) {
      const VecF a_element = Set1(a[r * args.a_stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(a_element, b_row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    // What a row has beyond the shortest of its tile: the terms of no row depend on its neighbours.
    const float* b_rest = b;
    for (int32_t i = common; i < args.depth[row + r]; ++i, b_rest += args.b_stride) {
      const VecF a_element = Set1(a[r * args.a_stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(a_element, load(b_rest, v), acc[r][v]);
    }
    const VecF scale = Set1(args.row_scale == nullptr ? 1.0f : args.row_scale[row + r]);
    for (int v = 0; v < kVectors; ++v) {
      float* const out = c + r * args.c_stride + v * kLanes;
      if (kPartial && v == kVectors - 1) {
        StorePartial(out, Mul(acc[r][v], scale), last);
      } else {
        Store(out, Mul(acc[r][v], scale));
      }
    }
  }
}

// All columns of kRows rows, in tiles of kVectors vectors, then halves of it, then the partial vector.
template <int kRows, int kVectors>
inline void ProductRows(const TileProductArgs& args, int row, int column) {
  for (; column + kVectors * kLanes <= args.columns; column += kVectors * kLanes) {
    ProductTile<kRows, kVectors, false>(args, row, column, 0);
  }
  if constexpr (kVectors > 1) {
    ProductRows<kRows, kVectors / 2>(args, row, column);
  } else if (column < args.columns) {
    ProductTile<kRows, 1, true>(args, row, column, args.columns - column);
  }
}

void TileProduct(const TileProductArgs& args) {
  int row = 0;
  for (; row + 4 <= args.rows; row += 4) ProductRows<4, kTileVectors>(args, row, 0);
  if (row + 2 <= args.rows) {
    ProductRows<2, kTileVectors>(args, row, 0);
    row += 2;
  }
  if (row < args.rows) ProductRows<1, kOneRowVectors>(args, row, 0);
}

template <int kRows, int kVectors, bool kPartial>
inline void FoldTile(const FoldStateArgs& args, int64_t row, int column, int last) {
  VecF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Zero();
  }
  const float* k = args.k + row;
  const float* v_row = args.v + column;
  for (int j = 0; j < args.num_tokens; ++j, k += args.k_stride, v_row += args.v_stride) {
    VecF values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      values[v] = kPartial ? LoadPartial(v_row + v * kLanes, last) : Load(v_row + v * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const VecF key = Set1(k[r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(key, values[v], acc[r][v]);
    }
  }
  const VecF minus_epsilon = Set1(-args.epsilon);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const float* const from = args.from + (row + r) * args.from_stride + column + v * kLanes;
      float* const to = args.to + (row + r) * args.to_stride + column + v * kLanes;
      const VecF s = kPartial ? LoadPartial(from, last) : Load(from);
      const VecF folded = Add(s, Fma(minus_epsilon, s, acc[r][v]));
      if (kPartial) {
        StorePartial(to, folded, last);
      } else {
        Store(to, folded);
      }
    }
  }
}

template <int kRows, int kVectors>
inline void FoldRows(const FoldStateArgs& args, int64_t row, int column) {
  for (; column + kVectors * kLanes <= args.columns; column += kVectors * kLanes) {
    FoldTile<kRows, kVectors, false>(args, row, column, 0);
  }
  if constexpr (kVectors > 1) {
    FoldRows<kRows, kVectors / 2>(args, row, column);
  } else if (column < args.columns) {
    FoldTile<kRows, 1, true>(args, row, column, args.columns - column);
  }
}

void FoldState(const FoldStateArgs& args) {
  int64_t row = 0;
  for (; row + 4 <= args.num_rows; row += 4) FoldRows<4, kTileVectors>(args, row, 0);
  for (; row < args.num_rows; ++row) FoldRows<1, kTileVectors>(args, row, 0);
}

// One chain of lanes per key, then one fixed tree: the score of a pair depends on nothing but the pair.
template <int kKeys>
inline void DotKeys(const DotRowsArgs& args, int key) {
  VecF acc[kKeys];
  for (int j = 0; j < kKeys; ++j) acc[j] = Zero();
  const float* const k = args.k + key * args.k_stride;
  for (int64_t i = 0; i < args.length; i += kLanes) {
    const VecF q = Load(args.q + i);
    for (int j = 0; j < kKeys; ++j) acc[j] = Fma(q, Load(k + j * args.k_stride + i), acc[j]);
  }
  for (int j = 0; j < kKeys; ++j) args.scores[key + j] = args.weights[key + j] * ReduceAdd(acc[j]);
}

void DotRows(const DotRowsArgs& args) {
  int key = 0;
  for (; key + 4 <= args.num_keys; key += 4) DotKeys<4>(args, key);
  for (; key < args.num_keys; ++key) DotKeys<1>(args, key);
}

inline VecF LoadElements(const void* x, bool is_bf16, int64_t offset, int64_t count) {
  if (is_bf16) {
    const uint16_t* const p = static_cast<const uint16_t*>(x) + offset;
    return count >= kLanes ? LoadBF16(p) : LoadBF16Partial(p, count);
  }
  const float* const p = static_cast<const float*>(x) + offset;
  return count >= kLanes ? Load(p) : LoadPartial(p, count);
}

inline void StoreElements(float* y, VecF x, int64_t count) {
  if (count >= kLanes) {
    Store(y, x);
  } else {
    StorePartial(y, x, count);
  }
}

inline VecF RoundThroughBF16(VecF x) {
  uint16_t bits[kLanes];
  StoreBF16(bits, x);
  return LoadBF16(bits);
}

void FormHead(const FormHeadArgs& args) {
  const bool lrpe = args.cos != nullptr;
  const int64_t width = lrpe ? 2 * args.n : args.n;
  const VecF scale = Set1(args.scale);
  for (int64_t i = 0; i < args.n; i += kLanes) {
    const int64_t count = args.n - i;
    VecF x = LoadElements(args.x, args.is_bf16, i, count);
    if (args.silu) x = Silu(x);
    x = Mul(x, scale);
    VecF y = lrpe ? Mul(x, LoadElements(args.cos, false, i, count)) : x;
    if (args.round_bf16) y = RoundThroughBF16(y);
    StoreElements(args.y + i, y, count);
    if (!lrpe) continue;
    y = Mul(x, LoadElements(args.sin, false, i, count));
    if (args.round_bf16) y = RoundThroughBF16(y);
    StoreElements(args.y + args.n + i, y, count);
  }
  for (int64_t i = width; i < PadRow(width); ++i) args.y[i] = 0;
}

// Cephes sinf and cosf on |x| <= pi / 4, after the quadrant n is taken off in double: pi / 2 in two parts, the first of 33
// bits, so that n times it is exact for n < 2^20 and off by 2^-53 of the product beyond.
inline void SinCosOne(double angle, float* cos_out, float* sin_out) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer
  const double n = (angle * 0.63661977236758134308 + kMagic) - kMagic;
  const double reduced = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  const double turns = (n * 0.25 + kMagic) - kMagic;
  const int quadrant = static_cast<int>(n - 4.0 * turns);  // in [-2, 2]
  const float x = static_cast<float>(reduced);
  const float z = x * x;
  const float sin_x = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float cos_x =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swapped = (quadrant & 1) != 0;
  const float s = swapped ? cos_x : sin_x;
  const float c = swapped ? sin_x : cos_x;
  *sin_out = (quadrant & 2) != 0 ? -s : s;
  *cos_out = ((quadrant + 1) & 2) != 0 ? -c : c;
}

void SinCos(const SinCosArgs& args) {
  if (args.frequency != nullptr) {
    for (int64_t i = 0; i < args.n; ++i) {
      SinCosOne(args.position * args.frequency[i], &args.cos[i], &args.sin[i]);
    }
    return;
  }
  for (int64_t i = 0; i < args.n; ++i) {
    SinCosOne(args.position * static_cast<double>(args.frequency_f32[i]), &args.cos[i], &args.sin[i]);
  }
}

void WidenRows(const WidenRowsArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    for (int64_t i = 0; i < args.columns; i += kLanes) {
      const int64_t count = args.columns - i;
      StoreElements(args.y + r * args.y_stride + i,
                    LoadElements(args.x, args.is_bf16, r * args.x_stride + i, count), count);
    }
  }
}

// Tiles of kLanes columns: a cache line of x is read whole, and the lines of y stay in the first cache meanwhile.
void Transpose(const TransposeArgs& args) {
  for (int64_t begin = 0; begin < args.columns; begin += kLanes) {
    const int64_t end = begin + kLanes < args.columns ? begin + kLanes : args.columns;
    for (int64_t r = 0; r < args.rows; ++r) {
      for (int64_t i = begin; i < end; ++i) {
        args.y[i * args.y_stride + r] = args.x[r * args.x_stride + i];
      }
    }
  }
}

inline float ReduceMax(VecF x) {
  float max = x[0];
  for (int lane = 1; lane < kLanes; ++lane) max = x[lane] > max ? x[lane] : max;
  return max;
}

// exp(x) for x <= 0, and 0 where exp would leave the normal numbers (-inf too). NaN stays.
inline VecF ExpToZero(VecF x) { return x < Set1(-87.0f) ? Zero() : Exp(x); }

void SoftmaxRange(SoftmaxRangeArgs& args) {
  float max = args.x[0];
  int64_t i = 0;
  if (args.n >= kLanes) {
    VecF max_lanes = Load(args.x);
    for (i = kLanes; i + kLanes <= args.n; i += kLanes) max_lanes = Max(max_lanes, Load(args.x + i));
    max = ReduceMax(max_lanes);
  }
  for (; i < args.n; ++i) max = args.x[i] > max ? args.x[i] : max;
  // A range that is all -inf (never so with finite keys) is shifted by 0: exp gives zeros, not NaN.
  const VecF shift = Set1(max < -3.0e38f ? 0.0f : max);
  VecF sum = Zero();
  for (i = 0; i + kLanes <= args.n; i += kLanes) {
    const VecF p = ExpToZero(Sub(Load(args.x + i), shift));
    Store(args.x + i, p);
    sum = Add(sum, p);
  }
  args.sum = ReduceAdd(sum);
  if (i < args.n) {
    float rest[kLanes] = {};
    const VecF p = ExpToZero(Sub(LoadPartial(args.x + i, args.n - i), shift));
    StorePartial(args.x + i, p, args.n - i);
    StorePartial(rest, p, args.n - i);
    args.sum += ReduceAdd(Load(rest));
  }
  args.max = max;
}

void ScanLogits(ScanLogitsArgs& args) {
  VecF max = Set1(args.x[0]);
  VecF bad = Zero();  // stays 0: x - x is NaN for NaN and the infinities
  const VecF lowest = Set1(-3.4028234e38f);
  for (int64_t i = 0; i < args.n; i += kLanes) {
    // Lanes beyond the end repeat the first element.
    VecF x = Set1(args.x[0]);
    if (args.n - i >= kLanes) {
      x = Load(args.x + i);
    } else {
      for (int64_t lane = 0; lane < args.n - i; ++lane) x[lane] = args.x[i + lane];
    }
    max = x > max ? x : max;
    const VecF finite = x < lowest ? Zero() : x;  // -inf is a banned token, no fault
    bad = Add(bad, Sub(finite, finite));
  }
  args.max = ReduceMax(max);
  args.bad = false;
  for (int lane = 0; lane < kLanes; ++lane) args.bad = args.bad || !(bad[lane] == 0.0f);
}

// Blocks of 16 vectors are summed in f32 lanes and added up in double: a relative error below 2^-19.
void SumExp(SumExpArgs& args) {
  const VecF shift = Set1(args.max);
  args.sum = 0;
  for (int64_t begin = 0; begin < args.n; begin += 16 * kLanes) {
    const int64_t end = begin + 16 * kLanes < args.n ? begin + 16 * kLanes : args.n;
    VecF sum = Zero();
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VecF p = ExpToZero(Sub(Load(args.x + i), shift));
      if (args.y != nullptr) Store(args.y + i, p);
      sum = Add(sum, p);
    }
    args.sum += static_cast<double>(ReduceAdd(sum));
    if (i == end) continue;
    float rest[kLanes] = {};
    StorePartial(rest, ExpToZero(Sub(LoadPartial(args.x + i, end - i), shift)), end - i);
    if (args.y != nullptr) StorePartial(args.y + i, Load(rest), end - i);
    args.sum += static_cast<double>(ReduceAdd(Load(rest)));
  }
}

// log(x) of a normal x > 0 (Cephes logf): within 2 units of the last place.
inline VecF Log(VecF x) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  const LaneI bits = reinterpret_cast<LaneI>(x);
  // x = 2^e m, m in [sqrt(1/2), sqrt(2))
  const LaneI shifted = bits - 0x3f3504f3;
  const VecF e = __builtin_convertvector(shifted >> 23, VecF);
  const VecF m = Sub(reinterpret_cast<VecF>((shifted & 0x7fffff) + 0x3f3504f3), Set1(1.0f));
  const VecF z = Mul(m, m);
  VecF p = Set1(7.0376836292e-2f);
  p = Fma(p, m, Set1(-1.1514610310e-1f));
  p = Fma(p, m, Set1(1.1676998740e-1f));
  p = Fma(p, m, Set1(-1.2420140846e-1f));
  p = Fma(p, m, Set1(1.4249322787e-1f));
  p = Fma(p, m, Set1(-1.6668057665e-1f));
  p = Fma(p, m, Set1(2.0000714765e-1f));
  p = Fma(p, m, Set1(-2.4999993993e-1f));
  p = Fma(p, m, Set1(3.3333331174e-1f));
  VecF y = Mul(Mul(p, m), z);
  y = Fma(e, Set1(-2.12194440e-4f), y);
  y = Fma(z, Set1(-0.5f), y);
  return Fma(e, Set1(0.693359375f), Add(m, y));
}

// GumbelOfWord of philox.h for kLanes words.
inline VecF Gumbel(const uint32_t* words) {
  float distances[kLanes];
  float is_upper[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t x = words[lane];
    const bool upper = x >= 0x80000000u;
    distances[lane] = static_cast<float>(static_cast<int32_t>(upper ? ~x : x));
    is_upper[lane] = upper ? 1.0f : 0.0f;
  }
  const VecF distance = Mul(Add(Load(distances), Set1(0.5f)), Set1(2.3283064365386963e-10f));
  const VecF one = Set1(1.0f);
  const VecF upper = Load(is_upper);
  // log(1 - d) = log(u) + (1 - u - d) / u with u = 1 - d rounded; d itself below 1/2.
  const VecF u = Sub(one, distance);
  const VecF argument = upper > Set1(0.5f) ? u : distance;
  const VecF correction = upper > Set1(0.5f) ? Div(Sub(Sub(one, u), distance), u) : Zero();
  return Sub(Zero(), Log(Sub(Zero(), Add(Log(argument), correction))));
}

// The words of tokens [4 first, 4 first + 4 kLanes), in token order.
inline void PhiloxBlock(const GumbelArgmaxArgs& args, uint32_t first, uint32_t* words) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    c0[lane] = first + static_cast<uint32_t>(lane);
    c1[lane] = args.counter[0];
    c2[lane] = args.counter[1];
    c3[lane] = args.counter[2];
  }
  uint32_t key0 = static_cast<uint32_t>(args.seed);
  uint32_t key1 = static_cast<uint32_t>(args.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0[lane];
      const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[lane];
      c0[lane] = static_cast<uint32_t>(product1 >> 32) ^ c1[lane] ^ key0;
      c1[lane] = static_cast<uint32_t>(product1);
      c2[lane] = static_cast<uint32_t>(product0 >> 32) ^ c3[lane] ^ key1;
      c3[lane] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    words[4 * lane] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

void GumbelArgmax(GumbelArgmaxArgs& args) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  const VecF minus_infinity = Set1(-__builtin_inff());
  VecF best = minus_infinity;
  LaneI best_index = {};
  LaneI lane_index = {};
  for (int lane = 0; lane < kLanes; ++lane) lane_index[lane] = lane;
  for (int64_t begin = 0; begin < args.n; begin += 4 * kLanes) {
    uint32_t words[4 * kLanes];
    PhiloxBlock(args, static_cast<uint32_t>(begin / 4), words);
    for (int64_t i = begin; i < begin + 4 * kLanes && i < args.n; i += kLanes) {
      VecF x = minus_infinity;
      if (args.n - i >= kLanes) {
        x = Load(args.x + i);
      } else {
        for (int64_t lane = 0; lane < args.n - i; ++lane) x[lane] = args.x[i + lane];
      }
      const VecF value = Add(x, Gumbel(words + (i - begin)));
      const LaneI index = lane_index + static_cast<int32_t>(i);
      best_index = value > best ? index : best_index;
      best = value > best ? value : best;
    }
  }
  args.index = best_index[0];
  float max = best[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (best[lane] > max || (best[lane] == max && best_index[lane] < args.index)) {
      max = best[lane];
      args.index = best_index[lane];
    }
  }
}

}  // namespace
}  // namespace godwit
