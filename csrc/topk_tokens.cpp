// Exact top-k: a histogram of the votes' leading bits finds the bin of the k-th, one of its members' next bits those few
// among which it is, and the rest is decided by comparison. Ascending output, ties to the lowest index.
#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int kBins = 4096;  // sign, exponent and 3 bits of mantissa
constexpr int kShift = 20;
constexpr int kNextShift = 8;  // the 12 bits after those
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

// The marked ones of a vector's values, one after the other; returns how many. A whole vector may be written.
TS_INLINE int64_t compress(vu values, vi marked, uint32_t* out) {
  uint32_t mask = mask_of(marked);
#if defined(__AVX512F__)
  if (mask) store(out, _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)values));
  return __builtin_popcount(mask);
#else
  int64_t found = 0;
  for (; mask; mask &= mask - 1) out[found++] = values[__builtin_ctz(mask)];
  return found;
#endif
}

// One block's votes in chunks, each handled by one thread in four passes: histogram, members, count, write.
struct Selection {
  const float* votes;
  int64_t n, k, chunks;
  uint32_t* bins;     // [chunks, kBins]
  Tally* tallies;     // [chunks]
  uint32_t* members;  // [n] the values of the deciding bin, from the beginning of each chunk on
  int64_t* found;     // [chunks] how many
  int64_t above = 0;  // values in the bins above the deciding ones
  uint32_t threshold = 0;
  int64_t ties = 0;  // how many equal to the threshold are chosen

  int64_t begin(int64_t chunk) const { return chunk * n / chunks; }

  uint32_t next_bin();
  void collect(int64_t chunk, uint32_t bin) const;
  void find_threshold(uint32_t bin);
  Tally tally(int64_t begin, int64_t end) const;
  void write(int64_t begin, int64_t end, Tally before, int64_t* out) const;
};

// The bin of the k-th value, after those `above`.
uint32_t Selection::next_bin() {
  for (uint32_t bin = kBins - 1;; bin--) {
    int64_t here = 0;
    for (int64_t c = 0; c < chunks; c++) here += bins[c * kBins + bin];
    if (above + here >= k) return bin;
    above += here;
  }
}

// A chunk's values in the bin, and a histogram of their next bits in place of the first.
void Selection::collect(int64_t chunk, uint32_t bin) const {
  uint32_t* own = members + begin(chunk);
  int64_t count = 0, i = begin(chunk);
  const int64_t end = begin(chunk + 1);
  for (; i + W <= end; i += W) {
    const vu value = ordered(load<vf>(votes + i));
    count += compress(value, (value >> kShift) == bin, own + count);
  }
  for (; i < end; i++)
    if (ordered(votes[i]) >> kShift == bin) own[count++] = ordered(votes[i]);
  uint32_t* counts = bins + chunk * kBins;
  __builtin_memset(counts, 0, kBins * sizeof(uint32_t));
  for (int64_t m = 0; m < count; m++) counts[own[m] >> kNextShift & (kBins - 1)]++;
  found[chunk] = count;
}

// Among the members whose next bits are `bin`.
void Selection::find_threshold(uint32_t bin) {
  int64_t few = 0;
  for (int64_t c = 0; c < chunks; c++) {
    const uint32_t* own = members + begin(c);
    for (int64_t m = 0; m < found[c]; m++)  // no member is written over before it was read
      if ((own[m] >> kNextShift & (kBins - 1)) == bin) members[few++] = own[m];
  }
  threshold = nth_largest(members, few, k - above);
  int64_t larger = 0;
  for (int64_t i = 0; i < few; i++) larger += members[i] > threshold;
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
  const int64_t of_chunk = kBins * sizeof(uint32_t) + sizeof(Tally) + sizeof(int64_t);
  char* room = (char*)scratch(1, chunks * of_chunk + n * sizeof(uint32_t));
  Selection s{votes, n, k, chunks, (uint32_t*)room, nullptr, nullptr, nullptr};
  s.tallies = (Tally*)(s.bins + chunks * kBins);
  s.found = (int64_t*)(s.tallies + chunks);
  s.members = (uint32_t*)(s.found + chunks);
  auto counting = [&](int64_t a, int64_t b) {
    for (int64_t c = a; c < b; c++) count(votes + s.begin(c), s.begin(c + 1) - s.begin(c), s.bins + c * kBins);
  };
  parallel_for(chunks, 1, counting);
  const uint32_t bin = s.next_bin();
  auto collecting = [&](int64_t a, int64_t b) {
    for (int64_t c = a; c < b; c++) s.collect(c, bin);
  };
  parallel_for(chunks, 1, collecting);
  s.find_threshold(s.next_bin());
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
