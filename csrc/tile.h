// Tiles of W keys, turned on their side: a vector holds the same piece of each key, so a query's products with all of
// them add up in one vector and need no horizontal sums. A tile is made once and serves every query row.
//
// What one load of each key brings are `kLoaded` dimensions, a block: W columns of W * 4 bytes, which meet W * kSplit
// pieces of 4 bytes of each query. Queries are packed block by block, in a block row by row: from one pointer all lie
// at places that the compiler knows, and no instruction goes into finding them.
#pragma once

#include "key_rows.h"
#include "transpose.h"

namespace tokenselect::TS_ISA {
namespace {

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
  static constexpr int kRows = W == 16 ? 8 : 6;  // at once: their sums and a block's columns nearly fit the registers
  static constexpr int kChains = W == 16 ? 2 : 1;  // sums of a row, each of every so many columns
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
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(piece), "m"(*(const int32_t*)query));
    return sum;
  }
  TS_INLINE void pack(const vf* query, char* out) {
    store(out, _mm512_cvtne2ps_pbh((__m512)query[1], (__m512)query[0]));
  }
};
// Of keys that take as long to read as a sum to wait for itself: more rows share their columns.
struct LongBf16 : Bf16 {
  static constexpr int kRows = 14;
  static constexpr int kChains = 1;
};
#else
struct Bf16 : F32 {
  static constexpr int64_t size = 2;
  static constexpr int64_t kLoaded = 2 * W;
  static constexpr int kSplit = 2;
  static void split(vu column, vu* pieces) { pieces[0] = column << 16, pieces[1] = column & 0xffff0000u; }
  TS_INLINE void pack(const vf* query, char* out) { store_all<2>(query, out); }
};
typedef Bf16 LongBf16;
#endif

#if defined(__AVX512VNNI__)
// int8 keys meet int8 queries: products are exact and a sum over 256 dimensions fits.
struct I8 {
  static constexpr int64_t size = 1;
  typedef vi Sum;
  static constexpr int64_t kLoaded = 4 * W;
  static constexpr int kSplit = 1;
  static constexpr int kRows = 14;
  static constexpr int kChains = 2;
  static constexpr float kLargest = 127;
  static vu load_pieces(const char* key) { return load<vu>(key) ^ 0x80808080u; }  // unsigned, as products want them
  static void split(vu column, vu* pieces) { *pieces = column; }
  static vi add(vi sum, vu piece, const void* query) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(piece), "m"(*(const int32_t*)query));
    return sum;
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
  Parts(int64_t num_rows, int64_t at_once) : rows(num_rows), count((num_rows + at_once - 1) / at_once) {}
  int64_t begin(int64_t part) const { return count == 1 ? rows * part : rows * part / count; }
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

  // The same of fewer rows: those from `row` on, whose queries begin a part.
  template <class Key>
  Logits from(int64_t row, int64_t blocks) const {
    return {queries + row * blocks * kQueryBytes<Key>, offsets + row, units + row, shifts + row, key_scales,
            out + row * ld, ld};
  }

  __attribute__((always_inline)) void skip(int64_t tiles) {
    out += tiles * W;
    if (key_scales) key_scales += tiles * W;
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
  // A sum does not wait for the one before. As many for any number of rows, that results do not depend on what is scored
  // at the same time; but integers add up to the same in any order.
  static constexpr int kChains = __is_same(typename Key::Sum, vi) && Rows >= 8 ? 1 : Key::kChains;
  typename Key::Sum sums[Rows][kChains];

  TS_INLINE void clear(Sums& s) {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; c++) s.sums[r][c] = typename Key::Sum{};
  }

  // Adds the products of a block's columns with its packed queries.
  TS_INLINE void add(Sums& s, const vu* columns, const char* queries, Ahead& ahead) {
#pragma GCC unroll 16
    for (int c = 0; c < W; c++) {
      ahead.ask(c % Ahead::kOfFar == 0);
      vu pieces[Key::kSplit];
      Key::split(columns[c], pieces);
#pragma GCC unroll 4
      for (int i = 0; i < Key::kSplit; i++)
#pragma GCC unroll 14
        for (int r = 0; r < Rows; r++) {
          const char* piece = queries + r * kQueryBytes<Key> + (c * Key::kSplit + i) * 4;
          s.sums[r][c % kChains] = Key::add(s.sums[r][c % kChains], pieces[i], piece);
        }
    }
    ahead.skip(ahead.next_block);
  }

  TS_INLINE void finish(const Sums& s, const Logits& l) {
    const vf scales = l.key_scales ? load<vf>(l.key_scales) : set1(1.0f);
    float* out = l.out;
#pragma GCC unroll 14
    for (int r = 0; r < Rows; r++) {
      typename Key::Sum sum = s.sums[r][0];
      for (int c = 1; c < kChains; c++) sum += s.sums[r][c];
      const vf made = Key::finish(sum, l.offsets[r]);
      store(out, made * (scales * l.units[r]) + l.shifts[r]);
      out = hidden(out + l.ld);
    }
  }
};

