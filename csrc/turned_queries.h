// The queries of one chunk of keys: turned by the distance that the keys of a run count as having, and packed.
#pragma once

#include "amx.h"
#include "score_group.h"

namespace tokenselect::TS_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
// Logits are exponents of this base: of 2, where a weight in half precision is all that is kept of them.
template <class Key>
constexpr float kUnitsOfLogit = Key::size == 4 ? 1 : kLog2E;

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

// Most that any rotation of the block's runs from `first` to `last` makes of the length of a pair; at least 1, for what
// is not rotated.
float amplitude_of(const Group& g, int64_t v, int64_t block, int64_t first, int64_t last) {
  const View& view = g.a.views[v];
  const int64_t from = g.row_of_run(v, block, first) * g.a.half;
  const int64_t n = (g.row_of_run(v, block, last) + 1) * g.a.half - from;
  const float most = longest_square(view.cos + from, view.sin + from, n);
  return most > 1 ? __builtin_sqrtf(most) : 1;
}

// Queries as they score one run of keys.
struct Turned {
  char* packed;      // see `Logits`
  vu* columns;       // the same turned on their side, where tiles are multiplied
  int32_t* offsets;  // [rows]
  float* shifts;     // [rows]
  int64_t run[kMaxViews] = {-1, -1};  // of each view that they were turned for
};

// The queries of one KV head, in two sets: the next run's are made before the last run's are done with, so that nothing
// waits for what was stored just now.
template <class Key>
struct Queries {
  struct Place {  // in bytes of a packed set
    int64_t first;   // of the row in its first block
    int64_t stride;  // from there to its next
  };

  const Group& g;
  int64_t kv_head, heads, dim, blocks, width;  // heads of the group; dimensions, and those that fill whole blocks
  const float* center;  // of int8 keys
  float* scaled;  // [rows, width], in units of which a packed one holds any rotation; zero from `dim` on
  float* turned;  // [width], zero from `dim` on
  float* units;   // [rows]
  Place* places;  // [rows]
  Turned sets[2];

  // Of a set that is turned on its side.
  static int64_t num_columns(int64_t rows, int64_t blocks) {
    return kTiled<Key> ? Parts(rows, W).count * blocks * W : 0;
  }

  // Bytes that it needs, in whole vectors: two sets, packed and perhaps turned on their side, what is scaled, turned
  // and added, and places in the sets.
  static int64_t room(const Group& g) {
    const int64_t blocks = blocks_of<Key>(g.a.head_dim), rows = g.head_rows;
    const int64_t floats = ((rows + 2) * blocks * Key::kLoaded + 6 * rows) * sizeof(float);
    const int64_t columns = num_columns(rows, blocks) * sizeof(vu);
    const int64_t bytes = 2 * columns + floats + rows * (2 * blocks * kQueryBytes<Key> + sizeof(Place));
    return (bytes + sizeof(vf) - 1) / sizeof(vf) * sizeof(vf);
  }

  // For the keys at positions `from` to `to` - 1; `memory` is room, aligned to a vector.
  Queries(const Group& group, int64_t head, int64_t from, int64_t to, char* memory) : g(group), kv_head(head) {
    const ScoreArgs& a = g.a;
    const int64_t rows = g.head_rows;
    heads = a.num_q_heads / a.num_kv_heads, dim = a.head_dim;
    blocks = blocks_of<Key>(dim), width = blocks * Key::kLoaded;
    const int64_t bytes = rows * blocks * kQueryBytes<Key>;
    vu* columns = (vu*)memory;
    char* packed = (char*)(columns + 2 * num_columns(rows, blocks));
    scaled = (float*)(packed + 2 * bytes);
    turned = scaled + rows * width, units = turned + width;
    float* none = units + rows;
    float* free = none + width;
    for (int64_t d = 0; d < width; d++) none[d] = 0, turned[d] = 0;
    center = a.key_center ? a.key_center + (a.sequences[g.first_block] * a.num_kv_heads + kv_head) * dim : none;
    for (Turned& set : sets) {
      set.columns = columns, set.packed = packed, set.shifts = free, set.offsets = (int32_t*)(free + rows);
      for (int64_t row = 0; row < rows; row++) set.shifts[row] = 0, set.offsets[row] = 0;
      columns += num_columns(rows, blocks), packed += bytes, free += 2 * rows;
    }
    places = (Place*)(none + width + 4 * rows + rows % 2);
    const Parts parts(rows, Key::kRows);
    for (int64_t p = 0; p < parts.count; p++)
      for (int64_t row = parts.begin(p); row < parts.begin(p + 1); row++) {
        const int64_t place = parts.begin(p) * blocks + row - parts.begin(p);
        places[row] = {place * kQueryBytes<Key>, parts.size(p) * kQueryBytes<Key>};
      }
    const Runs first(g, from), last(g, to - 1);
    for (int64_t n = 0; n < g.num_blocks; n++)
      for (int64_t v = 0; v < a.num_views; v++) {
        const float most = Key::kLargest > 0 ? amplitude_of(g, v, n, first.index[v], last.index[v]) : 1;
        for (int64_t h = 0; h < heads; h++) scale((n * heads + h) * a.num_views + v, n, h, most);
      }
  }

