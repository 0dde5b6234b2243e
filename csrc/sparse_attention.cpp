// Attention over the chosen rows at re-indexed positions: the i-th attended row is rotated to position i.
//
// Few queries (a decode step): one pass that gathers, rotates, weighs and sums, split over the keys. Only differences of
// positions count, so a chunk's keys are rotated as if it began at 0 and the queries by as much less: of the tables, which
// are as large as the keys of a head, a few rows are read that stay in cache. Many queries: keys
// are gathered, rotated and packed once per KV head, then tiles of query rows go over them in register-blocked matrix
// products with a running softmax (Dao, "FlashAttention-2", algorithm 1), so no logits beyond a tile's chunk exist.
// A row is one query of one head of the group: row = query * group + head.
#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr float kNone = -3.4e38f;
constexpr int64_t kChunk = 128;    // keys whose logits exist at once
constexpr int64_t kFewRows = 16;   // up to so many rows, packing the keys costs more than it saves
constexpr int64_t kLeastSplit = 256;
constexpr int64_t kAhead = 16;     // keys between asking for a row and reading it
constexpr int NR = 2 * W;                            // columns of a register tile
constexpr int MR = W == 16 ? 12 : W == 8 ? 6 : 4;    // its rows
constexpr int64_t kTileRows = 8 * MR;

// One block and one of its KV heads.
struct Head {
  const AttentionArgs& a;
  int64_t block, kv_head;
  int64_t first_query, own;  // queries of the block
  const int64_t* slots;
  int64_t length;  // attended rows
  int64_t group;   // query heads per KV head

  Head(const AttentionArgs& args, int64_t b, int64_t h) : a(args), block(b), kv_head(h) {
    first_query = a.query_start_loc[b], own = a.query_start_loc[b + 1] - first_query;
    slots = a.slots + a.slot_start_loc[b], length = a.slot_start_loc[b + 1] - a.slot_start_loc[b];
    group = a.num_q_heads / a.num_kv_heads;
  }
  int64_t rows() const { return own * group; }
  // Keys that a row sees.
  int64_t limit(int64_t row) const { return length - own + row / group + 1; }
  int64_t element(int64_t row) const {
    return ((first_query + row / group) * a.num_q_heads + kv_head * group + row % group) * a.head_dim;
  }
  float sink(int64_t row) const { return a.sink_logits[kv_head * group + row % group]; }
};

TS_INLINE void rotate_to(const Head& h, int64_t position, float* x) {
  rotate_row(x, x, h.a.cos + position * h.a.half, h.a.sin + position * h.a.half, h.a.half, h.a.interleaved);
}

TS_INLINE int64_t key_element(const Head& h, const Rows& rows, int64_t i) {
  return h.slots[i] * rows.row_stride + h.kv_head * rows.head_stride;
}

