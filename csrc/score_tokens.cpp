// The soft vote: logits of every head against every candidate, softmax per head, summed over heads.
//
// A key is loaded once for all rows that score it: the heads of its group, both views of the distances and the blocks
// that share its context. Each chunk of keys leaves exponentials behind, in units of a power of two of its own, and their
// sum, so the second pass reads those, not the keys, and is one multiplication per row and token. Powers of two round
// nothing: equal keys have equal votes, wherever they are.
#include "tile.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr int64_t kChunk = 512;                   // keys whose logits are made at once
constexpr int64_t kBlocksAtOnce = 16;             // blocks that share a read of the keys
constexpr int64_t kMostWeights = int64_t(32) << 20;  // bytes of exponentials kept between the passes
constexpr int64_t kEndless = int64_t(1) << 60;
constexpr float kNone = -3.4e38f;

struct Stats {
  float power;   // of two, in units of which the chunk's exponentials are kept; even
  float sum;     // of them over the context
  float chosen;  // the same over the candidates
};

// Blocks `first_block ..` that share sequence and start of the context: one read of the keys serves them all.
struct Group {
  const ScoreArgs& a;
  int64_t first_block, num_blocks;
  int64_t begin, end;        // positions of the longest context
  int64_t rows, head_rows;   // rows in all; rows per KV head: [block][head of the group][view]
  int64_t chunks, length;    // chunks of keys; positions, padded to whole vectors
  Stats* stats;              // [rows, chunks]
  int64_t run_size[kMaxViews];  // keys that share a rotation: all of them where a view has one run
  float amplitude[kMaxViews];   // of the rotations
  void* weights;             // [rows, length] exponentials: half precision, or float for float keys
};

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

TS_INLINE float dot(const float* x, const float* y, int64_t dim) {
  vf sum{};
  for (int64_t d = 0; d < dim; d += W) sum += load<vf>(x + d) * load<vf>(y + d);
  return sum_of(sum);
}

// Square of the longest of `n` pairs (x[i], y[i]).
float longest_square(const float* x, const float* y, int64_t n) {
  vf most{};
  int64_t i = 0;
  for (; i + W <= n; i += W) most = vmax(most, load<vf>(x + i) * load<vf>(x + i) + load<vf>(y + i) * load<vf>(y + i));
  float largest = max_of(most);
  for (; i < n; i++) largest = x[i] * x[i] + y[i] * y[i] > largest ? x[i] * x[i] + y[i] * y[i] : largest;
  return largest;
}

// Length of the longest pair that a rotation turns, or of what it leaves.
float longest_pair(const float* x, int64_t dim, int64_t half, bool interleaved) {
  float most = interleaved ? 0 : longest_square(x, x + half, half);
  auto see = [&](float square) { most = square > most ? square : most; };
  for (int64_t i = 0; interleaved && i < half; i++) see(x[2 * i] * x[2 * i] + x[2 * i + 1] * x[2 * i + 1]);
  for (int64_t i = 2 * half; i < dim; i++) see(x[i] * x[i]);
  return __builtin_sqrtf(most);
}

// Most that any of the view's rotations makes of the length of a pair; at least 1, for what is not rotated.
float amplitude_of(const ScoreArgs& a, const View& view, int64_t first_run, int64_t last_run) {
  const int64_t from = first_run * a.half, n = (last_run - first_run) * a.half;
  const float most = longest_square(view.cos + from, view.sin + from, n);
  return most > 1 ? __builtin_sqrtf(most) : 1;
}

// The queries that score one chunk of one KV head's keys.
template <class Key>
struct Queries {
  const Group& g;
  int64_t kv_head, heads, dim, bytes;
  const float* center;
  float* scaled;  // [rows, dim], in units of which a packed one holds any rotation
  float* turned;  // [dim]
  float *units, *shifts;  // [rows]
  char* packed;           // [rows]

  Queries(const Group& group, int64_t head) : g(group), kv_head(head) {
    const ScoreArgs& a = g.a;
    heads = a.num_q_heads / a.num_kv_heads, dim = a.head_dim, bytes = Key::query_bytes(dim);
    center = a.key_center ? a.key_center + (a.sequences[g.first_block] * a.num_kv_heads + kv_head) * dim : nullptr;
    scaled = (float*)scratch(2, ((g.head_rows + 1) * dim + 2 * g.head_rows) * sizeof(float));
    turned = scaled + g.head_rows * dim, units = turned + dim, shifts = units + g.head_rows;
    packed = (char*)scratch(5, g.head_rows * bytes);
    for (int64_t row = 0; row < g.head_rows; row++) scale(row);
  }

