// Attention of many queries, as of a block of a prompt. Keys are gathered, rotated and packed once per KV head. Then
// groups of a few rows go over them, NR keys at a time: the logits of a group stay in registers until they are weights
// (Dao, "FlashAttention-2", algorithm 1). They are counted from the largest that their row has seen, and anew only when
// one exceeds that by much, so that as a rule nothing that was summed before has to be scaled.
#pragma once

#include "attention.h"
#include "tiles.h"
#include "transpose.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int NR = 2 * W;                          // keys, or dimensions, of a register tile
constexpr int64_t kKeys = 128;                     // keys whose weights exist at once
constexpr int64_t kGroups = 8;                     // groups that share keys while these are in cache
constexpr float kRoom = 6;  // a logit may exceed what it is counted from by so much

// Operands of the products: float, or pairs of bf16 where the processor multiplies those; and how logits become weights.
// A word holds `kPair` elements.
struct Floats {
  typedef float Element;
  static constexpr int kPair = 1;
  static constexpr int kRows = W == 16 ? 12 : W == 8 ? 6 : 4;  // of a register tile
  static constexpr DType kType = DType::f32;
  static constexpr bool kTiled = false;
  static constexpr float kUnits = 1;  // of a logit that is 1
  static void pack(const float* x, int64_t size, float* to) { __builtin_memcpy(to, x, size * sizeof(float)); }
  static vu join(vf x, vf) { return (vu)x; }
  TS_INLINE vf weight(vf x) { return vexp(x); }
  TS_INLINE void put(float* to, vf low, vf high) { store(to, low), store(to + W, high); }
  template <int R>
  TS_INLINE void add(const float* a, int64_t lda, vf x, vf y, vf (&low)[R], vf (&high)[R]) {
    for (int r = 0; r < R; r++) {
      const vf one = set1(a[r * lda]);
      low[r] += one * x, high[r] += one * y;
    }
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  typedef uint16_t Element;
  static constexpr int kPair = 2;
  static constexpr int kRows = kHasTiles ? 16 : 12;
  static constexpr DType kType = DType::bf16;
  static constexpr bool kTiled = kHasTiles;
  static constexpr float kUnits = 1.44269504088896341f;  // weights are powers of two
  static void pack(const float* x, int64_t size, uint16_t* to) {
    for (int64_t i = 0; i < size; i += 2 * W) put(to + i, load<vf>(x + i), load<vf>(x + i + W));
  }
  static vu join(vf x, vf y) { return (vu)x >> 16 | ((vu)y & 0xffff0000u); }  // exact: both come from bf16
  // 2^x, relative error below 3e-6: a polynomial on [0, 1), fitted by least squares with Lawson's weights.
  TS_INLINE vf weight(vf x) {
    const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    vf p = set1(1.353416775e-2f);
    p = p * f + 5.201146094e-2f;
    p = p * f + 2.414427567e-1f;
    p = p * f + 6.930038345e-1f;
    p = p * f + 1.000002593f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
  TS_INLINE void put(uint16_t* to, vf low, vf high) { store(to, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low)); }
  template <int R>
  TS_INLINE void add(const uint16_t* a, int64_t lda, vf x, vf y, vf (&low)[R], vf (&high)[R]) {
    for (int r = 0; r < R; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * lda));
      low[r] = (vf)_mm512_dpbf16_ps((__m512)low[r], pair, (__m512bh)x);
      high[r] = (vf)_mm512_dpbf16_ps((__m512)high[r], pair, (__m512bh)y);
    }
  }
#if defined(__AMX_TILE__)
  // All of `add_products`; rows of sums, as those of `a` and of panels, are those of tiles as they lie in memory, `ld`
  // bytes from one to the next.
  TS_INLINE void add_tiles(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t depth, void* low, void* high,
                           int64_t ld) {
    constexpr int64_t kPanelRow = NR * kPair * sizeof(uint16_t);
    settle();
    _tile_loadd(0, low, ld);
    _tile_loadd(1, high, ld);
    for (int64_t k = 0; k < depth; k += W * kPair, b += W * kPair * NR) {
      _tile_loadd(2, a + k, lda * sizeof(uint16_t));
      _tile_loadd(3, b, kPanelRow);
      _tile_loadd(4, b + W * kPair, kPanelRow);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, low, ld);
    _tile_stored(1, high, ld);
    settle();
  }