// Rows lie anywhere: what is not asked for ahead is waited for. Into the second cache: the first takes few requests at once.
template <DType T>
TS_INLINE void fetch(const Head& h, const Rows& rows, int64_t i) {
  constexpr int64_t size = bytes_of(T);
  const char* row = (const char*)rows.data + key_element(h, rows, i) * size;
  for (int64_t at = 0; at < h.a.head_dim * size; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// The i-th attended key, rotated to a position.
template <DType T>
TS_INLINE void load_key(const Head& h, int64_t i, int64_t position, float* out) {
  const int64_t from = key_element(h, h.a.keys, i), half = h.a.half;
  if (h.a.interleaved || 2 * half != h.a.head_dim || half % W) {
    for (int64_t d = 0; d < h.a.head_dim; d += W) store(out + d, load_as_float(h.a.keys.data, from + d, T));
    return rotate_to(h, position, out);
  }
  // The usual layout: nothing is stored that is read again at once.
  const float *cos = h.a.cos + position * half, *sin = h.a.sin + position * half;
  for (int64_t d = 0; d < half; d += W) {
    const vf a = load_as_float(h.a.keys.data, from + d, T), b = load_as_float(h.a.keys.data, from + half + d, T);
    const vf c = load<vf>(cos + d), s = load<vf>(sin + d);
    store(out + d, a * c - b * s);
    store(out + half + d, b * c + a * s);
  }
}

// A row's query, rotated to a position and scaled.
TS_INLINE void load_query(const Head& h, int64_t row, int64_t position, float* out) {
  const int64_t from = h.element(row);
  for (int64_t d = 0; d < h.a.head_dim; d += W) store(out + d, load_as_float(h.a.queries, from + d, h.a.dtype));
  rotate_to(h, position, out);
  for (int64_t d = 0; d < h.a.head_dim; d += W) store(out + d, load<vf>(out + d) * h.a.scale);
}

TS_INLINE vf capped(vf x, float cap) {  // cap * tanh(x / cap)
  vf y = x * (2.0f / cap);
  y = y > 80.0f ? set1(80.0f) : y;
  return cap - 2.0f * cap / (vexp(y) + 1.0f);
}

struct Running {
  float most, sum;
};

// Logits of a row become weights under its new maximum, zero from `n` to `padded`; returns the factor of older sums.
float soften(float* logits, int64_t n, int64_t padded, float softcap, Running& state) {
  vi lane{};
  for (int j = 0; j < W; j++) lane[j] = j;
  vf most = set1(state.most);
  for (int64_t i = 0; i < n; i += W) {
    vf x = load<vf>(logits + i);
    if (softcap != 0) x = capped(x, softcap);
    if (i + W > n) x = lane < (int32_t)(n - i) ? x : set1(kNone);
    store(logits + i, x);
    most = vmax(most, x);
  }
  const float now = max_of(most);
  vf sum{};
  int64_t i = 0;
  for (; i < n; i += W) {
    vf e = vexp(load<vf>(logits + i) - now);
    if (i + W > n) e = lane < (int32_t)(n - i) ? e : vf{};
    store(logits + i, e);
    sum += e;
  }
  for (; i < padded; i += W) store(logits + i, vf{});
  const float factor = state.most == now ? 1.0f : vexp(set1(state.most - now))[0];
  state = {now, state.sum * factor + sum_of(sum)};
  return factor;
}

TS_INLINE Running start(const Head& h, int64_t row, bool with_sink) {
  if (with_sink && h.a.sink_logits) return {h.sink(row), 1.0f};
  return {kNone, 0.0f};
}

// ---- few rows -------------------------------------------------------------------------------------------------------

// Logits of R rows against W rotated keys [W, dim].
template <int R>
void dot_keys(const float* keys, const float* queries, int64_t dim, float* out) {
  vf sums[R * W];
  for (int k = 0; k < W; k += 2) {
    vf one[R] = {}, two[R] = {};
    for (int64_t d = 0; d < dim; d += W) {
      const vf a = load<vf>(keys + k * dim + d), b = load<vf>(keys + (k + 1) * dim + d);
      for (int r = 0; r < R; r++) {
        const vf q = load<vf>(queries + r * dim + d);
        one[r] += a * q, two[r] += b * q;
      }
    }
    for (int r = 0; r < R; r++) sums[r * W + k] = one[r], sums[r * W + k + 1] = two[r];
  }
  for (int r = 0; r < R; r++) store(out + r * kChunk, sums_of(sums + r * W));
}

// out[R, dim] += weights[R, n] . values, whose rows lie anywhere; the dimensions d .. d + V * W - 1.
template <DType T, int R, int V>
TS_INLINE void add_panel(const Head& h, int64_t from, int64_t n, const float* weights, float* out, int64_t d) {
  const int64_t dim = h.a.head_dim;
  vf sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = load<vf>(out + r * dim + d + v * W);
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = key_element(h, h.a.values, from + i) + d;
    vf x[V];
    for (int v = 0; v < V; v++) x[v] = load_as_float(h.a.values.data, at + v * W, T);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sums[r][v] += weights[r * kChunk + i] * x[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * dim + d + v * W, sums[r][v]);
}

template <DType T, int R>
void add_values(const Head& h, int64_t from, int64_t n, const float* weights, float* out) {
  int64_t d = 0;
  if (W == 16)  // enough registers for a whole row of 64
    for (; d + 4 * W <= h.a.head_dim; d += 4 * W) add_panel<T, R, 4>(h, from, n, weights, out, d);
  for (; d < h.a.head_dim; d += NR) add_panel<T, R, 2>(h, from, n, weights, out, d);
}

template <DType T, int R>
void few_rows(const Head& h, int64_t n, int64_t from, const float* queries, float* keys, float* logits, float* out,
              Running* state, int64_t first_row) {
  const int64_t dim = h.a.head_dim;
  for (int64_t i = 0; i < n; i += W) dot_keys<R>(keys + i * dim, queries, dim, logits + i);
  for (int r = 0; r < R; r++) {
    const int64_t seen = h.limit(first_row + r) - from;
    const float factor = soften(logits + r * kChunk, seen < 0 ? 0 : seen < n ? seen : n, n, h.a.softcap, state[r]);
    if (factor != 1.0f)
      for (int64_t d = 0; d < dim; d += W) store(out + r * dim + d, load<vf>(out + r * dim + d) * factor);
  }
  add_values<T, R>(h, from, n, logits, out);
}

// All rows over the keys from .. to - 1: sums in `out` [rows, dim], not yet divided.
template <DType T>
void attend_few(const Head& h, int64_t from, int64_t to, float* out, Running* state) {
  const int64_t rows = h.rows(), dim = h.a.head_dim;
  float* queries = (float*)scratch(2, (rows * dim + kChunk * dim + 4 * kChunk) * sizeof(float));
  float *keys = queries + rows * dim, *logits = keys + kChunk * dim;
  for (int64_t r = 0; r < rows; r++) state[r] = start(h, r, from == 0);
  __builtin_memset(out, 0, rows * dim * sizeof(float));
  for (int64_t at = from; at < to; at += kChunk) {
    const int64_t n = to - at < kChunk ? to - at : kChunk;
    for (int64_t i = 0; i < n; i++) {
      if (at + i + kAhead < to) fetch<T>(h, h.a.keys, at + i + kAhead);
      fetch<T>(h, h.a.values, at + i);
      load_key<T>(h, at + i, i, keys + i * dim);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t ahead = h.limit(r) - 1 - at;  // negative: the row sees none of these keys
      load_query(h, r, ahead > 0 ? ahead : 0, queries + r * dim);
    }
    for (int64_t r = 0; r < rows;) {
      float* sums = out + r * dim;
      const float* q = queries + r * dim;
      switch (rows - r) {
        case 1: few_rows<T, 1>(h, n, at, q, keys, logits, sums, state + r, r), r += 1; break;
        case 2: few_rows<T, 2>(h, n, at, q, keys, logits, sums, state + r, r), r += 2; break;
        case 3: few_rows<T, 3>(h, n, at, q, keys, logits, sums, state + r, r), r += 3; break;
        default: few_rows<T, 4>(h, n, at, q, keys, logits, sums, state + r, r), r += 4; break;
      }
    }
  }
}

void write_row(const Head& h, int64_t row, const float* sums, float total) {
  for (int64_t d = 0; d < h.a.head_dim; d += W)
    store_from_float(h.a.out, h.element(row) + d, h.a.dtype, load<vf>(sums + d) * (1.0f / total));
}

// Splits of the keys leave sums under their own maximum; brought to the common one they add up.
void merge_splits(const Head& h, int64_t splits, float* sums, const Running* states) {
  const int64_t rows = h.rows(), dim = h.a.head_dim;
  for (int64_t r = 0; r < rows; r++) {
    float most = kNone, total = 0;
    for (int64_t s = 0; s < splits; s++) most = states[s * rows + r].most > most ? states[s * rows + r].most : most;
    for (int64_t s = 0; s < splits; s++) {
      const float lift = vexp(set1(states[s * rows + r].most - most))[0];
      total += states[s * rows + r].sum * lift;
      for (int64_t d = 0; d < dim; d += W) {
        const vf part = load<vf>(sums + (s * rows + r) * dim + d) * lift;
        store(sums + r * dim + d, s ? load<vf>(sums + r * dim + d) + part : part);
      }
    }
    write_row(h, r, sums + r * dim, total);
  }
}

// Blocks first .. last - 1, each of at most kFewRows rows.
void attend_small_blocks(const AttentionArgs& a, int64_t first, int64_t last) {
  const int64_t heads = (last - first) * a.num_kv_heads;
  const int64_t wanted = (4 * num_threads() + heads - 1) / heads;
  int64_t longest = 0;
  for (int64_t b = first; b < last; b++) {
    const int64_t length = a.slot_start_loc[b + 1] - a.slot_start_loc[b];
    longest = length > longest ? length : longest;
  }
  const int64_t most = num_threads() == 1 ? 1 : (longest + kLeastSplit - 1) / kLeastSplit;
  const int64_t splits = wanted < most ? wanted : most > 0 ? most : 1;
  const int64_t per_head = splits * kFewRows;
  float* sums = (float*)scratch(0, heads * per_head * a.head_dim * sizeof(float));
  Running* states = (Running*)scratch(1, heads * per_head * sizeof(Running));
  auto attend = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t item = i / splits, split = i % splits;
      const Head h(a, first + item / a.num_kv_heads, item % a.num_kv_heads);
      const int64_t size = (h.length + splits - 1) / splits, begin = split * size < h.length ? split * size : h.length;
      const int64_t end = begin + size < h.length ? begin + size : h.length;
      const int64_t place = item * per_head + split * h.rows();
      float* out = sums + place * a.head_dim;
      if (a.dtype == DType::f32) attend_few<DType::f32>(h, begin, end, out, states + place);
      else if (a.dtype == DType::bf16) attend_few<DType::bf16>(h, begin, end, out, states + place);
      else attend_few<DType::f16>(h, begin, end, out, states + place);
    }
  };
  parallel_for(heads * splits, 1, attend);
  for (int64_t i = 0; i < heads; i++)
    merge_splits(Head(a, first + i / a.num_kv_heads, i % a.num_kv_heads), splits, sums + i * per_head * a.head_dim,
                 states + i * per_head);
}

