// What both ways of sparse attention share: a block's rows, the keys that it attends, and their rotations.
// A row is one query of one head of the group: row = query * group + head.
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr float kNone = -3.4e38f;
constexpr int64_t kAhead = 16;  // keys between asking for a row and reading it

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

TS_INLINE void write_row(const Head& h, int64_t row, const float* sums, float total) {
  for (int64_t d = 0; d < h.a.head_dim; d += W)
    store_from_float(h.a.out, h.element(row) + d, h.a.dtype, load<vf>(sums + d) * (1.0f / total));
}

}  // namespace
}  // namespace tokenselect::TS_ISA
