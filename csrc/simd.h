// Vectors of the instruction set that this file is compiled for: arithmetic in GNU vector syntax, the rest by hand.
#pragma once

#include <cstring>

#include "kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define TS_INLINE static inline __attribute__((always_inline))

// TS_ISA names the namespace: portable, avx2, avx512, avx512_bf16, amx.
namespace tokenselect::TS_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

template <class T>
TS_INLINE T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
TS_INLINE void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof v);
}

TS_INLINE vf set1(float x) { return x - vf{}; }
#if defined(__AVX512F__)
TS_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
TS_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
TS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
#endif

TS_INLINE float sum_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}

TS_INLINE float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Bit i is set if element i of a comparison is true.
TS_INLINE uint32_t mask_of(vi v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)v);
#else
  uint32_t mask = 0;
  for (int i = 0; i < W; i++) mask |= (uint32_t)(v[i] != 0) << i;
  return mask;
#endif
}

// e^x / 2^power, at most 2^127; 0 from about e^-87 down. Relative error about 2e-7 (Cephes' polynomial). `power` is an
// even number, so that the same x is rounded alike under any: results differ by a power of two exactly.
TS_INLINE vf vexp(vf x, float power = 0) {
  const vf low = set1(power * 0.693147181f - 87.0f);
  const vi alive = x >= low;
  x = vmax(x, low);
  const float whole = 12582912.0f - power;  // 1.5 * 2^23: rounds to an integer in the low bits
  vf n = x * 1.44269504088896341f + whole;
  const vu bits = (vu)n << 23;  // unsigned: lanes past a row's end hold anything, and their sums may wrap
  n -= whole;
  const vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)(((vu)p + bits) & (vu)alive);
}

// 2^x / 2^power, `power` as above, up to 2^127; what is below 2^-126 may count as that. Relative error about 7e-6, below
// half precision's.
TS_INLINE vf vexp2(vf x, float power) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  x = vmax(x, set1(power - 126.0f));
  const float whole = 12582912.0f - power;  // 1.5 * 2^23: rounds to an integer in the low bits
  const vf bits = x + whole, n = bits - whole;
#endif
  const vf r = x - n;
  vf p = set1(9.6708764e-3f);
  p = p * r + 5.5901898e-2f;
  p = p * r + 2.4022107e-1f;
  p = p * r + 6.9312934e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(n - power));
#else
  return (vf)((vu)p + ((vu)bits << 23));  // unsigned: lanes past a row's end hold anything, and their sums may wrap
#endif
}

TS_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  return load<float>(&bits);
}

// Rounds to nearest, ties to even; NaN stays NaN.
TS_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)
TS_INLINE vf load_half(const uint16_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
TS_INLINE void store_half(uint16_t* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
TS_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
TS_INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
TS_INLINE vf load_half(const uint16_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
TS_INLINE void store_half(uint16_t* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
TS_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
TS_INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
TS_INLINE float half_to_float(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 0) {
    const float tiny = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -tiny : tiny;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  return load<float>(&bits);
}
TS_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = load<uint32_t>(&x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000u) {                                   // subnormal: the addition rounds
    const float shifted = load<float>(&size) + 0.5f;
    return (uint16_t)(sign | (load<uint32_t>(&shifted) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13));
}
TS_INLINE vf load_half(const uint16_t* p) {
  vf v;
  for (int i = 0; i < W; i++) v[i] = half_to_float(p[i]);
  return v;
}
TS_INLINE void store_half(uint16_t* p, vf v) {
  for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]);
}
#endif

// W elements to floats and back.
TS_INLINE vf load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
  return (vf)(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = bf16_to_float(p[i]);
  return v;
#endif
}

TS_INLINE void store_bf16(uint16_t* p, vf v) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < W; i++) p[i] = float_to_bf16(v[i]);
#endif
}

TS_INLINE vf load_as_float(const void* data, int64_t element, DType dtype) {
  if (dtype == DType::f32) return load<vf>((const float*)data + element);
  if (dtype == DType::bf16) return load_bf16((const uint16_t*)data + element);
  return load_half((const uint16_t*)data + element);
}

