// The soft vote: logits of every head against every candidate, softmax per head, summed over heads.
//
// A key is loaded once for all rows that score it: the heads of its group, both views of the distances and the blocks
// that share its context. Each chunk of keys leaves exponentials behind, in units of a power of two of its own, and their
// sum, so the second pass reads those, not the keys, and is one multiplication per row and token. Powers of two round
// nothing: equal keys have equal votes, wherever they are, until these are weighed by their age.
#include "turned_queries.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 1024;                  // keys whose logits are made at once
constexpr int64_t kStride = kChunk + W;           // from a row's logits to the next: caches place powers of two badly
constexpr int64_t kBlocksAtOnce = 16;             // blocks that share a read of the keys
constexpr int64_t kMostLogits = int64_t(1) << 17;   // of a chunk, where heads are read together
constexpr int64_t kMostWeights = int64_t(32) << 20;  // bytes of exponentials kept between the passes
constexpr int64_t kShortKey = 64;                   // dimensions; see `LongBf16`
constexpr int64_t kEndless = int64_t(1) << 60;
constexpr float kNone = -3.4e38f;

template <class Key>
void store_weight(void* weights, int64_t i, vf v) {
  if constexpr (Key::size == 4) store((float*)weights + i, v);
  else store_half((uint16_t*)weights + i, v);
}

template <class Key>
TS_INLINE vf load_weight(const void* weights, int64_t i) {
  if constexpr (Key::size == 4) return load<vf>((const float*)weights + i);
  else return load_half((const uint16_t*)weights + i);
}

// exp(logit) / 2^power; less exact, where a weight in half precision is all that is kept.
template <class Key>
TS_INLINE vf exp_of(vf logits, float power) {
  if constexpr (Key::size == 4) return vexp(logits, power);
  else return vexp2(logits, power);
}

// An even power of two, in units of which exp(logit) is at most 2^14: so half precision holds the largest exponential of
// a chunk, and what is 2^28 times smaller with all its digits.
template <class Key>
TS_INLINE float power_below(float logit) {
  return 2 * __builtin_ceilf(logit * (kLog2E / kUnitsOfLogit<Key> / 2)) - 14;
}

// Exponentials of a whole chunk, all of them candidates: nothing is masked, and sums do not wait for each other.
template <class Key>
TS_INLINE Stats weigh_all(const float* logits, void* weights, int64_t place) {
  constexpr int kSums = 4;
  vf most[kSums], sum[kSums] = {};
  for (int j = 0; j < kSums; j++) most[j] = load<vf>(logits + j * W);
  for (int64_t i = kSums * W; i < kChunk; i += kSums * W)
    for (int j = 0; j < kSums; j++) most[j] = vmax(most[j], load<vf>(logits + i + j * W));
  const float power = power_below<Key>(max_of(vmax(vmax(most[0], most[1]), vmax(most[2], most[3]))));
  for (int64_t i = 0; i < kChunk; i += kSums * W)
    for (int j = 0; j < kSums; j++) {
      const vf e = exp_of<Key>(load<vf>(logits + i + j * W), power);
      sum[j] += e;
      store_weight<Key>(weights, place + i + j * W, e);
    }
  const float total = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return {power, total, total};
}

// Exponentials of a chunk of which `stop` tokens are context and those from `low` to `high` - 1 candidates.
template <class Key>
Stats weigh_some(const float* logits, int64_t stop, int64_t low, int64_t high, void* weights, int64_t place) {
  if (stop == 0) return {kNone, 0, 0};
  vi lane{};
  for (int j = 0; j < W; j++) lane[j] = j;
  vf most = set1(kNone), sum{}, chosen{};
  for (int64_t i = 0; i < stop; i += W)
    most = vmax(most, i + W <= stop ? load<vf>(logits + i) : lane < (int32_t)(stop - i) ? load<vf>(logits + i) : most);
  const float power = power_below<Key>(max_of(most));
  for (int64_t i = 0; i < stop; i += W) {
    vf e = exp_of<Key>(load<vf>(logits + i), power);
    if (i + W > stop) e = lane < (int32_t)(stop - i) ? e : vf{};
    sum += e;
    chosen += (lane >= (int32_t)(low - i)) & (lane < (int32_t)(high - i)) ? e : vf{};
    store_weight<Key>(weights, place + i, e);
  }
  return {power, sum_of(sum), sum_of(chosen)};
}

