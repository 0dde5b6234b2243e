// Tiles of W keys, turned on their side: a vector holds the same piece of each key, so a query's products with all of
// them add up in one vector and need no horizontal sums. A tile is made once and serves every query row.
//
// What one load of each key brings are `kLoaded` dimensions, a block: W columns of W * 4 bytes, which meet W * kSplit
// pieces of 4 bytes of each query. Queries are packed block by block, in a block row by row: from one pointer all lie
// at places that the compiler knows, and no instruction goes into finding them.
#pragma once

#include "transpose.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int kRowsAtOnce = W == 16 ? 8 : 6;  // with the columns of a block, their sums nearly fit the registers

template <int N>
TS_INLINE void store_all(const vf* x, char* out) {
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) store(out + i * sizeof(vf), x[i]);
}

// By the kind of key: what a column holds, and its product with a piece of a query. `pack` writes a block of a query,
// `kLoaded` / W vectors; `offset_of` and `finish` undo what the products are counted from.

struct F32 {
  static constexpr int64_t size = 4;
  typedef vf Sum;
  static constexpr int64_t kLoaded = W;
  static constexpr int kSplit = 1;       // pieces in an element of a column
  static constexpr float kLargest = 0;   // number that a packed query holds; 0: any
  static vu load_pieces(const char* key) { return load<vu>(key); }
  static void split(vu column, vu* pieces) { *pieces = column; }
  static vf add(vf sum, vu piece, const void* query) { return sum + (vf)piece * load<float>(query); }
  static vf finish(vf sum, int32_t) { return sum; }
  TS_INLINE void pack(const vf* query, char* out) { store(out, *query); }
  static int32_t offset_of(const char*, int64_t, int64_t) { return 0; }
};

struct F16 : F32 {
  static constexpr int64_t size = 2;
  static vu load_pieces(const char* key) { return (vu)load_half((const uint16_t*)key); }
};

#if defined(__AVX512BF16__)
struct Bf16 : F32 {
  static constexpr int64_t size = 2;
  static constexpr int64_t kLoaded = 2 * W;
  static vf add(vf sum, vu piece, const void* query) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)piece, (__m512bh)_mm512_set1_epi32(load<int32_t>(query)));
  }
  TS_INLINE void pack(const vf* query, char* out) {
    store(out, _mm512_cvtne2ps_pbh((__m512)query[1], (__m512)query[0]));
  }
};
#else
struct Bf16 : F32 {
  static constexpr int64_t size = 2;
  static constexpr int64_t kLoaded = 2 * W;
  static constexpr int kSplit = 2;
  static void split(vu column, vu* pieces) { pieces[0] = column << 16, pieces[1] = column & 0xffff0000u; }
  TS_INLINE void pack(const vf* query, char* out) { store_all<2>(query, out); }
};
#endif

#if defined(__AVX512VNNI__)
// int8 keys meet int8 queries: products are exact and a sum over 256 dimensions fits.
struct I8 {
  static constexpr int64_t size = 1;
  typedef vi Sum;
  static constexpr int64_t kLoaded = 4 * W;
  static constexpr int kSplit = 1;
  static constexpr float kLargest = 127;
  static vu load_pieces(const char* key) { return load<vu>(key) ^ 0x80808080u; }  // unsigned, as products want them
  static void split(vu column, vu* pieces) { *pieces = column; }
  static vi add(vi sum, vu piece, const void* query) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)piece, _mm512_set1_epi32(load<int32_t>(query)));
  }
  static vf finish(vi sum, int32_t offset) { return __builtin_convertvector(sum - offset, vf); }
  TS_INLINE void pack(const vf* query, char* out) {
    auto rounded = [&](int i) { return _mm512_cvtps_epi32((__m512)query[i]); };
    const __m512i low = _mm512_packs_epi32(rounded(0), rounded(1)), high = _mm512_packs_epi32(rounded(2), rounded(3));
    // Each 128-bit lane holds pieces of four vectors, which are put in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(out, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
  }
  // What the keys' shift to unsigned adds to a row's products.
  static int32_t offset_of(const char* packed, int64_t blocks, int64_t stride) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; b++)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)128), load<__m512i>(packed + b * stride));
    return _mm512_reduce_add_epi32(sum);
  }
};
#else
struct I8 : F32 {
  static constexpr int64_t size = 1;
  static constexpr int64_t kLoaded = 4 * W;
  static constexpr int kSplit = 4;
  static void split(vu column, vu* pieces) {
    for (int i = 0; i < 4; i++) pieces[i] = (vu)__builtin_convertvector((vi)(column << (24 - 8 * i)) >> 24, vf);
  }
  TS_INLINE void pack(const vf* query, char* out) { store_all<4>(query, out); }
};
#endif

