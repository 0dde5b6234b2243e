// The portable kernels against naive loops, without PyTorch: for processors that can only be emulated here
// (`make test-aarch64`). Everywhere else tests/ops compares them with the definition.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/dispatch.h"

namespace tokenselect {
void parallel_ranges(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }
int64_t num_threads() { return 2; }
}  // namespace tokenselect

using namespace tokenselect;

namespace {

constexpr int64_t kHeads = 6, kKvHeads = 2, kGroup = kHeads / kKvHeads, kDim = 64, kHalf = 24;

std::mt19937 engine(0);

std::vector<float> random_floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& x : values) x = normal(engine);
  return values;
}

// The vector of one row, its first 2 * kHalf dimensions rotated.
std::vector<double> rotated(const float* x, const float* cos, const float* sin) {
  std::vector<double> out(x, x + kDim);
  for (int64_t i = 0; i < kHalf; i++) {
    out[i] = (double)x[i] * cos[i] - (double)x[kHalf + i] * sin[i];
    out[kHalf + i] = (double)x[kHalf + i] * cos[i] + (double)x[i] * sin[i];
  }
  return out;
}

double dot(const double* a, const double* b) { return std::inner_product(a, a + kDim, b, 0.0); }

bool report(const char* name, double error, double most) {
  std::printf("%-24s largest error %.2e (at most %.0e)\n", name, error, most);
  return error <= most;
}

bool check_topk(int64_t n, int64_t k) {
  std::vector<float> votes(n);
  for (float& x : votes) x = (float)(engine() % 1000);  // many ties
  std::vector<int64_t> order(n), indices(k), start_loc{0, n};
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return votes[a] > votes[b]; });
  std::sort(order.begin(), order.begin() + k);
  kernels(0).topk_tokens({votes.data(), start_loc.data(), 1, k, indices.data()});
  return report("topk_tokens", !std::equal(indices.begin(), indices.end(), order.begin()), 0);
}

bool check_votes(int64_t length) {
  const auto queries = random_floats(kHeads * kDim), keys = random_floats(length * kKvHeads * kDim);
  const auto cos = random_floats(kHalf), sin = random_floats(kHalf);
  std::vector<int64_t> zero{0}, span{0, length}, runs{0, 1};
  std::vector<float> votes(length);
  ScoreArgs a{};
  a.queries = queries.data(), a.num_blocks = 1, a.num_q_heads = kHeads, a.num_kv_heads = kKvHeads, a.head_dim = kDim;
  a.keys = {keys.data(), length, kKvHeads * kDim, kDim, DType::f32};
  a.pages = {zero.data(), 1, length, zero.data()};
  a.sequences = zero.data(), a.candidates = a.context = a.start_loc = span.data();
  a.views[0] = {cos.data(), sin.data(), 1, runs.data()};
  a.num_views = 1, a.half = kHalf, a.scale = 0.1f, a.votes = votes.data();
  kernels(kDim).score_tokens(a);
  std::vector<double> expected(length);
  for (int64_t h = 0; h < kHeads; h++) {
    const auto query = rotated(queries.data() + h * kDim, cos.data(), sin.data());
    std::vector<double> weights(length);
    for (int64_t t = 0; t < length; t++) {
      const float* key = keys.data() + (t * kKvHeads + h / kGroup) * kDim;
      weights[t] = std::exp(0.1 * dot(query.data(), std::vector<double>(key, key + kDim).data()));
    }
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (int64_t t = 0; t < length; t++) expected[t] += weights[t] / sum / kHeads;
  }
  double error = 0;
  for (int64_t t = 0; t < length; t++) error = std::max(error, std::abs(votes[t] - expected[t]) / expected[t]);
  return report("score_tokens", error, 1e-4);
}

bool check_attention(int64_t own, int64_t length) {
  const auto queries = random_floats(own * kHeads * kDim), keys = random_floats(length * kKvHeads * kDim);
  const auto values = random_floats(length * kKvHeads * kDim);
  const auto cos = random_floats(length * kHalf), sin = random_floats(length * kHalf);
  std::vector<int64_t> slots(length), bounds{0, own}, slot_bounds{0, length};
  for (int64_t i = 0; i < length; i++) slots[i] = length - 1 - i;
  std::vector<float> out(own * kHeads * kDim);
  AttentionArgs a{};
  a.queries = queries.data(), a.out = out.data(), a.dtype = DType::f32;
  a.num_blocks = 1, a.num_q_heads = kHeads, a.num_kv_heads = kKvHeads, a.head_dim = kDim;
  a.keys = {keys.data(), length, kKvHeads * kDim, kDim, DType::f32};
  a.values = {values.data(), length, kKvHeads * kDim, kDim, DType::f32};
  a.query_start_loc = bounds.data(), a.slots = slots.data(), a.slot_start_loc = slot_bounds.data();
  a.cos = cos.data(), a.sin = sin.data(), a.half = kHalf, a.scale = 0.1f;
  kernels(kDim).sparse_attention(a);
  double error = 0;
  for (int64_t i = 0; i < own; i++)
    for (int64_t h = 0; h < kHeads; h++) {
      const int64_t seen = length - own + i + 1, at = (seen - 1) * kHalf;
      const auto query = rotated(queries.data() + (i * kHeads + h) * kDim, cos.data() + at, sin.data() + at);
      std::vector<double> sums(kDim);
      double total = 0;
      for (int64_t t = 0; t < seen; t++) {
        const int64_t row = (slots[t] * kKvHeads + h / kGroup) * kDim;
        const auto key = rotated(keys.data() + row, cos.data() + t * kHalf, sin.data() + t * kHalf);
        const double weight = std::exp(0.1 * dot(query.data(), key.data()));
        total += weight;
        for (int64_t d = 0; d < kDim; d++) sums[d] += weight * values[row + d];
      }
      for (int64_t d = 0; d < kDim; d++)
        error = std::max(error, std::abs(out[(i * kHeads + h) * kDim + d] - sums[d] / total));
    }
  return report(own > 1 ? "sparse_attention, block" : "sparse_attention, step", error, 1e-4);
}

}  // namespace

int main() {
  std::printf("kernels: %s\n", kernels(kDim).name);
  const bool all = check_topk(70001, 2048) & check_votes(1300) & check_attention(1, 700) & check_attention(65, 300);
  std::puts(all ? "4 passed, 0 failed" : "failed");
  return !all;
}
