// Exact top-k: at least k votes reach the k-th largest maximum of any groups of them. A group is every n-th vote here:
// so large ones that lie side by side are in different groups, and few votes reach that maximum but those that win.
// These are listed, and the threshold is found among them. Ascending output, ties to the lowest index.
#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 1 << 14;  // least votes of a thread
constexpr int64_t kGroupsPerChoice = 2;

// Unsigned integers in the order of the floats.
TS_INLINE uint32_t ordered(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

TS_INLINE vu ordered(vf x) { return (vu)x ^ ((vu)((vi)x >> 31) | 0x80000000u); }

// Whole vectors that hold `n` values.
TS_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// The marked ones of a vector's values, one after the other; returns how many. A whole vector may be written.
TS_INLINE int64_t compress(vu values, uint32_t marked, uint32_t* out) {
#if defined(__AVX512F__)
  store(out, _mm512_maskz_compress_epi32((__mmask16)marked, (__m512i)values));
  return __builtin_popcount(marked);
#else
  int64_t found = 0;
  for (; marked; marked &= marked - 1) out[found++] = values[__builtin_ctz(marked)];
  return found;
#endif
}

TS_INLINE vu larger(vu a, vu b) { return a > b ? a : b; }

// Maxima of the groups to which the votes `first .. first + width - 1` belong and those every `num_groups` further on;
// 0, which all votes reach, where there are none. A width is of whole vectors.
void find_maxima(const float* votes, int64_t n, int64_t first, int64_t width, int64_t num_groups, uint32_t* maxima) {
  __builtin_memset(maxima, 0, width * sizeof(uint32_t));
  for (; first + 3 * num_groups + width <= n; first += 4 * num_groups)
    for (int64_t i = 0; i < width; i += W) {
      const float* at = votes + first + i;
      const vu a = larger(ordered(load<vf>(at)), ordered(load<vf>(at + num_groups)));
      const vu b = larger(ordered(load<vf>(at + 2 * num_groups)), ordered(load<vf>(at + 3 * num_groups)));
      store(maxima + i, larger(load<vu>(maxima + i), larger(a, b)));
    }
  for (; first < n; first += num_groups) {
    const int64_t here = n - first < width ? n - first : width;
    int64_t i = 0;
    for (; i + W <= here; i += W)
      store(maxima + i, larger(load<vu>(maxima + i), ordered(load<vf>(votes + first + i))));
    for (; i < here; i++) {
      const uint32_t value = ordered(votes[first + i]);
      if (value > maxima[i]) maxima[i] = value;
    }
  }
}

// What one thread has of a block: its votes, and those that may be chosen.
struct Part {
  const float* votes;
  int64_t first, n;  // index of its first vote; votes
  uint32_t *values, *indices;
  int64_t num_listed;

  void list(uint32_t floor);
};

void Part::list(uint32_t floor) {
  num_listed = 0;
  vu index{};
  for (int j = 0; j < W; j++) index[j] = (uint32_t)(first + j);
  int64_t i = 0;
  for (; i + W <= n; i += W, index += W) {
    const vu value = ordered(load<vf>(votes + i));
    const uint32_t marked = mask_of((vi)(value >= floor));
    if (!marked) continue;
    compress(index, marked, indices + num_listed);
    num_listed += compress(value, marked, values + num_listed);
  }
  for (; i < n; i++) {
    const uint32_t value = ordered(votes[i]);
    if (value >= floor) indices[num_listed] = (uint32_t)(first + i), values[num_listed++] = value;
  }
  store(values + num_listed, vu{});  // what fills the last vector counts for nothing
}

// Values of whole vectors that reach a floor above 0.
TS_INLINE int64_t reach(const uint32_t* values, int64_t n, uint32_t floor) {
  vi found{};
  for (int64_t i = 0; i < n; i += W) found -= (vi)(load<vu>(values + i) >= floor);
  int64_t sum = 0;
  for (int j = 0; j < W; j++) sum += found[j];
  return sum;
}

// The k-th largest of what `reached(floor)` counts, bit by bit; 0 if there are fewer.
template <class Reached>
TS_INLINE uint32_t kth_largest(int64_t k, Reached reached) {
  uint32_t floor = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (reached(floor | bit) >= k) floor |= bit;
  return floor;
}

// The k largest of what is listed, of equal ones the first.
void write(const Part* parts, int64_t count, int64_t k, int64_t* out) {
  auto reached = [&](uint32_t floor) {
    int64_t sum = 0;
    for (int64_t p = 0; p < count; p++) sum += reach(parts[p].values, parts[p].num_listed, floor);
    return sum;
  };
  const uint32_t threshold = kth_largest(k, reached);
  int64_t ties = k - (threshold == ~0u ? 0 : reached(threshold + 1));
  for (int64_t p = 0; p < count; p++)
    for (int64_t i = 0; i < parts[p].num_listed; i++) {
      const uint32_t value = parts[p].values[i];
      if (value > threshold || (value == threshold && ties-- > 0)) *out++ = parts[p].indices[i];
    }
}

void select_block(const float* votes, int64_t n, int64_t k, int64_t* out, int64_t count) {
  const int64_t wanted = kGroupsPerChoice * k < n ? kGroupsPerChoice * k : n;
  const int64_t width = padded((wanted + count - 1) / count), num_groups = count * width;
  const int64_t most = padded((n + count - 1) / count) + W;
  Part* parts = (Part*)scratch(0, count * sizeof(Part));
  uint32_t* maxima = (uint32_t*)scratch(1, (num_groups + count * 2 * most) * sizeof(uint32_t));
  uint32_t* room = maxima + num_groups;
  for (int64_t p = 0; p < count; p++, room += 2 * most) {
    const int64_t first = p * n / count;
    parts[p] = {votes + first, first, (p + 1) * n / count - first, room, room + most, 0};
  }
  auto find = [&](int64_t a, int64_t b) {
    for (int64_t p = a; p < b; p++) find_maxima(votes, n, p * width, width, num_groups, maxima + p * width);
  };
  parallel_for(count, 1, find);
  const uint32_t floor = kth_largest(k, [&](uint32_t at) { return reach(maxima, num_groups, at); });
  auto list = [&](int64_t a, int64_t b) {
    for (int64_t p = a; p < b; p++) parts[p].list(floor);
  };
  parallel_for(count, 1, list);
  write(parts, count, k, out);
}

}  // namespace

void topk_tokens(const TopkArgs& args) {
  auto blocks = [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t first = args.start_loc[i], n = args.start_loc[i + 1] - first;
      // Several blocks go to the threads whole; one block is cut up for them.
      const int64_t most = args.num_blocks == 1 ? num_threads() : 1, wanted = n / kChunk;
      const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
      select_block(args.votes + first, n, args.k, args.indices + i * args.k, parts);
    }
  };
  if (args.num_blocks == 1) blocks(0, 1);
  else parallel_for(args.num_blocks, 1, blocks);
}

}  // namespace tokenselect::TS_ISA