// Logits of one chunk become exponentials.
template <class Key>
void weigh(const Group& g, int64_t kv_head, int64_t chunk, const float* logits) {
  const ScoreArgs& a = g.a;
  const int64_t from = g.begin + chunk * kChunk, per_block = g.head_rows / g.num_blocks;
  auto inside = [&](int64_t position) {
    return position < from ? 0 : position < from + kChunk ? position - from : kChunk;
  };
  for (int64_t r = 0; r < g.head_rows; r++) {
    const int64_t block = g.first_block + r / per_block, row = kv_head * g.head_rows + r;
    const int64_t stop = inside(a.context[2 * block + 1]);
    const int64_t low = inside(a.candidates[2 * block]), high = inside(a.candidates[2 * block + 1]);
    const float* own = logits + r * kStride;
    const int64_t place = row * g.length + chunk * kChunk;
    g.stats[row * g.chunks + chunk] = low == 0 && high == kChunk
                                          ? weigh_all<Key>(own, g.weights, place)
                                          : weigh_some<Key>(own, stop, low, high, g.weights, place);
  }
}

// Where the keys of a head lie, one of `num_heads` that are read together; `rows` of them are known.
template <class Key>
KeyRows keys_of(const ScoreArgs& a, int64_t kv_head, int64_t index, int64_t num_heads, const int64_t* rows,
                int64_t known) {
  KeyRows keys{index, num_heads};
  keys.key = (const char*)a.keys.data + kv_head * a.keys.head_stride * Key::size;
  keys.stride = a.keys.row_stride * Key::size;
  keys.rows = rows, keys.known = known, keys.page_size = a.pages.max_pages == 1 ? kEndless : a.pages.page_size;
  if (Key::size == 1) keys.scales = (const float*)a.key_scales.data + kv_head * a.key_scales.head_stride;
  keys.scale_stride = a.key_scales.row_stride;
  const int64_t bytes = num_heads * a.head_dim * Key::size;
  keys.near = Ahead::distance(Ahead::kNear, bytes), keys.far = Ahead::distance(Ahead::kFar, bytes);
  return keys;
}

// A KV head that takes part in a chunk.
template <class Key>
struct Head {
  KeyRows keys;
  Queries<Key> queries;
  float* logits;  // [head_rows, kChunk], stride kStride
  FarAhead ahead;

  static void* operator new(size_t, void* place) { return place; }
};

// Scores one chunk of the keys of `num_heads` KV heads from `first_head` on, which are read together.
template <class Key>
void score_chunk(const Group& g, int64_t chunk, int64_t first_head, int64_t num_heads) {
  const ScoreArgs& a = g.a;
  const int64_t from = g.begin + chunk * kChunk, to = from + kChunk < g.end ? from + kChunk : g.end;
  constexpr int64_t kKnown = kChunk + (kTiled<Key> ? kChunk : Ahead::kMost * kStretch);
  int64_t rows[kKnown];
  const int64_t known = g.end - from < kKnown ? g.end - from : kKnown;
  rows_of(a.pages, a.sequences[g.first_block], from, from + known, rows);
  const int64_t room = Queries<Key>::room(g), size = g.head_rows * kStride;
  char* memory = (char*)scratch(2, num_heads * room);
  float* logits = (float*)scratch(3, num_heads * size * sizeof(float));
  auto* heads = (Head<Key>*)scratch(5, num_heads * sizeof(Head<Key>));
  vu* columns = (vu*)scratch(6, stretch_room<Key>(a.head_dim));
  [[maybe_unused]] Tiles<kTiled<Key>> tiles;
  Runs runs(g, from);
  for (int64_t h = 0; h < num_heads; h++) {
    const int64_t kv_head = first_head + h;
    Head<Key>& head = *new (heads + h) Head<Key>{keys_of<Key>(a, kv_head, h, num_heads, rows, known),
                                                 {g, kv_head, from, to, memory + h * room}, logits + h * size};
    head.queries.turn(head.queries.sets[0], runs);
    if (kTiled<Key>) head.ahead = FarAhead(head.keys, kChunk, a.head_dim * Key::size);
  }
  for (int64_t at = from, next, i = 0; at < to; at = next, i++) {
    next = runs.until(g, to);
    runs.move(g, next);
    for (int64_t h = 0; next < to && h < num_heads; h++)
      heads[h].queries.turn(heads[h].queries.sets[(i + 1) % 2], runs);
    for (int64_t place = at - from; place < next - from; place += kStretch) {
      const int64_t left = next - from - place, n = left < kStretch ? left : kStretch;
      for (int64_t h = 0; h < num_heads; h++) {
        Head<Key>& head = heads[h];
        const Turned& set = head.queries.sets[i % 2];
        const float* units = head.queries.units;
        // Vectors may reach past the run's end: what follows overwrites that.
        const Logits l{set.packed, set.offsets, units, set.shifts, nullptr, head.logits + place, kStride};
        if constexpr (kTiled<Key>)
          dot_tiles<Key>(head.keys, place, n, g.head_rows, a.head_dim, set.columns, columns, l, head.ahead);
        else dot_stretch<Key>(head.keys, place, n, g.head_rows, a.head_dim, columns, l);
      }
    }
  }
  for (int64_t h = 0; h < num_heads; h++) weigh<Key>(g, first_head + h, chunk, heads[h].logits);
}