  void scale(int64_t row) {
    const ScoreArgs& a = g.a;
    const int64_t head = row / a.num_views, block = g.first_block + head / heads;
    const float* query = a.queries + (block * a.num_q_heads + kv_head * heads + head % heads) * dim;
    float unit = 1;
    if constexpr (Key::kLargest > 0)
      unit = longest_pair(query, dim, a.half, a.interleaved) * g.amplitude[row % a.num_views] * (1 / Key::kLargest);
    if (!(unit > 0)) unit = 1;
    for (int64_t d = 0; d < dim; d += W) store(scaled + row * dim + d, load<vf>(query + d) * (1 / unit));
    units[row] = unit * a.scale;
  }

  // Rotates the queries for the runs that position `at` lies in; only for the views that changed there.
  void turn(int64_t at, uint32_t changed) {
    const ScoreArgs& a = g.a;
    for (int64_t v = 0; v < a.num_views; v++) {
      if (!(changed >> v & 1)) continue;
      const View& view = a.views[v];
      const int64_t mine = (at - g.begin) / g.run_size[v];
      for (int64_t n = 0; n < g.num_blocks; n++) {
        const int64_t first = view.run_start_loc[g.first_block + n];
        const int64_t last = view.run_start_loc[g.first_block + n + 1] - first - 1;
        const int64_t pair = (first + (mine < last ? mine : last)) * a.half;
        for (int64_t h = 0; h < heads; h++) turn((n * heads + h) * a.num_views + v, view.cos + pair, view.sin + pair);
      }
    }
  }

  void turn(int64_t row, const float* cos, const float* sin) {
    const float* query = scaled + row * dim;
    rotate_row(query, turned, cos, sin, g.a.half, g.a.interleaved);
    for (int64_t d = 2 * g.a.half; d < dim; d++) turned[d] = query[d];
    Key::pack(turned, dim, packed + row * bytes);
    shifts[row] = center ? dot(turned, center, dim) * units[row] : 0;
  }
};

// exp(logit) / 2^power; less exact, where a weight in half precision is all that is kept.
template <class Key>
TS_INLINE vf exp_of(vf logits, float power) {
  if constexpr (Key::size == 4) return vexp(logits, power);
  else return vexp2(logits * 1.44269504f, power);
}

// An even power of two, in units of which exp(logit) is at most 2^14: so half precision holds the largest exponential of
// a chunk, and what is 2^28 times smaller with all its digits.
TS_INLINE float power_below(float logit) { return 2 * __builtin_ceilf(logit * (1.44269504f / 2)) - 14; }

// Exponentials of a whole chunk, all of them candidates: nothing is masked, and sums do not wait for each other.
template <class Key>
TS_INLINE Stats weigh_all(const float* logits, void* weights, int64_t place) {
  constexpr int kSums = 4;
  vf most[kSums], sum[kSums] = {};
  for (int j = 0; j < kSums; j++) most[j] = load<vf>(logits + j * W);
  for (int64_t i = kSums * W; i < kChunk; i += kSums * W)
    for (int j = 0; j < kSums; j++) most[j] = vmax(most[j], load<vf>(logits + i + j * W));
  const float power = power_below(max_of(vmax(vmax(most[0], most[1]), vmax(most[2], most[3]))));
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
  const float power = power_below(max_of(most));
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
    const float* own = logits + r * kChunk;
    const int64_t place = row * g.length + chunk * kChunk;
    g.stats[row * g.chunks + chunk] = low == 0 && high == kChunk
                                          ? weigh_all<Key>(own, g.weights, place)
                                          : weigh_some<Key>(own, stop, low, high, g.weights, place);
  }
}

// Scales of the keys at from .. to - 1.
void load_scales(const ScoreArgs& a, int64_t sequence, int64_t kv_head, int64_t from, int64_t to, float* out) {
  const float* scales = (const float*)a.key_scales.data + kv_head * a.key_scales.head_stride;
  int64_t rows[kChunk];
  rows_of(a.pages, sequence, from, to, rows);
  if (a.key_scales.row_stride == 1 && in_one_page(a.pages, sequence, from, to))
    __builtin_memcpy(out, scales + rows[0], (to - from) * sizeof(float));
  else
    for (int64_t i = 0; i < to - from; i++) out[i] = scales[rows[i] * a.key_scales.row_stride];
}