  void scale(int64_t row, int64_t block, int64_t head, float amplitude) {
    const ScoreArgs& a = g.a;
    const float* query = a.queries + ((g.first_block + block) * a.num_q_heads + kv_head * heads + head) * dim;
    float unit = 1;
    if constexpr (Key::kLargest > 0)
      unit = longest_pair(query, dim, a.half, a.interleaved) * amplitude * (1 / Key::kLargest);
    if (!(unit > 0)) unit = 1;
    for (int64_t d = 0; d < width; d += W)
      store(scaled + row * width + d, d < dim ? load<vf>(query + d) * (1 / unit) : vf{});
    units[row] = unit * a.scale * kUnitsOfLogit<Key>;
  }

  // Rotates the queries of a set for these runs, unless they are already.
  void turn(Turned& set, const Runs& runs) {
    const ScoreArgs& a = g.a;
    bool is_new = false;
    for (int64_t v = 0; v < a.num_views; v++) {
      const View& view = a.views[v];
      const int64_t mine = runs.index[v];
      if (set.run[v] == mine) continue;
      set.run[v] = mine, is_new = true;
      for (int64_t n = 0; n < g.num_blocks; n++) {
        const int64_t pair = g.row_of_run(v, n, mine) * a.half;
        turn(set, n * heads * a.num_views + v, view.cos + pair, view.sin + pair);
      }
    }
    if constexpr (kTiled<Key>)
      if (is_new) turn_queries<Key>(set.packed, g.head_rows, blocks, set.columns);
  }

  // One view of a block's heads; their rows lie `num_views` apart.
  void turn(Turned& set, int64_t first, const float* cos, const float* sin) {
    const bool usual = !g.a.interleaved && 2 * g.a.half == dim && g.a.half % W == 0;
    switch (usual ? g.a.half / W : 0) {
      case 2: return turn_heads<2>(set, first, cos, sin);
      case 4: return turn_heads<4>(set, first, cos, sin);
      default: return turn_heads<0>(set, first, cos, sin);
    }
  }

  template <int N>
  void turn_heads(Turned& set, int64_t first, const float* cos, const float* sin) {
    const int64_t step = g.a.num_views, end = first + heads * step;
    for (int64_t row = first; row < end; row += step) {
      const Place place = places[row];
      char* out = set.packed + place.first;
      vf along;
      if constexpr (N > 0) along = rotate<N>(scaled + row * width, cos, sin, center, out, place.stride);
      else along = rotate_any(scaled + row * width, cos, sin, out, place.stride);
      if constexpr (Key::size > 1) continue;
      set.shifts[row] = sum_of(along) * units[row];
      set.offsets[row] = Key::offset_of(out, blocks, place.stride);
    }
  }

  // The usual layout, 2 N vectors of which the second half belongs to the first: nothing is stored but what is packed.
  // Returns parts of the product with the center.
  template <int N>
  TS_INLINE vf rotate(const float* query, const float* cos, const float* sin, const float* center, char* out,
                      int64_t stride) {
    constexpr int kVectors = Key::kLoaded / W, kBlocks = (2 * N + kVectors - 1) / kVectors;
    vf turned[kBlocks * kVectors] = {}, along{};
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const vf x = load<vf>(query + i * W), y = load<vf>(query + (N + i) * W);
      const vf c = load<vf>(cos + i * W), s = load<vf>(sin + i * W);
      const vf low = x * c - y * s, high = y * c + x * s;
      turned[i] = low, turned[N + i] = high;
      if (Key::size == 1) along += low * load<vf>(center + i * W) + high * load<vf>(center + (N + i) * W);
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; b++) Key::pack(turned + b * kVectors, out + b * stride);
    return along;
  }

  // Any other layout: interleaved pairs, a part of the dimensions, other sizes.
  __attribute__((noinline)) vf rotate_any(const float* query, const float* cos, const float* sin, char* out,
                                          int64_t stride) {
    rotate_row(query, turned, cos, sin, g.a.half, g.a.interleaved);
    for (int64_t d = 2 * g.a.half; d < dim; d++) turned[d] = query[d];
    for (int64_t b = 0; b < blocks; b++) Key::pack((const vf*)(turned + b * Key::kLoaded), out + b * stride);
    vf along{};
    for (int64_t d = 0; Key::size == 1 && d < dim; d += W) along += load<vf>(turned + d) * load<vf>(center + d);
    return along;
  }
};

}  // namespace
}  // namespace tokenselect::TS_ISA