#endif
};
typedef Bf16Pairs HalfProducts;
#else
typedef Floats HalfProducts;
#endif

template <class M>
constexpr int64_t kTileRows = kGroups * M::kRows;

// low, high [rows, NR] += a[rows, depth] . b[depth, NR]; b is one packed panel.
template <class M>
TS_INLINE void add_products(const typename M::Element* a, int64_t lda, const typename M::Element* b, int64_t depth,
                            vf (&low)[M::kRows], vf (&high)[M::kRows]) {
  if constexpr (M::kTiled) return M::add_tiles(a, lda, b, depth, low, high, sizeof(vf));
  for (int64_t k = 0; k < depth; k += M::kPair, b += NR * M::kPair)
    M::template add<M::kRows>(a + k, lda, load<vf>(b), load<vf>(b + W * M::kPair), low, high);
}

// Packed keys and values of one KV head: chunks of kKeys keys, padded with zeros.
// Keys: panels of NR keys, [panel][dim][NR]; values: panels of NR dimensions, [panel][key][NR]; pairs side by side.
template <class M>
struct Packed {
  typename M::Element *keys, *values;
  static int64_t size(int64_t chunks, int64_t dim) { return chunks * kKeys * dim; }
};

// NR rotated keys from `from` on.
template <class M, DType T>
void pack_keys(const Head& h, int64_t from, typename M::Element* to) {
  typedef typename M::Element E;
  const int64_t dim = h.a.head_dim;
  float* key = (float*)scratch(2, dim * sizeof(float) + NR * dim * sizeof(E));
  E* rows = (E*)(key + dim);
  for (int64_t j = 0; j < NR; j++) {
    if (from + j + kAhead < h.length) fetch<T>(h, h.a.keys, from + j + kAhead);
    if (from + j < h.length) load_key<T>(h, from + j, from + j, key), M::pack(key, dim, rows + j * dim);
    else __builtin_memset(rows + j * dim, 0, dim * sizeof(E));
  }
  for (int64_t j = 0; j < NR; j += W)
    for (int64_t d = 0; d < dim; d += W * M::kPair) {
      vu words[W];
      for (int i = 0; i < W; i++) words[i] = load<vu>(rows + (j + i) * dim + d);
      transpose(words);
      for (int i = 0; i < W; i++) store(to + (d + i * M::kPair) * NR + j * M::kPair, words[i]);
    }
}

template <class M, DType T>
void pack_values(const Head& h, int64_t from, typename M::Element* to) {
  auto value = [&](int64_t i, int64_t d) {
    return i < h.length ? load_as_float(h.a.values.data, key_element(h, h.a.values, i) + d, T) : vf{};
  };
  for (int64_t i = 0; i < kKeys; i += M::kPair) {
    for (int64_t j = i + kAhead; j < i + kAhead + M::kPair; j++)
      if (from + j < h.length) fetch<T>(h, h.a.values, from + j);
    for (int64_t d = 0; d < h.a.head_dim; d += W)
      store(to + (d / NR * kKeys + i) * NR + d % NR * M::kPair, M::join(value(from + i, d), value(from + i + 1, d)));
  }
}

// M::kRows rows that go through the products together, and what they have so far.
template <class M>
struct Group {
  int64_t first;  // row of the head
  int64_t rows;   // the others are padding
  int64_t whole;  // keys that all of them see
  int64_t seen;   // keys that one of them sees
  typename M::Element* queries;  // [kRows, dim]
  float* out;                    // [kRows, dim]
  bool is_new;
  float start[M::kRows];  // minus what the logits of a row are counted from
  vf sums[M::kRows];      // of a row's weights
};