// ---- many rows ------------------------------------------------------------------------------------------------------

// Operands of the matrix products: float, or pairs of bf16 where the processor multiplies those.
struct Floats {
  typedef float Element;
  static constexpr int kPair = 1;
  static inline __attribute__((always_inline)) float from(float x) { return x; }
};

struct Bf16Pairs {
  typedef uint16_t Element;
  static constexpr int kPair = 2;
  static inline __attribute__((always_inline)) uint16_t from(float x) { return float_to_bf16(x); }
};

#if defined(__AVX512BF16__)
typedef Bf16Pairs HalfProducts;
#else
typedef Floats HalfProducts;
#endif

// c[R, NR] = a[R, depth] . b[depth, NR] (+ c); b is one packed panel.
template <class M, int R>
void multiply(const typename M::Element* a, int64_t lda, const typename M::Element* b, int64_t depth, float* c,
              int64_t ldc, bool add) {
  vf low[R], high[R];
  for (int r = 0; r < R; r++) {
    low[r] = add ? load<vf>(c + r * ldc) : vf{};
    high[r] = add ? load<vf>(c + r * ldc + W) : vf{};
  }
  for (int64_t k = 0; k < depth; k += M::kPair, b += NR * M::kPair) {
#if defined(__AVX512BF16__)
    if constexpr (M::kPair == 2) {
      const __m512bh x = load<__m512bh>(b), y = load<__m512bh>(b + 2 * W);
      for (int r = 0; r < R; r++) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * lda + k));
        low[r] = (vf)_mm512_dpbf16_ps((__m512)low[r], both, x);
        high[r] = (vf)_mm512_dpbf16_ps((__m512)high[r], both, y);
      }
      continue;
    }