TS_INLINE void store_from_float(void* data, int64_t element, DType dtype, vf v) {
  if (dtype == DType::f32) return store((float*)data + element, v);
  if (dtype == DType::bf16) return store_bf16((uint16_t*)data + element, v);
  store_half((uint16_t*)data + element, v);
}

TS_INLINE float load_element(const void* data, int64_t element, DType dtype) {
  if (dtype == DType::f32) return ((const float*)data)[element];
  if (dtype == DType::bf16) return bf16_to_float(((const uint16_t*)data)[element]);
  return half_to_float(((const uint16_t*)data)[element]);
}

TS_INLINE void store_element(void* data, int64_t element, DType dtype, float x) {
  if (dtype == DType::f32) ((float*)data)[element] = x;
  else if (dtype == DType::bf16) ((uint16_t*)data)[element] = float_to_bf16(x);
  else ((uint16_t*)data)[element] = float_to_half(x);
}

// The sums of W vectors: element i of the result is the sum of a[i]'s elements.
#if defined(__AVX512F__)
TS_INLINE vf sums_of(const vf* a) {
  __m512 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++) {
    const __m512 x = (__m512)a[i], y = (__m512)a[i + 8];
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  for (int i = 0; i < 4; i++)  // 128-bit lanes now belong to i, i + 4, i + 8, i + 12
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
  for (int i = 0; i < 2; i++)
    d[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[i], c[i + 2]), _mm512_unpackhi_ps(c[i], c[i + 2]));
  const __m512 e = _mm512_add_ps(_mm512_unpacklo_ps(d[0], d[1]), _mm512_unpackhi_ps(d[0], d[1]));
  // A lane now holds the sums of i, i + 1, i + 2, i + 3; the lanes are those of i = 0, 8, 4, 12.
  return (vf)_mm512_shuffle_f32x4(e, e, 0xd8);
}
#elif defined(__AVX2__)
TS_INLINE vf sums_of(const vf* a) {
  __m256 b[4], c[2];
  for (int i = 0; i < 4; i++) {  // a lane: two halves of a[2 i], two of a[2 i + 1]
    const __m256 x = (__m256)a[2 * i], y = (__m256)a[2 * i + 1];
    b[i] = _mm256_add_ps(_mm256_blend_ps(x, y, 0xcc), _mm256_shuffle_ps(x, y, 0x4e));
  }
  for (int i = 0; i < 2; i++)
    c[i] = _mm256_add_ps(_mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0x88),
                         _mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0xdd));
  return (vf)_mm256_add_ps(_mm256_blend_ps(c[0], c[1], 0xf0), _mm256_permute2f128_ps(c[0], c[1], 0x21));
}
#else
TS_INLINE vf sums_of(const vf* a) {
  vf s;
  for (int i = 0; i < W; i++) s[i] = sum_of(a[i]);
  return s;
}
#endif

// Rotates the pairs of a vector of floats, in place too: dimensions (i, i + half), or (2 i, 2 i + 1) if interleaved.
TS_INLINE void rotate_row(const float* x, float* out, const float* cos, const float* sin, int64_t half,
                          bool interleaved) {
  int64_t i = 0;
  if (interleaved) {
    for (; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  } else {
    for (; i + W <= half; i += W) {
      const vf a = load<vf>(x + i), b = load<vf>(x + half + i), c = load<vf>(cos + i), s = load<vf>(sin + i);
      store(out + i, a * c - b * s);
      store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
      const float a = x[i], b = x[half + i];
      out[i] = a * cos[i] - b * sin[i];
      out[half + i] = b * cos[i] + a * sin[i];
    }
  }
}

// Runs `body(begin, end)` over ranges of 0 .. n - 1 on PyTorch's threads.
template <class Body>
TS_INLINE void parallel_for(int64_t n, int64_t grain, Body& body) {
  parallel_ranges(n, grain, [](int64_t begin, int64_t end, void* self) { (*(Body*)self)(begin, end); }, &body);
}

}  // namespace tokenselect::TS_ISA