template <class Key>
constexpr int64_t kQueryBytes = W * Key::kSplit * 4;  // of a block of a packed query
template <class Key>
constexpr int64_t kKeyBytes = Key::kLoaded * Key::size;  // of a block of a key

template <class Key>
int64_t blocks_of(int64_t dim) {
  return (dim + Key::kLoaded - 1) / Key::kLoaded;
}

// Rows of queries are multiplied in parts of nearly equal size, as many at once as registers allow.
struct Parts {
  int64_t rows, count;
  explicit Parts(int64_t num_rows) : rows(num_rows), count((num_rows + kRowsAtOnce - 1) / kRowsAtOnce) {}
  int64_t begin(int64_t part) const { return rows * part / count; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// What the logits of `rows` queries against the keys of a tile need beside the keys.
struct Logits {
  const char* queries;            // packed: [part][block][row of the part]
  const int32_t* offsets;         // [rows]
  const float *units, *shifts;    // [rows]
  const float* key_scales;        // of the tile, a whole vector, or null
  float* out;                     // [rows, W], stride `ld`
  int64_t ld;
};

// Where a head's keys lie that stand at consecutive positions.
struct KeyRows {
  const char* head;     // the key of row 0
  int64_t stride;       // bytes from a row to the next
  const int64_t* rows;  // of the positions
  bool wide_pages;      // no tile touches more than two

  // The address of tile `i`'s first key if its keys follow each other, else null.
  const char* together(int64_t i) const {
    return wide_pages && rows[i + W - 1] - rows[i] == W - 1 ? head + rows[i] * stride : nullptr;
  }

  // Addresses of a tile's `n` keys, the last one as often as it takes to fill it.
  void each(int64_t i, int64_t n, const char** keys) const {
    for (int64_t k = 0; k < W; k++) keys[k] = head + rows[i + (k < n ? k : n - 1)] * stride;
  }
};

constexpr int64_t kTilesAhead = 8;  // tiles between asking for keys and reading them

// Keys that are asked for while others are multiplied: a piece with every column. At once they would hold up the loads.
struct Ahead {
  const char* at;
  int64_t step, jump;  // bytes from a piece to the next, and from a block's first piece to that of the next block

  // Where rows follow each other without a gap, memory is asked for in its own order, else key by key.
  template <class Key>
  static Ahead of(const char* key, int64_t stride, int64_t blocks) {
    constexpr int64_t piece = kKeyBytes<Key>;
    return stride == blocks * piece ? Ahead{key, piece, W * piece} : Ahead{key, stride, piece};
  }
};

// The columns of a block; `key(k)` is the address of key k there.
template <class Key, class Place>
TS_INLINE void load_columns(Place key, vu* columns) {
#pragma GCC unroll 16
  for (int k = 0; k < W; k++) columns[k] = Key::load_pieces(key(k));
  transpose(columns);
}

// The last dimensions, fewer than a load brings. Apart, so that the loop before it keeps its registers.
template <class Key>
__attribute__((noinline)) void load_last_columns(const char* const* keys, int64_t d, int64_t dim, vu* columns) {
  char whole[W][sizeof(vu)] = {};
  for (int k = 0; k < W; k++) __builtin_memcpy(whole[k], keys[k] + d * Key::size, (dim - d) * Key::size);
  load_columns<Key>([&](int k) { return whole[k]; }, columns);
}

// The sums of `Rows` rows: kept in registers, so every loop over them is unrolled.
template <class Key, int Rows>
struct Sums {
  // Of a row, each of every so many columns: a sum does not wait for the one before. As many for any number of rows,
  // that results do not depend on what is scored at the same time; but integers add up to the same in any order.
  static constexpr int kChains = W < 16 || (__is_same(typename Key::Sum, vi) && Rows == 8) ? 1 : 2;
  typename Key::Sum sums[Rows][kChains];

  TS_INLINE void clear(Sums& s) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; c++) s.sums[r][c] = typename Key::Sum{};
  }