#endif
    if constexpr (M::kPair == 1) {
      const vf x = load<vf>(b), y = load<vf>(b + W);
      for (int r = 0; r < R; r++) {
        const vf one = set1(a[r * lda + k]);
        low[r] += one * x, high[r] += one * y;
      }
    }
  }
  for (int r = 0; r < R; r++) store(c + r * ldc, low[r]), store(c + r * ldc + W, high[r]);
}

// Packed keys and values of one KV head: chunks of kChunk keys, padded with zeros.
// Keys: panels of NR keys, [panel][dim][NR]; values: panels of NR dimensions, [panel][key][NR]; pairs side by side.
template <class M>
struct Packed {
  typename M::Element *keys, *values;
  static int64_t size(int64_t chunks, int64_t dim) { return chunks * kChunk * dim; }
};

template <class M, DType T>
void pack_chunk(const Head& h, int64_t chunk, const Packed<M>& to) {
  constexpr int P = M::kPair;
  const int64_t dim = h.a.head_dim, from = chunk * kChunk;
  auto* keys = to.keys + from * dim;
  auto* values = to.values + from * dim;
  float* rows = (float*)scratch(2, NR * dim * sizeof(float));
  for (int64_t panel = 0; panel < kChunk; panel += NR, keys += NR * dim) {
    for (int64_t j = 0; j < NR; j++) {
      if (from + panel + j + kAhead < h.length) fetch<T>(h, h.a.keys, from + panel + j + kAhead);
      if (from + panel + j < h.length) load_key<T>(h, from + panel + j, from + panel + j, rows + j * dim);
      else __builtin_memset(rows + j * dim, 0, dim * sizeof(float));
    }
    for (int64_t d = 0; d < dim; d++)
      for (int64_t j = 0; j < NR; j++) keys[(d / P * NR + j) * P + d % P] = M::from(rows[j * dim + d]);
  }
  for (int64_t i = 0; i < kChunk; i++) {
    const bool is_there = from + i < h.length;
    const int64_t row = is_there ? key_element(h, h.a.values, from + i) : 0;
    for (int64_t d = 0; d < dim; d += W) {
      const vf x = is_there ? load_as_float(h.a.values.data, row + d, T) : vf{};
      auto* out = values + d / NR * kChunk * NR + i / P * NR * P + i % P;
      if constexpr (P == 1) store(out + d % NR, x);
      else
        for (int j = 0; j < W; j++) out[(d % NR + j) * P] = M::from(x[j]);
    }
  }
}

