// Tiles of W keys, turned on their side: a vector holds the same piece of each key, so a query's products with all of
// them add up in one vector and need no horizontal sums. A tile is made once and serves every query row.
#pragma once

#include "transpose.h"

namespace tokenselect::TS_ISA {
namespace {

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
  static constexpr float kLargest = 0;  // number that a packed query holds; 0: any
  static void pack(const float* query, int64_t dim, void* row) { __builtin_memcpy(row, query, dim * sizeof(float)); }
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
  static constexpr float kLargest = 0;
  static void pack(const float* query, int64_t dim, void* row) {
    for (int64_t i = 0; i < dim; i += 2 * W)
      store((uint16_t*)row + i, _mm512_cvtne2ps_pbh(load<__m512>(query + i + W), load<__m512>(query + i)));
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
// int8 keys meet int8 queries: products are exact and a sum over 256 dimensions fits.
struct I8 {
  static constexpr int64_t size = 1;
  static constexpr int64_t per_piece = 4;
  typedef vi Sum;
  struct Query {
    const int32_t* pieces;
    int32_t offset;  // what the keys' shift to unsigned adds
    explicit Query(const void* row, int64_t dim) : pieces((const int32_t*)row), offset(pieces[dim / 4]) {}
    vi add(vi sum, vu piece, int64_t i) const {
      return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)piece, _mm512_set1_epi32(pieces[i]));
    }
    vf finish(vi sum) const { return __builtin_convertvector(sum - offset, vf); }
  };
  static int64_t query_bytes(int64_t dim) { return dim + sizeof(int32_t); }
  static constexpr float kLargest = 127;
  static void pack(const float* query, int64_t dim, void* row) {
    int8_t* out = (int8_t*)row;
    vi sum{};
    auto rounded = [&](int64_t i) {
      const __m512i x = _mm512_cvtps_epi32(load<__m512>(query + i));
      sum += (vi)x;
      return x;
    };
    int64_t i = 0;
    for (; i + 4 * W <= dim; i += 4 * W) {  // each 128-bit lane holds pieces of four vectors, which are put in order
      const __m512i a = rounded(i), b = rounded(i + W), c = rounded(i + 2 * W), d = rounded(i + 3 * W);
      const __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      store(out + i, _mm512_permutexvar_epi32(order, mixed));
    }
    for (; i < dim; i += W) store(out + i, _mm512_cvtsepi32_epi8(rounded(i)));
    store(out + dim, 128 * _mm512_reduce_add_epi32((__m512i)sum));
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

// Columns of a tile: vectors.
template <class Key>
int64_t num_columns(int64_t dim) {
  return (dim + Key::kLoaded - 1) / Key::kLoaded * W;
}

// Where the keys of a head lie that stand at the positions of one sequence.
struct KeyRows {
  const Pages& pages;
  int64_t sequence;
  const char* head;  // the key of row 0
  int64_t stride;    // bytes from a row to the next

  // The address of the key at position `from` if the `n` keys from there on follow each other in one page; else null.
  const char* together(int64_t from, int64_t n) const {
    const int64_t t = from + pages.padding[sequence], page = pages.max_pages == 1 ? 0 : t / pages.page_size;
    const int64_t place = t - page * pages.page_size;
    if (pages.max_pages > 1 && place + n > pages.page_size) return nullptr;
    return head + (pages.pages[sequence * pages.max_pages + page] * pages.page_size + place) * stride;
  }

  // Addresses of a tile's `n` keys, the last one as often as it takes to fill it.
  void each(int64_t from, int64_t n, const char** keys) const {
    int64_t rows[W];
    rows_of(pages, sequence, from, from + n, rows);
    for (int64_t k = 0; k < W; k++) keys[k] = head + rows[k < n ? k : n - 1] * stride;
  }
};

constexpr int64_t kTilesAhead = 8;
constexpr int kRowsAtOnce = W == 8 ? 6 : 8;  // sums that fit the registers

// The columns of a tile's dimensions from `d` on, as many as a load brings; `key(k)` is the address of key k.
template <class Key, class Place>
TS_INLINE void load_columns(Place key, int64_t d, vu* columns) {
  for (int k = 0; k < W; k++) columns[k] = Key::load_pieces(key(k) + d * Key::size);
  transpose(columns);
}

// The last dimensions, fewer than a load brings. Apart, so that the loop before it keeps its registers.
template <class Key>
__attribute__((noinline)) void load_last_columns(const char* const* keys, int64_t d, int64_t dim, vu* columns) {
  char whole[W][sizeof(vu)] = {};
  for (int k = 0; k < W; k++) __builtin_memcpy(whole[k], keys[k] + d * Key::size, (dim - d) * Key::size);
  load_columns<Key>([&](int k) { return whole[k]; }, 0, columns);
}

// Sums of products of columns with packed queries, from their piece `i` on.
template <class Key, int Rows>
TS_INLINE void add_columns(const vu* columns, int count, const char* queries, int64_t dim, int64_t i,
                           typename Key::Sum* sums) {
  // Unrolled, so that columns and sums stay in registers.
#pragma GCC unroll 16
  for (int c = 0; c < count; c++) {
    vu pieces[Key::kSplit];
    Key::split(columns[c], pieces);
#pragma GCC unroll 4
    for (int s = 0; s < Key::kSplit; s++)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; r++) {
        const typename Key::Query query(queries + r * Key::query_bytes(dim), dim);
        sums[r] = query.add(sums[r], pieces[s], i + c * Key::kSplit + s);
      }
  }
}

// What the logits of `rows` queries against the keys of a tile need beside the keys.
struct Logits {
  const char* queries;  // packed
  const float *units, *shifts;  // [rows]
  const float* key_scales;      // of the tile, a whole vector, or null
  float* out;                   // [rows, W], stride `ld`
  int64_t ld;
};

template <class Key, int Rows>
TS_INLINE void finish_rows(const typename Key::Sum* sums, int64_t dim, const Logits& l, int64_t row) {
  const vf scales = l.key_scales ? load<vf>(l.key_scales) : set1(1.0f);
  for (int r = 0; r < Rows; r++) {
    const vf made = typename Key::Query(l.queries + (row + r) * Key::query_bytes(dim), dim).finish(sums[r]);
    store(l.out + (row + r) * l.ld, made * (scales * l.units[row + r]) + l.shifts[row + r]);
  }
}

// One tile and few rows: its columns never leave the registers.
template <class Key, int Rows, class Place>
TS_INLINE void multiply_keys(Place key, int64_t dim, const Logits& l) {
  typename Key::Sum sums[Rows] = {};
  for (int64_t d = 0; d < dim; d += Key::kLoaded) {
    vu columns[W];
    load_columns<Key>(key, d, columns);
    add_columns<Key, Rows>(columns, W, l.queries, dim, d / Key::per_piece, sums);
  }
  finish_rows<Key, Rows>(sums, dim, l, 0);
}

// The same with columns that were loaded before.
template <class Key, int Rows>
TS_INLINE void multiply_columns(const vu* columns, int64_t dim, const Logits& l, int64_t row) {
  typename Key::Sum sums[Rows] = {};
  const int count = Key::kLoaded / W;
  for (int64_t d = 0; d < dim; d += count, columns++)
    add_columns<Key, Rows>(columns, 1, l.queries + row * Key::query_bytes(dim), dim, d / Key::per_piece, sums);
  finish_rows<Key, Rows>(sums, dim, l, row);
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
void multiply_tile(const KeyRows& keys, int64_t from, int64_t n, int64_t rows, int64_t dim, vu* columns,
                   const Logits& l) {
  const char* first = n == W && dim % Key::kLoaded == 0 ? keys.together(from, W) : nullptr;
  auto place = [&](int k) { return first + k * keys.stride; };
  if (first && rows <= kRowsAtOnce)
    return with_rows(rows, [&]<int Rows>() { multiply_keys<Key, Rows>(place, dim, l); });
  const char* each[W];
  int64_t d = 0;
  vu* column = columns;
  if (!first) keys.each(from, n, each);
  for (; d + Key::kLoaded <= dim; d += Key::kLoaded, column += W) {
    if (first) load_columns<Key>(place, d, column);
    else load_columns<Key>([&](int k) { return each[k]; }, d, column);
  }
  if (d < dim) load_last_columns<Key>(each, d, dim, column);
  const int64_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t p = 0, row = 0; p < parts; p++) {
    const int64_t some = (rows - row + parts - p - 1) / (parts - p);
    with_rows(some, [&]<int Rows>() { multiply_columns<Key, Rows>(columns, dim, l, row); });
    row += some;
  }
}

// While a tile is computed, later ones come from memory into the second cache: requests to the first, of which few can
// be under way at once, would hold up the loads.
template <class Key>
TS_INLINE void fetch_ahead(const KeyRows& keys, int64_t from, int64_t end, int64_t dim) {
  const char* first = from + W <= end ? keys.together(from, W) : nullptr;
  for (int k = 0; first && k < W; k++, first += keys.stride)
    for (int64_t at = 0; at < dim * Key::size; at += 64) __builtin_prefetch(first + at, 0, 2);
}

// Logits [rows, n] (stride `ld`, written in whole vectors) of packed queries against the `n` keys from position `from`
// on; those up to `end` will be asked for next. `columns` is room for a tile; `l` is of the first.
template <class Key>
void dot_tiles(const KeyRows& keys, int64_t from, int64_t n, int64_t end, int64_t rows, int64_t dim, vu* columns,
               Logits l) {
  for (int64_t i = 0; i < n; i += W, l.out += W) {
    fetch_ahead<Key>(keys, from + i + kTilesAhead * W, end, dim);
    multiply_tile<Key>(keys, from + i, n - i < W ? n - i : W, rows, dim, columns, l);
    if (l.key_scales) l.key_scales += W;
  }
}

}  // namespace
}  // namespace tokenselect::TS_ISA
