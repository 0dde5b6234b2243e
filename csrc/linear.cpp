// A linear layer of a few rows, as in a decode step: the weights are read once, at the speed of memory.
#include "dot.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 64;                // output features whose sums are made at once
constexpr int64_t kLeastBytes = 32 * 1024;    // of weights, below which a second thread costs more than it brings

template <class Key>
void multiply(const LinearArgs& a) {
  const int64_t size = a.rows * a.in_features;
  auto* packed = (typename Key::Query*)scratch(0, size * sizeof(float));
  float* row = (float*)scratch(1, a.in_features * sizeof(float));
  for (int64_t r = 0; r < a.rows; r++) {
    for (int64_t d = 0; d < a.in_features; d += W)
      store(row + d, load_as_float(a.input, r * a.in_features + d, a.dtype));
    pack<Key>(row, a.in_features, packed + r * a.in_features);
  }
  auto features = [&](int64_t from, int64_t to) {
    float* sums = (float*)scratch(2, a.rows * kChunk * sizeof(float));
    const char* weights[kChunk];
    for (int64_t at = from; at < to; at += kChunk) {
      const int64_t n = to - at < kChunk ? to - at : kChunk;
      for (int64_t i = 0; i < n; i++) weights[i] = (const char*)a.weight + (at + i) * a.in_features * Key::size;
      dot_all<Key>(weights, n, packed, a.rows, a.in_features, sums, kChunk);
      for (int64_t r = 0; r < a.rows; r++)
        for (int64_t i = 0; i < n; i++) {
          const float bias = a.bias ? load_element(a.bias, at + i, a.dtype) : 0;
          store_element(a.out, r * a.out_features + at + i, a.dtype, sums[r * kChunk + i] + bias);
        }
    }
  };
  parallel_for(a.out_features, 1 + kLeastBytes / (a.in_features * Key::size), features);
}

}  // namespace

void linear(const LinearArgs& a) {
  switch (a.dtype) {
    case DType::bf16: return multiply<Bf16>(a);
    case DType::f16: return multiply<F16>(a);
    default: return multiply<F32>(a);
  }
}

}  // namespace tokenselect::TS_ISA
