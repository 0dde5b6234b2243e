// Attention of few queries, as in a decode step: one pass that gathers, rotates, weighs and sums, split over the keys.
// Only differences of positions count, so a chunk's keys are rotated as if it began at 0 and the queries by as much less:
// of the tables, which are as large as the keys of a head, a few rows are read that stay in cache.
#pragma once

#include "attention.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 128;   // keys whose logits exist at once
constexpr int64_t kFewRows = 16;  // up to so many rows, packing the keys costs more than it saves
constexpr int64_t kMostSplits = 16;

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
  for (; d < h.a.head_dim; d += 2 * W) add_panel<T, R, 2>(h, from, n, weights, out, d);
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
      if (at + i + kAhead < h.length) fetch<T>(h, h.a.keys, at + i + kAhead);
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

// Keys of one task: the same for any number of threads and in any batch, and so are their sums.
int64_t split_size(int64_t length) {
  const int64_t chunks = (length + kMostSplits * kChunk - 1) / (kMostSplits * kChunk);
  return chunks > 1 ? chunks * kChunk : kChunk;
}

// Blocks first .. last - 1, each of at most kFewRows rows.
void attend_small_blocks(const AttentionArgs& a, int64_t first, int64_t last) {
  const int64_t heads = (last - first) * a.num_kv_heads;
  int64_t splits = 1, rows = 1;
  for (int64_t b = first; b < last; b++) {
    const Head h(a, b, 0);
    const int64_t own = (h.length + split_size(h.length) - 1) / split_size(h.length);
    splits = own > splits ? own : splits, rows = h.rows() > rows ? h.rows() : rows;
  }
  const int64_t per_head = splits * rows;
  float* sums = (float*)scratch(0, heads * per_head * a.head_dim * sizeof(float));
  Running* states = (Running*)scratch(1, heads * per_head * sizeof(Running));
  auto attend = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t item = i / splits, split = i % splits;
      const Head h(a, first + item / a.num_kv_heads, item % a.num_kv_heads);
      const int64_t size = split_size(h.length), begin = split * size < h.length ? split * size : h.length;
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

}  // namespace
}  // namespace tokenselect::TS_ISA