template <class Key>
void score_chunk(const Group& g, int64_t kv_head, int64_t chunk) {
  const ScoreArgs& a = g.a;
  const int64_t from = g.begin + chunk * kChunk, to = from + kChunk < g.end ? from + kChunk : g.end;
  const int64_t sequence = a.sequences[g.first_block];
  const KeyRows keys{a.pages, sequence, (const char*)a.keys.data + kv_head * a.keys.head_stride * Key::size,
                     a.keys.row_stride * Key::size};
  float key_scales[kChunk + W];
  if (Key::size == 1) load_scales(a, sequence, kv_head, from, to, key_scales);
  Queries<Key> queries(g, kv_head);
  vu* columns = (vu*)scratch(6, num_columns<Key>(a.head_dim) * sizeof(vu));
  float* logits = (float*)scratch(3, g.head_rows * kChunk * sizeof(float));
  uint32_t changed = ~0u;
  for (int64_t at = from; at < to;) {
    queries.turn(at, changed);
    int64_t next = to;
    changed = 0;
    for (int64_t v = 0; v < a.num_views; v++) {
      const int64_t size = g.run_size[v], border = g.begin + ((at - g.begin) / size + 1) * size;
      if (border < next) next = border, changed = 0;
      if (border == next) changed |= 1u << v;
    }
    // Vectors may reach past the run's end, but never past the chunk's: what follows overwrites that.
    const int64_t n = next - at, place = at - from;
    const bool spare = (place + n + W - 1) / W * W > kChunk || place % W;
    float* out = spare ? (float*)scratch(4, g.head_rows * (kChunk + W) * sizeof(float)) : logits + place;
    const int64_t ld = spare ? kChunk + W : kChunk;
    const float* scales = Key::size == 1 ? key_scales + place : nullptr;
    dot_tiles<Key>(keys, at, n, g.end, g.head_rows, a.head_dim, columns,
                   {queries.packed, queries.units, queries.shifts, scales, out, ld});
    if (spare)
      for (int64_t r = 0; r < g.head_rows; r++)
        __builtin_memcpy(logits + r * kChunk + place, out + r * ld, n * sizeof(float));
    at = next;
  }
  weigh<Key>(g, kv_head, chunk, logits);
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

template <class Key>
void sum_votes(const Group& g, const float* factors, int64_t block, int64_t chunk) {
  const ScoreArgs& a = g.a;
  const int64_t from = g.begin + chunk * kChunk, first = a.candidates[2 * block], last = a.candidates[2 * block + 1];
  const int64_t low = first > from ? first - from : 0, high = last - from < kChunk ? last - from : kChunk;
  if (low >= high) return;
  const int64_t per_block = g.head_rows / g.num_blocks;
  float total[kChunk];
  __builtin_memset(total, 0, sizeof total);
  const int64_t begin = low / W * W;
  for (int64_t kv = 0; kv < a.num_kv_heads; kv++)
    for (int64_t r = 0; r < per_block; r++) {
      const int64_t row = kv * g.head_rows + (block - g.first_block) * per_block + r;
      const float factor = factors[row * g.chunks + chunk];
      for (int64_t i = begin; i < high; i += W)
        store(total + i, load<vf>(total + i) + load_weight<Key>(g.weights, row * g.length + chunk * kChunk + i) * factor);
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
  auto score = [&](int64_t from, int64_t to) {
    // Where heads lie apart, a thread stays with one: memory is read as one stream.
    const bool apart = a.keys.head_stride > a.keys.row_stride;
    for (int64_t i = from; i < to; i++)
      if (apart) score_chunk<Key>(g, i / g.chunks, i % g.chunks);
      else score_chunk<Key>(g, i % a.num_kv_heads, i / a.num_kv_heads);
  };
  parallel_for(g.chunks * a.num_kv_heads, 1, score);
  finish_stats(g, factors);
  auto sum = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
      sum_votes<Key>(g, factors, g.first_block + i % g.num_blocks, i / g.num_blocks);
  };
  parallel_for(g.chunks * g.num_blocks, 4, sum);
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
    Group g{a, first, n, begin, end, head_rows * a.num_kv_heads, head_rows, chunks, chunks * kChunk};
    for (int64_t v = 0; v < a.num_views; v++) {
      const int64_t* runs = a.views[v].run_start_loc + first;
      g.run_size[v] = runs[n] - runs[0] == n ? kEndless : a.views[v].run_size;
      if (a.keys.dtype == DType::i8) g.amplitude[v] = amplitude_of(a, a.views[v], runs[0], runs[n]);
    }
    switch (a.keys.dtype) {
      case DType::f32: score_group<F32>(g); break;
      case DType::bf16: score_group<Bf16>(g); break;
      case DType::f16: score_group<F16>(g); break;
      case DType::i8: score_group<I8>(g); break;
    }
    first += n;
  }
}

}  // namespace tokenselect::TS_ISA