// 2^n for a whole n <= 0; 0 below -126.
TS_INLINE float power_of_two(float n) {
  const uint32_t bits = n < -126 ? 0 : (uint32_t)(127 + (int32_t)n) << 23;
  return load<float>(&bits);
}

// factor[row, chunk]: what turns the chunk's exponentials into votes; normalises every view of a block to a sum of 1.
void finish_stats(const Group& g, float* factors) {
  const ScoreArgs& a = g.a;
  const int64_t per_block = g.head_rows / g.num_blocks, heads = a.num_q_heads / a.num_kv_heads;
  for (int64_t n = 0; n < g.num_blocks; n++)
    for (int64_t v = 0; v < a.num_views; v++) {
      float total = 0;
      for (int pass = 0; pass < 2; pass++)
        for (int64_t kv = 0; kv < a.num_kv_heads; kv++)
          for (int64_t h = 0; h < heads; h++) {
            const int64_t row = kv * g.head_rows + n * per_block + h * a.num_views + v;
            const Stats* stats = g.stats + row * g.chunks;
            float power = kNone, sum = 0, chosen = 0;
            for (int64_t c = 0; c < g.chunks; c++) power = stats[c].power > power ? stats[c].power : power;
            for (int64_t c = 0; c < g.chunks; c++) {
              const float lift = power_of_two(stats[c].power - power);
              sum += stats[c].sum * lift, chosen += stats[c].chosen * lift;
              if (pass) factors[row * g.chunks + c] = lift;
            }
            if (!pass) total += chosen / sum;
            else
              for (int64_t c = 0; c < g.chunks; c++)
                factors[row * g.chunks + c] *= 1.0f / (sum * (total > 1.2e-38f ? total : 1.2e-38f));
          }
    }
}

// What counts of the votes for W tokens, the first of which is so old.
TS_INLINE vf by_age(float horizon, int64_t age) {
  vf older{};
  for (int j = 0; j < W; j++) older[j] = -(float)j;
  return horizon / (horizon + (float)age + older);
}

template <class Key>
void sum_votes(const Group& g, const float* factors, int64_t block, int64_t chunk) {
  const ScoreArgs& a = g.a;
  const int64_t from = g.begin + chunk * kChunk, first = a.candidates[2 * block], last = a.candidates[2 * block + 1];
  const int64_t low = first > from ? first - from : 0, high = last - from < kChunk ? last - from : kChunk;
  if (low >= high) return;
  const int64_t per_block = g.head_rows / g.num_blocks, place = chunk * kChunk;
  constexpr int kSums = 4;  // vectors that do not wait for each other
  alignas(64) float total[kChunk];
  for (int64_t i = low / (kSums * W) * kSums * W; i < high; i += kSums * W) {
    vf sums[kSums] = {};
    for (int64_t kv = 0; kv < a.num_kv_heads; kv++) {
      const int64_t first_row = kv * g.head_rows + (block - g.first_block) * per_block;
      for (int64_t row = first_row; row < first_row + per_block; row++) {
        const float factor = factors[row * g.chunks + chunk];
        const int64_t at = row * g.length + place + i;
        for (int j = 0; j < kSums; j++) sums[j] += load_weight<Key>(g.weights, at + j * W) * factor;
      }
    }
    for (int j = 0; j < kSums; j++)
      store(total + i + j * W, a.horizon > 0 ? (sums[j] + a.prior) * by_age(a.horizon, last - from - i - j * W) : sums[j]);
  }
  float* votes = a.votes + a.start_loc[block] + from - first;
  __builtin_memcpy(votes + low, total + low, (high - low) * sizeof(float));
}