// Rows first .. last - 1 of one head against all that they see.
template <class M>
void attend_tile(const Head& h, int64_t first, int64_t last, const Packed<M>& packed) {
  typedef typename M::Element E;
  const int64_t dim = h.a.head_dim, rows = last - first, padded = (rows + MR - 1) / MR * MR;
  float* out = (float*)scratch(2, kTileRows * (2 * dim + 2 * kChunk + 2) * sizeof(float) + dim * sizeof(float));
  float* logits = out + kTileRows * dim;
  Running* states = (Running*)(logits + kTileRows * kChunk);
  float* one = (float*)(states + kTileRows);
  E* queries = (E*)(one + dim);
  E* weights = M::kPair == 1 ? (E*)logits : queries + kTileRows * dim;
  __builtin_memset(out, 0, padded * dim * sizeof(float));
  for (int64_t r = 0; r < padded; r++) {
    if (r < rows) {
      load_query(h, first + r, h.limit(first + r) - 1, one);
      states[r] = start(h, first + r, true);
    }
    for (int64_t d = 0; d < dim; d++) queries[r * dim + d] = r < rows ? M::from(one[d]) : E(0);
  }
  const int64_t seen = h.limit(last - 1);
  for (int64_t from = 0; from < seen; from += kChunk) {
    const E *keys = packed.keys + from * dim, *values = packed.values + from * dim;
    for (int64_t panel = 0; panel < kChunk; panel += NR)
      for (int64_t r = 0; r < padded; r += MR)
        multiply<M, MR>(queries + r * dim, dim, keys + panel * dim, dim, logits + r * kChunk + panel, kChunk, false);
    for (int64_t r = 0; r < padded; r++) {
      float* row = logits + r * kChunk;
      if (r < rows) {
        const int64_t left = h.limit(first + r) - from;
        const float factor = soften(row, left < 0 ? 0 : left < kChunk ? left : kChunk, kChunk, h.a.softcap, states[r]);
        if (factor != 1.0f)
          for (int64_t d = 0; d < dim; d += W) store(out + r * dim + d, load<vf>(out + r * dim + d) * factor);
      }
      if constexpr (M::kPair == 2)
        for (int64_t i = 0; i < kChunk; i++) weights[r * kChunk + i] = M::from(row[i]);
    }
    for (int64_t d = 0; d < dim; d += NR)
      for (int64_t r = 0; r < padded; r += MR)
        multiply<M, MR>(weights + r * kChunk, kChunk, values + d * kChunk, kChunk, out + r * dim + d, dim, true);
  }
  for (int64_t r = 0; r < rows; r++) write_row(h, first + r, out + r * dim, states[r].sum);
}