template <class M>
Group<M> begin_group(const Head& h, int64_t first, int64_t rows, typename M::Element* queries, float* out) {
  const int64_t dim = h.a.head_dim;
  Group<M> g{first, rows, h.limit(first), h.limit(first + rows - 1), queries, out, h.a.sink_logits == nullptr};
  float* query = (float*)scratch(3, dim * sizeof(float));
  __builtin_memset(out, 0, M::kRows * dim * sizeof(float));
  __builtin_memset(queries, 0, M::kRows * dim * sizeof(typename M::Element));
  for (int64_t r = 0; r < rows; r++) {
    load_query(h, first + r, h.limit(first + r) - 1, query);
    for (int64_t d = 0; d < dim; d += W) store(query + d, load<vf>(query + d) * M::kUnits);
    M::pack(query, dim, queries + r * dim);
    if (h.a.sink_logits) g.start[r] = -h.sink(first + r) * M::kUnits, g.sums[r][0] = 1;
  }
  return g;
}

// Weights of logits [rows, NR] where rows see no more keys, are capped, or have one that exceeds what they count from.
template <class M>
__attribute__((noinline)) void weigh_with_care(const Head& h, Group<M>& g, const float* logits, int64_t from,
                                               typename M::Element* weights, int64_t at) {
  const int64_t dim = h.a.head_dim;
  vi lane{};
  for (int j = 0; j < W; j++) lane[j] = j;
  for (int r = 0; r < M::kRows; r++, logits += NR, weights += kKeys) {
    vf x[2] = {load<vf>(logits), load<vf>(logits + W)};
    if (h.a.softcap != 0)
      for (vf& part : x) part = capped(part - g.start[r], h.a.softcap * M::kUnits) + g.start[r];
    const int64_t left = h.limit(g.first + r) - from - at;
    for (int half = 0; half < 2; half++)
      if (left < (half + 1) * W) x[half] = lane < (int32_t)(left - half * W) ? x[half] : set1(kNone);
    const float most = max_of(vmax(x[0], x[1]));
    if (g.is_new || most > kRoom) {
      g.start[r] -= most, x[0] -= most, x[1] -= most;
      if (!g.is_new) {
        const vf factor = M::weight(set1(-most));
        g.sums[r] *= factor;
        for (int64_t d = 0; d < dim; d += W) store(g.out + r * dim + d, load<vf>(g.out + r * dim + d) * factor);
        for (int64_t i = 0; i < at; i++)
          store_element(weights, i, M::kType, load_element(weights, i, M::kType) * factor[0]);
      }
    }
    x[0] = M::weight(x[0]), x[1] = M::weight(x[1]);
    g.sums[r] += x[0] + x[1];
    M::put(weights + at, x[0], x[1]);
  }
  g.is_new = false;
}

// Weights of the keys from + at .. from + at + NR - 1, of which `keys` is the panel.
template <class M>
void weigh_panel(const Head& h, Group<M>& g, const typename M::Element* keys, int64_t from,
                 typename M::Element* weights, int64_t at) {
  vf low[M::kRows], high[M::kRows];
  for (int r = 0; r < M::kRows; r++) low[r] = high[r] = set1(g.start[r]);
  add_products<M>(g.queries, h.a.head_dim, keys, h.a.head_dim, low, high);
  vf most = vmax(low[0], high[0]);
  for (int r = 1; r < M::kRows; r++) most = vmax(most, vmax(low[r], high[r]));
  if (g.is_new || h.a.softcap != 0 || from + at + NR > g.whole || mask_of(most > kRoom)) {
    float logits[M::kRows * NR];
    for (int r = 0; r < M::kRows; r++) store(logits + r * NR, low[r]), store(logits + r * NR + W, high[r]);
    return weigh_with_care<M>(h, g, logits, from, weights, at);
  }
#pragma GCC unroll 12
  for (int r = 0; r < M::kRows; r++) {
    const vf x = M::weight(low[r]), y = M::weight(high[r]);
    g.sums[r] += x + y;
    M::put(weights + r * kKeys + at, x, y);
  }
}

