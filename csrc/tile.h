// Tiles of W keys, turned on their side: a vector holds the same piece of each key, so a query's products with all of
// them add up in one vector and need no horizontal sums. A tile is made once and serves every query row.
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

// Rows of W vectors become columns.
#if defined(__AVX512F__)
TS_INLINE void transpose(vu* r) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  for (int c = 0; c < 4; c++) {  // 128-bit lane L of b[4 i + c] is column 4 L + c of rows 4 i ..
    const __m512i even0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    r[c] = (vu)_mm512_shuffle_i32x4(even0, even1, 0x88), r[8 + c] = (vu)_mm512_shuffle_i32x4(even0, even1, 0xdd);
    r[4 + c] = (vu)_mm512_shuffle_i32x4(odd0, odd1, 0x88), r[12 + c] = (vu)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#elif defined(__AVX2__)
TS_INLINE void transpose(vu* r) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  for (int c = 0; c < 4; c++) {
    r[c] = (vu)_mm256_permute2x128_si256(b[c], b[4 + c], 0x20);
    r[4 + c] = (vu)_mm256_permute2x128_si256(b[c], b[4 + c], 0x31);
  }
}
#else
TS_INLINE void transpose(vu* r) {
  vu t[W];
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) t[j][i] = r[i][j];
  for (int i = 0; i < W; i++) r[i] = t[i];
}
#endif

// What a piece is, by the kind of key: how many dimensions it holds, and its product with the same piece of a query.
// `Query` holds a row of `pieces` query pieces; `finish` turns a sum into a float, in units of the row.

struct F32 {
  static constexpr int64_t size = 4;
  static constexpr int64_t per_piece = 1;
  typedef vf Sum;
  struct Query {
    const float* pieces;
    explicit Query(const void* row, int64_t) : pieces((const float*)row) {}
    vf add(vf sum, vu piece, int64_t i) const { return sum + (vf)piece * pieces[i]; }
    vf finish(vf sum) const { return sum; }
  };
  static int64_t query_bytes(int64_t dim) { return dim * sizeof(float); }
  static float pack(const float* query, int64_t dim, void* row) {
    __builtin_memcpy(row, query, dim * sizeof(float));
    return 1.0f;
  }
  static vu load_pieces(const char* key) { return load<vu>(key); }
  static constexpr int kLoaded = W;  // dimensions that one load brings
  static void split(vu column, vu* pieces) { *pieces = column; }
  static constexpr int kSplit = 1;   // pieces in a column
};

struct F16 : F32 {
  static constexpr int64_t size = 2;
  static vu load_pieces(const char* key) { return (vu)load_half((const uint16_t*)key); }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  static constexpr int64_t size = 2;
  static constexpr int64_t per_piece = 2;
  typedef vf Sum;
  struct Query {
    const int32_t* pieces;
    explicit Query(const void* row, int64_t) : pieces((const int32_t*)row) {}
    vf add(vf sum, vu piece, int64_t i) const {
      return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)piece, (__m512bh)_mm512_set1_epi32(pieces[i]));
    }
    vf finish(vf sum) const { return sum; }
  };
  static int64_t query_bytes(int64_t dim) { return dim * 2; }
  static float pack(const float* query, int64_t dim, void* row) {
    for (int64_t i = 0; i < dim; i += 2 * W)
      store((uint16_t*)row + i, _mm512_cvtne2ps_pbh(load<__m512>(query + i + W), load<__m512>(query + i)));
    return 1.0f;
  }
  static vu load_pieces(const char* key) { return load<vu>(key); }
  static constexpr int kLoaded = 2 * W;
  static void split(vu column, vu* pieces) { *pieces = column; }
  static constexpr int kSplit = 1;
};
#else
struct Bf16 : F32 {
  static constexpr int64_t size = 2;
  static vu load_pieces(const char* key) { return load<vu>(key); }
  static constexpr int kLoaded = 2 * W;
  static void split(vu column, vu* pieces) { pieces[0] = column << 16, pieces[1] = column & 0xffff0000u; }
  static constexpr int kSplit = 2;
};
#endif

