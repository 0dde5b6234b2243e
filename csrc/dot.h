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

// Sums of products of `Keys` keys with `Rows` packed queries, spread over a vector each: out[row * W + key].
template <class Key, int Rows, int Keys>
TS_INLINE void dot_keys(const char* const* keys, const typename Key::Query* queries, int64_t dim, vf* out) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(Key, Bf16)) {  // queries are pairs of bf16 here
    __m512 sum[Keys][Rows] = {};
    for (int64_t d = 0; d < dim; d += 2 * W)
      for (int k = 0; k < Keys; k++) {
        const __m512bh pairs = load<__m512bh>(keys[k] + 2 * d);
        for (int r = 0; r < Rows; r++)
          sum[k][r] = _mm512_dpbf16_ps(sum[k][r], pairs, load<__m512bh>((const uint16_t*)(queries + r * dim) + d));
      }
    for (int k = 0; k < Keys; k++)
      for (int r = 0; r < Rows; r++) out[r * W + k] = (vf)sum[k][r];
    return;
  }
#endif
  {
    vf even[Keys][Rows] = {}, odd[Keys][Rows] = {};
    for (int64_t d = 0; d < dim; d += 2 * W)
      for (int k = 0; k < Keys; k++) {
        vf a, b;
        Key::split(keys[k] + d * Key::size, a, b);
        for (int r = 0; r < Rows; r++) {
          even[k][r] += a * load<vf>(queries + r * dim + d);
          odd[k][r] += b * load<vf>(queries + r * dim + d + W);
        }
      }
    for (int k = 0; k < Keys; k++)
      for (int r = 0; r < Rows; r++) out[r * W + k] = even[k][r] + odd[k][r];
  }
}

// Logits [Rows, n] (stride `ld`, written in whole vectors) of `Rows` queries against `n` keys.
template <class Key, int Rows>
void dot_rows(const char* const* keys, int64_t n, const typename Key::Query* queries, int64_t dim, float* out,
              int64_t ld) {
  constexpr int kAtOnce = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;  // few rows alone would wait for their own sums
  vf sums[Rows * W];                          // [row][key]
  for (int64_t i = 0; i < n; i += W) {
    for (int64_t j = 0; j < W; j += kAtOnce) {
      const char* some[kAtOnce];
      for (int k = 0; k < kAtOnce; k++) some[k] = keys[i + j + k < n ? i + j + k : n - 1];
      dot_keys<Key, Rows, kAtOnce>(some, queries, dim, sums + j);
    }
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