// Tiles whose keys follow each other, and rows that fit the registers: columns never leave them. A function of its own,
// so that addresses do not leave theirs either.
template <class Key, int Rows>
__attribute__((noinline)) void multiply_keys(const char* key, int64_t stride, int64_t tiles, int64_t blocks, Logits l,
                                             Ahead ahead) {
  typedef Sums<Key, Rows> S;
  constexpr int kApart = 4;  // keys between two addresses that are kept
  const int64_t from_first[kApart] = {0, stride, 2 * stride, hidden(3 * stride)};
  for (; tiles > 0; tiles--, key += W * stride, l.skip(1), ahead.skip(ahead.next_tile)) {
    S sums;
    S::clear(sums);
    const char *queries = l.queries, *firsts[W / kApart];
    for (int i = 0; i < W / kApart; i++) firsts[i] = hidden(key + i * kApart * stride);
    for (int64_t b = 0; b < blocks; b++, queries += Rows * kQueryBytes<Key>) {
      vu columns[W];
      load_columns<Key>([&](int k) { return firsts[k / kApart] + from_first[k % kApart]; }, columns);
      for (int i = 0; i < W / kApart; i++) firsts[i] += kKeyBytes<Key>;
      S::add(sums, columns, queries, ahead);
    }
    S::finish(sums, l);
  }
}

// The same with the columns of one tile, loaded before.
template <class Key, int Rows>
__attribute__((noinline)) void multiply_columns(const vu* columns, int64_t blocks, Logits l, Ahead ahead) {
  typedef Sums<Key, Rows> S;
  S sums;
  S::clear(sums);
  const char* queries = l.queries;
  for (int64_t b = 0; b < blocks; b++, columns += W, queries += Rows * kQueryBytes<Key>)
    S::add(sums, columns, queries, ahead);
  S::finish(sums, l);
}

// Calls `body` with a number of rows, 1 to `Most`, that it can use at compile time.
template <int Most, class Body>
TS_INLINE void with_rows(int64_t rows, Body body) {
  if constexpr (Most > 1)
    if (rows < Most) return with_rows<Most - 1>(rows, body);
  body.template operator()<Most>();
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

// Logits [rows, n] (stride `ld`, written in whole vectors) of packed queries against `n` keys, at most a stretch, from
// place `i` on of those that `keys` knows; what follows is asked for. `columns` is room for a tile; `l` is of the
// first, without scales.
template <class Key>
void dot_stretch(const KeyRows& keys, int64_t i, int64_t n, int64_t rows, int64_t dim, vu* columns, Logits l) {
  const int64_t blocks = blocks_of<Key>(dim), most = keys.page_size < kStretch ? 1 : kStretch / W;
  const Parts parts(rows, Key::kRows);
  float scales[kStretch];
  for (int64_t tiles; n > 0; i += tiles * W, n -= tiles * W, l.skip(tiles)) {
    const char* first = nullptr;
    tiles = n / W < most ? n / W : most;
    if (tiles > 0 && dim % Key::kLoaded == 0) {
      first = keys.together(i, tiles * W);
      if (!first) tiles = 1, first = keys.together(i, W);
    }
    if (!first) tiles = 1, make_columns<Key>(keys, i, n < W ? n : W, dim, columns);
    if (keys.scales) keys.copy_scales(i, n < tiles * W ? n : tiles * W, scales), l.key_scales = scales;
    Ahead ahead(keys, i, tiles * W, blocks, kKeyBytes<Key>, columns);
    for (int64_t p = 0; p < parts.count; p++, ahead = Ahead(columns))
      with_rows<Key::kRows>(parts.size(p), [&]<int Rows>() {
        const Logits part = l.from<Key>(parts.begin(p), blocks);
        if (first) multiply_keys<Key, Rows>(first, keys.stride, tiles, blocks, part, ahead);
        else multiply_columns<Key, Rows>(columns, blocks, part, ahead);
      });
  }
}

}  // namespace
}  // namespace tokenselect::TS_ISA