  // Adds the products of a block's columns with its packed queries.
  TS_INLINE void add(Sums& s, const vu* columns, const char* queries, Ahead& ahead) {
#pragma GCC unroll 16
    for (int c = 0; c < W; c++) {
      __builtin_prefetch(ahead.at + c * ahead.step, 0, 3);
      vu pieces[Key::kSplit];
      Key::split(columns[c], pieces);
#pragma GCC unroll 4
      for (int i = 0; i < Key::kSplit; i++)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
          const char* piece = queries + r * kQueryBytes<Key> + (c * Key::kSplit + i) * 4;
          s.sums[r][c % kChains] = Key::add(s.sums[r][c % kChains], pieces[i], piece);
        }
    }
    ahead.at += ahead.jump;
  }

  TS_INLINE void finish(const Sums& s, const Logits& l, int64_t row) {
    const vf scales = l.key_scales ? load<vf>(l.key_scales) : set1(1.0f);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      typename Key::Sum sum = s.sums[r][0];
      for (int c = 1; c < kChains; c++) sum += s.sums[r][c];
      const vf made = Key::finish(sum, l.offsets[row + r]);
      store(l.out + (row + r) * l.ld, made * (scales * l.units[row + r]) + l.shifts[row + r]);
    }
  }
};

// A tile whose keys follow each other, and rows that fit the registers: its columns never leave them.
template <class Key, int Rows>
TS_INLINE void multiply_keys(const char* key, int64_t stride, int64_t blocks, const Logits& l, int64_t row,
                             Ahead ahead) {
  typedef Sums<Key, Rows> S;
  S sums;
  S::clear(sums);
  const char* queries = l.queries + row * blocks * kQueryBytes<Key>;
  for (int64_t b = 0; b < blocks; b++, key += kKeyBytes<Key>, queries += Rows * kQueryBytes<Key>) {
    vu columns[W];
    load_columns<Key>([&](int k) { return key + k * stride; }, columns);
    S::add(sums, columns, queries, ahead);
  }
  S::finish(sums, l, row);
}

// The same with columns that were loaded before, for the rows from `row` on.
template <class Key, int Rows>
TS_INLINE void multiply_columns(const vu* columns, int64_t blocks, const Logits& l, int64_t row, Ahead ahead) {
  typedef Sums<Key, Rows> S;
  S sums;
  S::clear(sums);
  const char* queries = l.queries + row * blocks * kQueryBytes<Key>;
  for (int64_t b = 0; b < blocks; b++, columns += W, queries += Rows * kQueryBytes<Key>)
    S::add(sums, columns, queries, ahead);
  S::finish(sums, l, row);
}

// Calls `body` with a number of rows, 1 to kRowsAtOnce, that it can use at compile time.
template <class Body>
TS_INLINE void with_rows(int64_t rows, Body body) {
  switch (rows) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    case 4: return body.template operator()<4>();
    case 5: return body.template operator()<5>();
    case 6: return body.template operator()<6>();
    case 7: return body.template operator()<(kRowsAtOnce > 6 ? 7 : 6)>();
    default: return body.template operator()<kRowsAtOnce>();
  }
}

template <class Key>
void make_columns(const KeyRows& keys, int64_t i, int64_t n, int64_t dim, vu* columns) {
  const char* each[W];
  keys.each(i, n, each);
  int64_t d = 0;
  for (; d + Key::kLoaded <= dim; d += Key::kLoaded, columns += W)
    load_columns<Key>([&](int k) { return each[k] + d * Key::size; }, columns);
  if (d < dim) load_last_columns<Key>(each, d, dim, columns);
}

// Logits [rows, n] (stride `ld`, written in whole vectors) of packed queries against `n` keys, the first at place
// `begin` of those that `keys` knows; what follows up to `known` is asked for. `columns` is room for a tile; `l` is of
// the first.
template <class Key>
void dot_tiles(const KeyRows& keys, int64_t begin, int64_t n, int64_t known, int64_t rows, int64_t dim, vu* columns,
               Logits l) {
  const int64_t blocks = blocks_of<Key>(dim);
  const Parts parts(rows);
  for (int64_t i = begin; i < begin + n; i += W, l.out += W) {
    const int64_t left = begin + n - i, later = i + kTilesAhead * W;
    const char* next = later + W <= known ? keys.together(later) : nullptr;
    Ahead ahead = next ? Ahead::of<Key>(next, keys.stride, blocks) : Ahead{(const char*)columns, 0, 0};
    const char* first = left >= W && dim % Key::kLoaded == 0 ? keys.together(i) : nullptr;
    if (!first) make_columns<Key>(keys, i, left < W ? left : W, dim, columns);
    for (int64_t p = 0; p < parts.count; p++, ahead = {(const char*)columns, 0, 0})
      with_rows(parts.size(p), [&]<int Rows>() {
        if (first) multiply_keys<Key, Rows>(first, keys.stride, blocks, l, parts.begin(p), ahead);
        else multiply_columns<Key, Rows>(columns, blocks, l, parts.begin(p), ahead);
      });
    if (l.key_scales) l.key_scales += W;
  }
}

}  // namespace
}  // namespace tokenselect::TS_ISA
