// Where keys lie, and asking memory for those that come later.
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kStretch = 64;  // keys that are looked up at once, if they follow each other

// The same, of which the compiler does not know how it was made: it keeps that, not what it would be made of.
template <class T>
TS_INLINE T hidden(T x) {
  asm("" : "+r"(x));
  return x;
}

// The keys of a head that stand at consecutive positions, one of `heads` that are read together and follow each other.
struct KeyRows {
  int64_t head, heads;
  const char* key;       // of row 0
  int64_t stride;        // bytes from a row to the next
  const int64_t* rows;   // of the positions
  int64_t known;         // positions whose rows are known
  int64_t page_size;     // a page's rows follow each other
  const float* scales;   // of row 0, or null
  int64_t scale_stride;  // elements
  int64_t near, far;     // keys between asking for some and reading them: see `Ahead`

  bool follow(int64_t i, int64_t n) const { return n <= page_size && rows[i + n - 1] - rows[i] == n - 1; }

  // The address of key `i` if `n` keys from there on follow each other, else null.
  const char* together(int64_t i, int64_t n) const {
    return i + n <= known && follow(i, n) ? key + rows[i] * stride : nullptr;
  }

  // Addresses of a tile's `n` keys, the last one as often as it takes to fill it.
  void each(int64_t i, int64_t n, const char** keys) const {
    for (int64_t k = 0; k < W; k++) keys[k] = key + rows[i + (k < n ? k : n - 1)] * stride;
  }

  // Scales of `n` keys, one after the other.
  void copy_scales(int64_t i, int64_t n, float* out) const {
    if (scale_stride == 1 && follow(i, n)) __builtin_memcpy(out, scales + rows[i], n * sizeof(float));
    else
      for (int64_t k = 0; k < n; k++) out[k] = scales[rows[i + k] * scale_stride];
  }
};

// Keys that are asked for while others are multiplied: a piece with every column; at once they would hold up the loads.
// A core has some twenty reads under way. More come if a few pieces of what follows much later are asked for, too: the
// second cache then guesses the rest.
struct Ahead {
  static constexpr int64_t kNear = 12 << 10, kFar = 32 << 10;  // bytes of keys between asking and reading
  static constexpr int64_t kMost = 8;                          // stretches that this is at most
  static constexpr int kOfFar = 4;                             // one of so many pieces is asked for from afar

  const char *near, *far;
  int64_t step, next_block, next_tile;  // bytes from a piece to the next; from a tile's last piece of a block, of all

  // Nothing, over and over.
  explicit Ahead(const void* nothing)
      : near((const char*)nothing), far(near), step(0), next_block(0), next_tile(0) {}

  // Keys of `bytes` bytes between asking and reading: whole stretches.
  static int64_t distance(int64_t ahead, int64_t bytes) {
    const int64_t stretches = (ahead + kStretch / 2 * bytes) / (kStretch * bytes);
    return kStretch * (stretches < 1 ? 1 : stretches < kMost ? stretches : kMost);
  }

  // What lies ahead of the stretch at key `i`: `n` keys of `blocks` pieces of `piece` bytes, and their scales.
  Ahead(const KeyRows& keys, int64_t i, int64_t n, int64_t blocks, int64_t piece, const void* nothing)
      : Ahead(nothing) {
    const char *soon = keys.together(i + keys.near, n), *late = keys.together(i + keys.far, n);
    if (!soon) return;
    near = soon, far = late ? late : soon;
    if (keys.stride == keys.heads * blocks * piece) {
      // Nothing lies between what is read: memory is asked for in its own order, by each head a part.
      const int64_t part = keys.head * (n - 1) * blocks * piece;
      step = piece, next_block = next_tile = 0, near += part, far += part;
    } else {
      step = keys.stride, next_block = piece - W * step;
      next_tile = W * keys.stride - blocks * (W * step + next_block);
    }
    if (!keys.scales || keys.head > 0) return;
    const char* scales = (const char*)(keys.scales + keys.rows[i + keys.near] * keys.scale_stride);
    for (int64_t at = 0; at < n * keys.scale_stride * 4; at += 64) __builtin_prefetch(scales + at, 0, 3);
  }

  // The next piece, and perhaps one from afar.
  __attribute__((always_inline)) void ask(bool from_afar) {
    __builtin_prefetch(near, 0, 3);
    near = hidden(near + step);
    if (!from_afar) return;
    __builtin_prefetch(far, 0, 3);
    far = hidden(far + kOfFar * step);
  }

  __attribute__((always_inline)) void skip(int64_t bytes) { near += bytes, far += bytes; }
};

// Keys that are asked for in portions while others are multiplied, into the second cache, from much further ahead: where
// multiplying takes no time to speak of, there is none to wait for what was asked for just before.
struct FarAhead {
  static constexpr int64_t kBytes = 256 << 10;  // of all heads between asking and reading

  const char* key = nullptr;
  const int64_t* rows = nullptr;  // of what was not asked for yet
  int64_t stride = 0, lines = 0, line = 0, left = 0;

  FarAhead() = default;
  // As many keys as a chunk has, `size`; of `bytes` bytes each. `keys` knows those of two chunks.
  FarAhead(const KeyRows& keys, int64_t size, int64_t bytes)
      : key(keys.key), stride(keys.stride), lines((bytes + 63) / 64) {
    const int64_t most = kBytes / (keys.heads * bytes) / kStretch * kStretch;
    const int64_t ahead = most < kStretch ? kStretch : most < size ? most : size;
    const int64_t known = keys.known < ahead + size ? keys.known - ahead : size;
    rows = keys.rows + ahead, left = known > 0 ? known * lines : 0;
  }

  void ask(int64_t portion) {
    if (portion > left) portion = left;
    left -= portion;
    for (; portion > 0; portion--) {
      __builtin_prefetch(key + *rows * stride + line * 64, 0, 2);
      if (++line == lines) line = 0, rows++;
    }
  }
};

}  // namespace
}  // namespace tokenselect::TS_ISA
