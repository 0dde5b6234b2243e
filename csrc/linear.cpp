// Linear layers of a few rows, as in a decode step: the weights are read once, at the speed of memory. Layers of the
// same input, such as those of queries, keys and values, are one stretch of work for the threads.
#include "dot.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 64;                // output features whose sums are made at once
constexpr int64_t kLeastBytes = 32 * 1024;    // of weights, below which a second thread costs more than it brings

// Output features begin .. end - 1 of one layer.
template <class Key>
void make_features(const LinearArgs& a, const LinearPart& part, const typename Key::Query* packed, int64_t begin,
                   int64_t end) {
  float* sums = (float*)scratch(2, a.rows * kChunk * sizeof(float));
  const char* weights[kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = end - at < kChunk ? end - at : kChunk;
    for (int64_t i = 0; i < n; i++) weights[i] = (const char*)part.weight + (at + i) * a.in_features * Key::size;
    dot_all<Key>(weights, n, packed, a.rows, a.in_features, sums, kChunk);
    for (int64_t r = 0; r < a.rows; r++)
      for (int64_t i = 0; i < n; i++) {
        const float bias = part.bias ? load_element(part.bias, at + i, a.dtype) : 0;
        store_element(part.out, r * part.out_features + at + i, a.dtype, sums[r * kChunk + i] + bias);
      }
  }
}

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
  int64_t features = 0;
  for (int64_t p = 0; p < a.num_parts; p++) features += a.parts[p].out_features;
  auto make = [&](int64_t from, int64_t to) {
    for (int64_t p = 0, first = 0; p < a.num_parts; first += a.parts[p++].out_features) {
      const int64_t begin = from > first ? from - first : 0, end = to - first;
      make_features<Key>(a, a.parts[p], packed, begin, end < a.parts[p].out_features ? end : a.parts[p].out_features);
    }
  };
  parallel_for(features, 1 + kLeastBytes / (a.in_features * Key::size), make);
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
