// Many rows ("keys") that are read once, each multiplied with a few packed rows ("queries").
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kRowsAtOnce = W == 8 ? 6 : 8;  // sums that fit the registers

// How 2 W elements of a key become operands, and how a query is stored so that they meet their own dimensions.
struct Bf16 {
  typedef float Query;
  static constexpr int64_t size = 2;
  static inline __attribute__((always_inline)) void split(const char* key, vf& a, vf& b) {
    const vu pairs = load<vu>(key);
    a = (vf)(pairs << 16);
    b = (vf)(pairs & 0xffff0000u);
  }
  static int64_t place(int64_t i) { return i / (2 * W) * 2 * W + (i & 1) * W + i % (2 * W) / 2; }
};

struct F16 {
  typedef float Query;
  static constexpr int64_t size = 2;
  static inline __attribute__((always_inline)) void split(const char* key, vf& a, vf& b) {
    a = load_half((const uint16_t*)key);
    b = load_half((const uint16_t*)key + W);
  }
  static int64_t place(int64_t i) { return i; }
};

struct F32 {
  typedef float Query;
  static constexpr int64_t size = 4;
  static inline __attribute__((always_inline)) void split(const char* key, vf& a, vf& b) {
    a = load<vf>(key);
    b = load<vf>(key + sizeof(vf));
  }
  static int64_t place(int64_t i) { return i; }
};

// Sums of products of one key with `Rows` packed queries, spread over a vector each: out[row * W]. Keys are read one
// after the other, as memory likes it best; several sums per row, so that few rows do not wait for them.
template <class Key, int Rows>
TS_INLINE void dot_key(const char* key, const typename Key::Query* queries, int64_t dim, vf* out) {
  constexpr int kSums = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  vf sums[Rows][kSums] = {}, odd[Rows] = {};
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(Key, Bf16)) {  // queries are pairs of bf16 here
    auto add = [&](int r, int s, int64_t at) {
      const __m512bh pairs = load<__m512bh>(key + 2 * at);
      sums[r][s] = (vf)_mm512_dpbf16_ps((__m512)sums[r][s], pairs, load<__m512bh>((const uint16_t*)(queries + r * dim) + at));
    };
    for (; d + 2 * W * kSums <= dim; d += 2 * W * kSums)
      for (int s = 0; s < kSums; s++)
        for (int r = 0; r < Rows; r++) add(r, s, d + 2 * W * s);
    for (; d < dim; d += 2 * W)
      for (int r = 0; r < Rows; r++) add(r, 0, d);
  }
#endif
  for (; d < dim; d += 2 * W) {
    vf a, b;
    Key::split(key + d * Key::size, a, b);
    for (int r = 0; r < Rows; r++) {
      sums[r][0] += a * load<vf>(queries + r * dim + d);
      odd[r] += b * load<vf>(queries + r * dim + d + W);
    }
  }
  for (int r = 0; r < Rows; r++) {
    vf sum = odd[r];
    for (int s = 0; s < kSums; s++) sum += sums[r][s];
    out[r * W] = sum;
  }
}

// Logits [Rows, n] (stride `ld`, written in whole vectors) of `Rows` queries against `n` keys.
template <class Key, int Rows>
void dot_rows(const char* const* keys, int64_t n, const typename Key::Query* queries, int64_t dim, float* out,
              int64_t ld) {
  vf sums[Rows * W];  // [row][key]
  for (int64_t i = 0; i < n; i += W) {
    for (int64_t j = 0; j < W; j++) dot_key<Key, Rows>(keys[i + j < n ? i + j : n - 1], queries, dim, sums + j);
    for (int r = 0; r < Rows; r++) store(out + r * ld + i, sums_of(sums + r * W));
  }
}

template <class Key>
void dot_all(const char* const* keys, int64_t n, const typename Key::Query* queries, int64_t rows, int64_t dim,
             float* out, int64_t ld) {
  const int64_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t p = 0, r = 0; p < parts; p++) {
    const int64_t some = (rows - r + parts - p - 1) / (parts - p);
    const auto* q = queries + r * dim;
    float* o = out + r * ld;
    switch (some) {
      case 1: dot_rows<Key, 1>(keys, n, q, dim, o, ld); break;
      case 2: dot_rows<Key, 2>(keys, n, q, dim, o, ld); break;
      case 3: dot_rows<Key, 3>(keys, n, q, dim, o, ld); break;
      case 4: dot_rows<Key, 4>(keys, n, q, dim, o, ld); break;
      case 5: dot_rows<Key, 5>(keys, n, q, dim, o, ld); break;
      case 6: dot_rows<Key, 6>(keys, n, q, dim, o, ld); break;
      case 7: dot_rows<Key, 7>(keys, n, q, dim, o, ld); break;
      default: dot_rows<Key, 8>(keys, n, q, dim, o, ld); break;
    }
    r += some;
  }
}

// One query row in the order that its keys are read in.
template <class Key>
void pack(const float* query, int64_t dim, typename Key::Query* out) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(Key, Bf16)) {
    for (int64_t i = 0; i < dim; i++) ((uint16_t*)out)[i] = float_to_bf16(query[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < dim; i++) out[Key::place(i)] = query[i];
}

}  // namespace
}  // namespace tokenselect::TS_ISA
