// The tiles of AMX, all of 16 rows of 64 bytes. _tile_dpbf16ps(0, 1, 2) adds to tile 0 the products of tile 1, 16 rows
// of 32 bf16, and of tile 2, whose rows hold two for each of 16 columns.
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

// This thread's tiles, until it ends, where they are `Used`; others want theirs cut otherwise.
template <bool Used>
struct Tiles {};

#if defined(__AMX_TILE__)
constexpr bool kHasTiles = true;

template <>
struct Tiles<true> {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = sizeof(vu), shape.rows[i] = W;
    asm volatile("" : : "r"(&shape) : "memory");  // all of it is read, not just what GCC's header says
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// The compiler does not know what tiles read and write.
TS_INLINE void settle() { asm volatile("" ::: "memory"); }
#else
constexpr bool kHasTiles = false;
#endif

}  // namespace
}  // namespace tokenselect::TS_ISA
