// Products of whole tiles by AMX: 16 keys meet up to 16 rows of queries, 64 bytes of each at once, in 16 cycles.
//
// Keys are taken as they lie in memory; what is turned on its side are the queries, once for all keys of a run, and the
// sums, which are few. Four tiles of keys take turns, as a sum has to wait 52 cycles for itself.
#pragma once

#include "tile.h"
#include "tiles.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int kTilesAtOnce = kStretch / W;  // of keys

#if defined(__AMX_TILE__)

// Kinds of keys as in tile.h, whose products are made of tiles.
struct AmxBf16 : Bf16 {
  static constexpr int kRows = 16;
};

struct AmxI8 : I8 {
  static constexpr int kRows = 16;
  // Keys are signed there, as queries are: nothing was shifted.
  static vf finish(vi sum, int32_t) { return __builtin_convertvector(sum, vf); }
  static int32_t offset_of(const char*, int64_t, int64_t) { return 0; }
};

template <class Key>
constexpr bool kTiled = __is_same(Key, AmxBf16) || __is_same(Key, AmxI8);

#define TS_ADD_PRODUCT(sums, keys, queries)                           \
  if constexpr (Key::size == 1) _tile_dpbssd(sums, keys, queries);    \
  else _tile_dpbf16ps(sums, keys, queries)

// Sums [T * W, W] of the products of `T` tiles of keys and the columns [blocks, W] of a part of the queries.
template <class Key, int T>
TS_INLINE void multiply_tiles(const char* const* keys, int64_t stride, const vu* queries, int64_t blocks, vu* sums) {
  settle();
  _tile_zero(0);
  if constexpr (T > 1) _tile_zero(1);
  if constexpr (T > 2) _tile_zero(2);
  if constexpr (T > 3) _tile_zero(3);
  for (int64_t b = 0; b < blocks; b++, queries += W) {
    const int64_t at = b * sizeof(vu);
    _tile_loadd(4, queries, sizeof(vu));
    _tile_loadd(5, keys[0] + at, stride);
    TS_ADD_PRODUCT(0, 5, 4);
    if constexpr (T > 1) {
      _tile_loadd(6, keys[1] + at, stride);
      TS_ADD_PRODUCT(1, 6, 4);
    }
    if constexpr (T > 2) {
      _tile_loadd(7, keys[2] + at, stride);
      TS_ADD_PRODUCT(2, 7, 4);
    }
    if constexpr (T > 3) {
      _tile_loadd(5, keys[3] + at, stride);
      TS_ADD_PRODUCT(3, 5, 4);
    }
  }
  _tile_stored(0, sums, sizeof(vu));
  if constexpr (T > 1) _tile_stored(1, sums + W, sizeof(vu));
  if constexpr (T > 2) _tile_stored(2, sums + 2 * W, sizeof(vu));
  if constexpr (T > 3) _tile_stored(3, sums + 3 * W, sizeof(vu));
  settle();
}

#undef TS_ADD_PRODUCT

// The sums of a tile become logits of `rows` rows.
template <class Key>
void finish_tile(const vu* sums, int64_t rows, const Logits& l) {
  const vf scales = l.key_scales ? load<vf>(l.key_scales) : set1(1.0f);
  vu turned[W];
  for (int k = 0; k < W; k++) turned[k] = sums[k];
  transpose(turned);
  float* out = l.out;
#pragma GCC unroll 16
  for (int r = 0; r < W; r++) {
    if (r >= rows) break;
    store(out, Key::finish((typename Key::Sum)turned[r], 0) * (scales * l.units[r]) + l.shifts[r]);
    out = hidden(out + l.ld);
  }
}

// Bytes that `dot_tiles` needs: for copies of keys that do not lie as tiles want them, and for sums.
template <class Key>
int64_t stretch_room(int64_t dim) {
  return (kStretch * blocks_of<Key>(dim) + kStretch) * sizeof(vu);
}

// As `dot_stretch`, of queries whose columns are [part][block][W]; `room` as `stretch_room` says.
template <class Key>
void dot_tiles(const KeyRows& keys, int64_t i, int64_t n, int64_t rows, int64_t dim, const vu* columns, vu* room,
               Logits l, FarAhead& ahead) {
  const int64_t blocks = blocks_of<Key>(dim), width = blocks * sizeof(vu), count = (n + W - 1) / W;
  vu* sums = room + kStretch * blocks;
  float scales[kStretch];
  if (keys.scales) keys.copy_scales(i, n, scales), l.key_scales = scales;
  const char* tiles[kTilesAtOnce];
  int64_t stride = keys.stride;
  const char* first = n % W == 0 && dim % Key::kLoaded == 0 ? keys.together(i, n) : nullptr;
  if (first) {
    for (int64_t t = 0; t < count; t++) tiles[t] = first + t * W * stride;
  } else {
    stride = width;
    for (int64_t t = 0; t < count; t++) {
      const char* each[W];
      keys.each(i + t * W, n - t * W < W ? n - t * W : W, each);
      char* copy = (char*)room + t * W * width;
      tiles[t] = copy;
      for (int k = 0; k < W; k++, copy += width) {
        __builtin_memset(copy + width - sizeof(vu), 0, sizeof(vu));
        __builtin_memcpy(copy, each[k], dim * Key::size);
      }
    }
  }
  const Parts parts(rows, W);
  const int64_t portion = (n * ahead.lines + count * parts.count - 1) / (count * parts.count);
  for (int64_t p = 0; p < parts.count; p++, columns += blocks * W) {
    with_rows<kTilesAtOnce>(count, [&]<int T>() { multiply_tiles<Key, T>(tiles, stride, columns, blocks, sums); });
    Logits part = l.from<Key>(parts.begin(p), blocks);
    for (int64_t t = 0; t < count; t++, part.skip(1)) {
      ahead.ask(portion);
      finish_tile<Key>(sums + t * W, parts.size(p), part);
    }
  }
}

// Columns of packed queries, as `dot_tiles` wants them.
template <class Key>
void turn_queries(const char* packed, int64_t rows, int64_t blocks, vu* columns) {
  const Parts parts(rows, W);
  for (int64_t p = 0; p < parts.count; p++)
    for (int64_t b = 0; b < blocks; b++, columns += W) {
      vu own[W] = {};
      for (int64_t r = 0; r < parts.size(p); r++, packed += sizeof(vu)) own[r] = load<vu>(packed);
      transpose(own);
      for (int k = 0; k < W; k++) columns[k] = own[k];
    }
}

#else

// Without tiles: what is taken in their place.
typedef LongBf16 AmxBf16;
typedef I8 AmxI8;
template <class Key>
constexpr bool kTiled = false;
template <class Key>
int64_t stretch_room(int64_t dim) {
  return blocks_of<Key>(dim) * W * sizeof(vu);
}

#endif

}  // namespace
}  // namespace tokenselect::TS_ISA