template <class M, DType T>
void attend_large_block(const AttentionArgs& a, int64_t block) {
  const Head any(a, block, 0);
  const int64_t chunks = (any.length + kChunk - 1) / kChunk, tiles = (any.rows() + kTileRows - 1) / kTileRows;
  const int64_t size = Packed<M>::size(chunks, a.head_dim);
  auto* keys = (typename M::Element*)scratch(0, a.num_kv_heads * size * sizeof(typename M::Element));
  auto* values = (typename M::Element*)scratch(1, a.num_kv_heads * size * sizeof(typename M::Element));
  auto pack = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
      pack_chunk<M, T>(Head(a, block, i / chunks), i % chunks, {keys + i / chunks * size, values + i / chunks * size});
  };
  parallel_for(a.num_kv_heads * chunks, 1, pack);
  auto attend = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      // Later tiles see more: short and long ones alternate, so that every thread gets as many of each.
      const int64_t kv_head = i / tiles, turn = i % tiles, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      const int64_t first = tile * kTileRows, last = first + kTileRows < any.rows() ? first + kTileRows : any.rows();
      attend_tile<M>(Head(a, block, kv_head), first, last, {keys + kv_head * size, values + kv_head * size});
    }
  };
  parallel_for(a.num_kv_heads * tiles, 1, attend);
}

}  // namespace

void sparse_attention(const AttentionArgs& a) {
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  auto is_small = [&](int64_t b) { return (a.query_start_loc[b + 1] - a.query_start_loc[b]) * group <= kFewRows; };
  for (int64_t block = 0; block < a.num_blocks;) {
    int64_t next = block;
    while (next < a.num_blocks && is_small(next)) next++;
    if (next > block) {
      attend_small_blocks(a, block, next);
      block = next;
      continue;
    }
    switch (a.dtype) {
      case DType::bf16: attend_large_block<HalfProducts, DType::bf16>(a, block); break;
      case DType::f16: attend_large_block<Floats, DType::f16>(a, block); break;
      default: attend_large_block<Floats, DType::f32>(a, block); break;
    }
    block++;
  }
}

}  // namespace tokenselect::TS_ISA
