// W vectors as a square of 32-bit elements, turned on its side.
#pragma once

#include "simd.h"

namespace tokenselect::TS_ISA {

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

}  // namespace tokenselect::TS_ISA