#if defined(__AVX512VNNI__)
// int8 keys meet queries of 15 bits, held as high and low bytes: products are exact and a sum over 256 dimensions fits.
struct I8 {
  static constexpr int64_t size = 1;
  static constexpr int64_t per_piece = 4;
  struct Sum {
    vi high, low;
  };
  struct Query {
    const int32_t *high, *low;
    int32_t offset;  // what the keys' shift to unsigned adds
    explicit Query(const void* row, int64_t dim) : high((const int32_t*)row), low(high + dim / 4) {
      offset = low[dim / 4];
    }
    Sum add(Sum sum, vu piece, int64_t i) const {
      return {(vi)_mm512_dpbusd_epi32((__m512i)sum.high, (__m512i)piece, _mm512_set1_epi32(high[i])),
              (vi)_mm512_dpbusd_epi32((__m512i)sum.low, (__m512i)piece, _mm512_set1_epi32(low[i]))};
    }
    vf finish(Sum sum) const { return __builtin_convertvector(sum.high * 128 + sum.low - offset, vf); }
  };
  static int64_t query_bytes(int64_t dim) { return 2 * dim + sizeof(int32_t); }
  static float pack(const float* query, int64_t dim, void* row) {
    vf most{};
    for (int64_t i = 0; i < dim; i += W) most = vmax(most, (vf)((vu)load<vf>(query + i) & 0x7fffffffu));
    const float largest = max_of(most), unit = largest > 0 ? largest / 16256.0f : 1.0f;
    vi sum{};
    for (int64_t i = 0; i < dim; i += W) {
      const __m512i q = _mm512_cvtps_epi32((__m512)(load<vf>(query + i) * (1.0f / unit)));
      const vi high = ((vi)q + 64) >> 7, low = (vi)q - high * 128;  // low is -64 .. 63
      sum += (vi)q;
      store((int8_t*)row + i, _mm512_cvtepi32_epi8((__m512i)high));
      store((int8_t*)row + dim + i, _mm512_cvtepi32_epi8((__m512i)low));
    }
    int32_t offset = 0;
    for (int j = 0; j < W; j++) offset += sum[j];
    store((int8_t*)row + 2 * dim, offset * 128);
    return unit;
  }
  static vu load_pieces(const char* key) { return load<vu>(key) ^ 0x80808080u; }
  static constexpr int kLoaded = 4 * W;
  static void split(vu column, vu* pieces) { *pieces = column; }
  static constexpr int kSplit = 1;
};
#else
struct I8 : F32 {
  static constexpr int64_t size = 1;
  static vu load_pieces(const char* key) { return load<vu>(key); }
  static constexpr int kLoaded = 4 * W;
  static void split(vu column, vu* pieces) {
    for (int i = 0; i < 4; i++) pieces[i] = (vu)__builtin_convertvector((vi)(column << (24 - 8 * i)) >> 24, vf);
  }
  static constexpr int kSplit = 4;
};
#endif

// Vectors that a tile takes.
template <class Key>
int64_t tile_size(int64_t dim) {
  return dim / Key::per_piece;
}

// Columns of the dimensions from `d` on, fewer than a load brings. Apart, so that the loop before it keeps its registers.
template <class Key>
__attribute__((noinline)) void make_last_columns(const char* const* keys, int64_t d, int64_t dim, vu* tile) {
  vu rows[W];
  for (int k = 0; k < W; k++) {
    char whole[sizeof(vu)] = {};
    __builtin_memcpy(whole, keys[k] + d * Key::size, (dim - d) * Key::size);
    rows[k] = Key::load_pieces(whole);
  }
  transpose(rows);
  for (int64_t c = 0; c < (dim - d) / (Key::kLoaded / W); c++) Key::split(rows[c], tile + c * Key::kSplit);
}

// The tile of the keys 0 .. W - 1.
template <class Key>
TS_INLINE void make_tile(const char* const* keys, int64_t dim, vu* tile) {
  int64_t d = 0;
  for (; d + Key::kLoaded <= dim; d += Key::kLoaded, tile += W * Key::kSplit) {
    vu rows[W];
    for (int k = 0; k < W; k++) rows[k] = Key::load_pieces(keys[k] + d * Key::size);
    transpose(rows);
    for (int c = 0; c < W; c++) Key::split(rows[c], tile + c * Key::kSplit);
  }
  if (d < dim) make_last_columns<Key>(keys, d, dim, tile);
}

constexpr int64_t kTilesAhead = 2;
constexpr int kRowsAtOnce = W == 8 ? 6 : 8;  // sums that fit the registers