// A group over the chunk of keys that begins at `from`.
template <class M>
void attend_chunk(const Head& h, Group<M>& g, int64_t from, const Packed<M>& packed, typename M::Element* weights) {
  const int64_t dim = h.a.head_dim, left = g.seen - from, keys = left < kKeys ? (left + NR - 1) / NR * NR : kKeys;
  for (int64_t at = 0; at < keys; at += NR) weigh_panel<M>(h, g, packed.keys + (from + at) * dim, from, weights, at);
  for (int64_t d = 0; d < dim; d += NR) {
    const typename M::Element* values = packed.values + from * dim + d * kKeys;
    float* out = g.out + d;
    if constexpr (M::kTiled) {  // in place
      M::add_tiles(weights, kKeys, values, keys, out, out + W, dim * sizeof(float));
      continue;
    }
    vf low[M::kRows], high[M::kRows];
    for (int r = 0; r < M::kRows; r++) low[r] = load<vf>(out + r * dim), high[r] = load<vf>(out + r * dim + W);
    add_products<M>(weights, kKeys, values, keys, low, high);
    for (int r = 0; r < M::kRows; r++) store(out + r * dim, low[r]), store(out + r * dim + W, high[r]);
  }
}

// Rows first .. last - 1 of one head against all that they see.
template <class M>
void attend_tile(const Head& h, int64_t first, int64_t last, const Packed<M>& packed) {
  typedef typename M::Element E;
  const int64_t dim = h.a.head_dim;
  const int64_t size = kTileRows<M> * dim;
  float* out = (float*)scratch(2, size * sizeof(float) + (size + M::kRows * kKeys) * sizeof(E));
  E *queries = (E*)(out + size), *weights = queries + size;
  Group<M> groups[kGroups];
  int64_t count = 0;
  for (int64_t row = first; row < last; row += M::kRows, count++) {
    const int64_t at = (row - first) * dim;
    groups[count] = begin_group<M>(h, row, last - row < M::kRows ? last - row : M::kRows, queries + at, out + at);
  }
  for (int64_t from = 0; from < groups[count - 1].seen; from += kKeys)
    for (int64_t i = 0; i < count; i++)
      if (from < groups[i].seen) attend_chunk<M>(h, groups[i], from, packed, weights);
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < groups[i].rows; r++)
      write_row(h, groups[i].first + r, groups[i].out + r * dim, sum_of(groups[i].sums[r]));
}

template <class M, DType T>
void attend_large_block(const AttentionArgs& a, int64_t block) {
  typedef typename M::Element E;
  const Head any(a, block, 0);
  const int64_t rows = any.rows(), chunks = (any.length + kKeys - 1) / kKeys;
  const int64_t tiles = (rows + kTileRows<M> - 1) / kTileRows<M>;
  const int64_t size = Packed<M>::size(chunks, a.head_dim);
  E *keys = (E*)scratch(0, a.num_kv_heads * size * sizeof(E)), *values = (E*)scratch(1, a.num_kv_heads * size * sizeof(E));
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Head h(a, block, i / chunks);
      const int64_t from = i % chunks * kKeys, at = i / chunks * size + from * a.head_dim;
      for (int64_t j = 0; j < kKeys; j += NR) pack_keys<M, T>(h, from + j, keys + at + j * a.head_dim);
      pack_values<M, T>(h, from, values + at);
    }
  };
  parallel_for(a.num_kv_heads * chunks, 1, pack);
  auto attend = [&](int64_t begin, int64_t end) {
    [[maybe_unused]] Tiles<M::kTiled> own;
    for (int64_t i = begin; i < end; i++) {
      // Later tiles see more: short and long ones alternate, so that every thread gets as many of each.
      const int64_t kv_head = i / tiles, turn = i % tiles, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      const int64_t first = tile * kTileRows<M>, last = first + kTileRows<M> < rows ? first + kTileRows<M> : rows;
      attend_tile<M>(Head(a, block, kv_head), first, last, {keys + kv_head * size, values + kv_head * size});
    }
  };
  parallel_for(a.num_kv_heads * tiles, 1, attend);
}

}  // namespace
}  // namespace tokenselect::TS_ISA