template <class Key>
void score_group(Group& g) {
  const ScoreArgs& a = g.a;
  const int64_t stats_bytes = g.rows * g.chunks * (sizeof(Stats) + sizeof(float));
  g.stats = (Stats*)scratch(0, stats_bytes);
  float* factors = (float*)(g.stats + g.rows * g.chunks);
  g.weights = scratch(1, g.rows * g.length * (Key::size == 4 ? 4 : 2));
  // Keys of heads that lie apart are read head by head, each as one stream; others together, in memory's order, where
  // there is room for the logits of all.
  const bool apart = a.keys.head_stride > a.keys.row_stride || g.rows * kStride > kMostLogits;
  const int64_t together = apart ? 1 : a.num_kv_heads;
  auto score = [&](int64_t from, int64_t to) {
    for (int64_t h = 0; h < a.num_kv_heads; h += together)
      for (int64_t chunk = from; chunk < to; chunk++) score_chunk<Key>(g, chunk, h, together);
  };
  parallel_for(g.chunks, 1, score);
  finish_stats(g, factors);
  auto sum = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
      sum_votes<Key>(g, factors, g.first_block + i % g.num_blocks, i / g.num_blocks);
  };
  parallel_for(g.chunks * g.num_blocks, 1, sum);
}

}  // namespace

void score_tokens(const ScoreArgs& a) {
  const int64_t weight = a.keys.dtype == DType::f32 ? 4 : 2;
  for (int64_t first = 0; first < a.num_blocks;) {
    int64_t n = 0, end = 0;
    const int64_t begin = a.context[2 * first];
    for (; first + n < a.num_blocks && n < kBlocksAtOnce; n++) {
      const int64_t block = first + n;
      if (a.sequences[block] != a.sequences[first] || a.context[2 * block] != begin) break;
      const int64_t longest = a.context[2 * block + 1] > end ? a.context[2 * block + 1] : end;
      if (n && (n + 1) * a.num_q_heads * a.num_views * (longest - begin) * weight > kMostWeights) break;
      end = longest;
    }
    const int64_t head_rows = n * a.num_q_heads / a.num_kv_heads * a.num_views;
    const int64_t chunks = (end - begin + kChunk - 1) / kChunk;
    Group g{a, first, n, begin, end, head_rows * a.num_kv_heads, head_rows, chunks, chunks * kChunk + 2 * W};
    for (int64_t v = 0; v < a.num_views; v++) {
      const int64_t* runs = a.views[v].run_start_loc + first;
      g.run_size[v] = runs[n] - runs[0] == n ? kEndless : a.views[v].run_size;
      g.alike[v] = 0;
      for (int64_t i = 0; a.views[v].alike && i < n; i++) {
        const int64_t own = a.views[v].alike[first + i];
        g.alike[v] = i == 0 || own < g.alike[v] ? own : g.alike[v];
      }
    }
    switch (a.keys.dtype) {
      case DType::f32: score_group<F32>(g); break;
      case DType::bf16:
        kTiled<AmxBf16> || a.head_dim > kShortKey ? score_group<AmxBf16>(g) : score_group<Bf16>(g);
        break;
      case DType::f16: score_group<F16>(g); break;
      case DType::i8:
        // A few rows of bytes are multiplied while memory is waited for: tiles gain nothing there.
        kTiled<AmxI8> && head_rows > W ? score_group<AmxI8>(g) : score_group<I8>(g);
        break;
    }
    first += n;
  }
}

}  // namespace tokenselect::TS_ISA