// Products of `Tiles` tiles, one after the other, with `Rows` packed queries: out[row * ld + key], times `units[row]`
// and, where they are given, the keys' own scales, plus `shifts[row]`.
template <class Key, int Rows, int Tiles>
TS_INLINE void multiply_tiles(const vu* tiles, const char* queries, int64_t dim, const float* units,
                              const float* shifts, const float* key_scales, float* out, int64_t ld) {
  const int64_t pieces = tile_size<Key>(dim), bytes = Key::query_bytes(dim);
  typename Key::Sum sums[Tiles][Rows] = {};
  for (int64_t i = 0; i < pieces; i++)
    for (int t = 0; t < Tiles; t++) {
      const vu piece = tiles[t * pieces + i];
      for (int r = 0; r < Rows; r++) sums[t][r] = typename Key::Query(queries + r * bytes, dim).add(sums[t][r], piece, i);
    }
  for (int t = 0; t < Tiles; t++) {
    const vf scales = key_scales ? load<vf>(key_scales + t * W) : set1(1.0f);
    for (int r = 0; r < Rows; r++) {
      const vf made = typename Key::Query(queries + r * bytes, dim).finish(sums[t][r]);
      store(out + r * ld + t * W, made * (scales * units[r]) + shifts[r]);
    }
  }
}

template <class Key, int Tiles>
void multiply_all(const vu* tiles, const char* queries, int64_t rows, int64_t dim, const float* units,
                  const float* shifts, const float* key_scales, float* out, int64_t ld) {
  const int64_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce, bytes = Key::query_bytes(dim);
  for (int64_t p = 0, r = 0; p < parts; p++) {
    const int64_t some = (rows - r + parts - p - 1) / (parts - p);
    const char* q = queries + r * bytes;
    float* o = out + r * ld;
    const float *u = units + r, *h = shifts + r;
    switch (some) {
      case 1: multiply_tiles<Key, 1, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 2: multiply_tiles<Key, 2, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 3: multiply_tiles<Key, 3, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 4: multiply_tiles<Key, 4, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 5: multiply_tiles<Key, 5, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 6: multiply_tiles<Key, 6, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      case 7: multiply_tiles<Key, 7, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
      default: multiply_tiles<Key, 8, Tiles>(tiles, q, dim, u, h, key_scales, o, ld); break;
    }
    r += some;
  }
}

// While a tile is computed, those after the next come from memory into the second cache: requests to the first, of which
// few can be under way at once, would hold up the loads.
template <class Key>
TS_INLINE void fetch_ahead(const char* const* keys, int64_t i, int64_t known, int64_t dim) {
  const int64_t first = i + kTilesAhead * W, last = first + 2 * W < known ? first + 2 * W : known;
  for (int64_t k = first; k < last; k++)
    for (int64_t at = 0; at < dim * Key::size; at += 64) __builtin_prefetch(keys[k] + at, 0, 2);
}

// Logits [rows, n] (stride `ld`, written in whole vectors) of packed queries against `n` keys. `tiles` is room for two;
// `key_scales`, if given, may be read to a whole vector. `known` keys, n at least, are those that will be asked for next.
template <class Key>
void dot_tiles(const char* const* keys, int64_t n, int64_t known, vu* tiles, const char* queries, int64_t rows, int64_t dim,
               const float* units, const float* shifts, const float* key_scales, float* out, int64_t ld) {
  const char* some[W];
  const int64_t size = tile_size<Key>(dim);
  for (int64_t i = 0; i < n;) {
    fetch_ahead<Key>(keys, i, known, dim);
    const int together = i + W < n && rows <= kRowsAtOnce / 2 ? 2 : 1;  // few rows alone would wait for their own sums
    for (int t = 0; t < together; t++) {
      const int64_t first = i + t * W;
      const bool whole = first + W <= n;
      for (int k = 0; !whole && k < W; k++) some[k] = keys[first + k < n ? first + k : n - 1];
      make_tile<Key>(whole ? keys + first : some, dim, tiles + t * size);
    }
    const float* scales = key_scales ? key_scales + i : nullptr;
    if (together == 2) multiply_all<Key, 2>(tiles, queries, rows, dim, units, shifts, scales, out + i, ld);
    else multiply_all<Key, 1>(tiles, queries, rows, dim, units, shifts, scales, out + i, ld);
    i += together * W;
  }
}

}  // namespace
}  // namespace tokenselect::TS_ISA
