// Exact top-k: a histogram of the votes' leading bits finds the bin of the k-th, its members are sorted out, the rest
// is decided by comparison. Two reads of the votes, ascending output, ties to the lowest index.
#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int kBins = 4096;  // sign, exponent and 3 bits of mantissa
constexpr int kShift = 20;
constexpr int64_t kChunk = 1 << 15;

// Unsigned integers in the order of the floats.
TS_INLINE uint32_t ordered(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

TS_INLINE vu ordered(vf x) { return (vu)x ^ ((vu)((vi)x >> 31) | 0x80000000u); }

void count(const float* votes, int64_t n, uint32_t* bins) {
  uint32_t* part = (uint32_t*)scratch(0, 4 * kBins * sizeof(uint32_t));  // four, so that equal neighbours do not wait
  __builtin_memset(part, 0, 4 * kBins * sizeof(uint32_t));
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vu bin = ordered(load<vf>(votes + i)) >> kShift;
    for (int j = 0; j < W; j++) part[(j & 3) * kBins + bin[j]]++;
  }
  for (; i < n; i++) part[ordered(votes[i]) >> kShift]++;
  for (int b = 0; b < kBins; b++) bins[b] = part[b] + part[kBins + b] + part[2 * kBins + b] + part[3 * kBins + b];
}

// The `rank`-th largest (from 1) of `n` values; reorders them.
uint32_t nth_largest(uint32_t* values, int64_t n, int64_t rank) {
  int64_t low = 0, high = n - 1;
  const int64_t target = rank - 1;
  while (low < high) {
    const uint32_t pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] > pivot) i++;
      while (values[j] < pivot) j--;
      if (i <= j) {
        const uint32_t t = values[i];
        values[i++] = values[j];
        values[j--] = t;
      }
    }
    if (target <= j) high = j;
    else if (target >= i) low = i;
    else break;
  }
  return values[target];
}

struct Tally {
  int64_t above, equal;
};

// One block's votes in chunks, each handled by one thread in three passes: histogram, count, write.
struct Selection {
  const float* votes;
  int64_t n, k, chunks;
  uint32_t* bins;     // [chunks, kBins]
  uint32_t* members;  // [n] room for the values of the deciding bin
  Tally* tallies;     // [chunks]
  uint32_t threshold = 0;
  int64_t ties = 0;  // how many equal to the threshold are chosen

  int64_t begin(int64_t chunk) const { return chunk * n / chunks; }

  void find_threshold();
  Tally tally(int64_t begin, int64_t end) const;
  void write(int64_t begin, int64_t end, Tally before, int64_t* out) const;
};

void Selection::find_threshold() {
  int64_t above = 0;
  int bin = kBins - 1;
  for (;; bin--) {
    int64_t here = 0;
    for (int64_t c = 0; c < chunks; c++) here += bins[c * kBins + bin];
    if (above + here >= k) break;
    above += here;
  }
  int64_t found = 0;
  for (int64_t i = 0; i < n;) {
    if (i + W <= n) {  // most vectors hold no member of the bin
      const vu value = ordered(load<vf>(votes + i));
      uint32_t inside = mask_of((value >> kShift) == (uint32_t)bin);
      for (; inside; inside &= inside - 1) members[found++] = value[__builtin_ctz(inside)];
      i += W;
    } else {
      const uint32_t value = ordered(votes[i++]);
      if ((int)(value >> kShift) == bin) members[found++] = value;
    }
  }
  threshold = nth_largest(members, found, k - above);
  int64_t larger = 0;
  for (int64_t i = 0; i < found; i++) larger += members[i] > threshold;
  ties = k - above - larger;
}

Tally Selection::tally(int64_t begin, int64_t end) const {
  vi above{}, equal{};
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    const vu value = ordered(load<vf>(votes + i));
    above -= (vi)(value > threshold);
    equal -= (vi)(value == threshold);
  }
  Tally t{0, 0};
  for (int j = 0; j < W; j++) t.above += above[j], t.equal += equal[j];
  for (; i < end; i++) t.above += ordered(votes[i]) > threshold, t.equal += ordered(votes[i]) == threshold;
  return t;
}

void Selection::write(int64_t begin, int64_t end, Tally before, int64_t* out) const {
  int64_t equal = before.equal;
  int64_t at = before.above + (equal < ties ? equal : ties);
  auto take = [&](int64_t i) {
    const uint32_t value = ordered(votes[i]);
    if (value > threshold || (value == threshold && equal++ < ties)) out[at++] = i;
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    uint32_t maybe = mask_of(ordered(load<vf>(votes + i)) >= threshold);
    for (; maybe; maybe &= maybe - 1) take(i + __builtin_ctz(maybe));
  }
  for (; i < end; i++) take(i);
}

}  // namespace

static void select_block(const float* votes, int64_t n, int64_t k, int64_t* out, int64_t chunks) {
  char* room = (char*)scratch(1, chunks * (kBins * sizeof(uint32_t) + sizeof(Tally)) + n * sizeof(uint32_t));
  Selection s{votes, n, k, chunks, (uint32_t*)room, nullptr, nullptr};
  s.tallies = (Tally*)(s.bins + chunks * kBins);
  s.members = (uint32_t*)(s.tallies + chunks);
  auto counting = [&](int64_t a, int64_t b) {
    for (int64_t c = a; c < b; c++) count(votes + s.begin(c), s.begin(c + 1) - s.begin(c), s.bins + c * kBins);
  };
  parallel_for(chunks, 1, counting);
  s.find_threshold();
  auto tallying = [&](int64_t a, int64_t b) {
    for (int64_t c = a; c < b; c++) s.tallies[c] = s.tally(s.begin(c), s.begin(c + 1));
  };
  parallel_for(chunks, 1, tallying);
  Tally sum{0, 0};
  for (int64_t c = 0; c < chunks; c++) {
    const Tally own = s.tallies[c];
    s.tallies[c] = sum;
    sum.above += own.above, sum.equal += own.equal;
  }
  auto writing = [&](int64_t a, int64_t b) {
    for (int64_t c = a; c < b; c++) s.write(s.begin(c), s.begin(c + 1), s.tallies[c], out);
  };
  parallel_for(chunks, 1, writing);
}

void topk_tokens(const TopkArgs& args) {
  auto blocks = [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t first = args.start_loc[i], n = args.start_loc[i + 1] - first;
      // Several blocks go to the threads whole; one block is cut up for them.
      const int64_t most = args.num_blocks == 1 ? num_threads() : 1, wanted = n / kChunk;
      const int64_t chunks = wanted < 1 ? 1 : wanted < most ? wanted : most;
      select_block(args.votes + first, n, args.k, args.indices + i * args.k, chunks);
    }
  };
  if (args.num_blocks == 1) blocks(0, 1);
  else parallel_for(args.num_blocks, 1, blocks);
}

}  // namespace tokenselect::TS_ISA
