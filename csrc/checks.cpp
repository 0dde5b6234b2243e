#include "checks.h"

#include "tensor.h"

namespace tokenselect {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) refuse(name, "between " + text(least) + " and " + text(most), text(value));
}

// Bounds of the blocks in an array of `count`.
void check_bounds(const char* name, const int64_t* bounds, int64_t num_blocks, int64_t count) {
  for (int64_t i = 0, least = 0; i <= num_blocks; least = bounds[i++]) check_range(name, bounds[i], least, count);
}

// One pass without branches: thousands of indices are checked in less than a microsecond.
void check_indices(const char* name, const int64_t* indices, int64_t n, int64_t count) {
  const uint64_t last = (uint64_t)count - 1;
  uint64_t outside = 0;
  for (int64_t i = 0; i < n; i++) outside |= (uint64_t)indices[i] | (last - (uint64_t)indices[i]);
  if (outside >> 63)
    for (int64_t i = 0; i < n; i++) check_range(name, indices[i], 0, count - 1);
}

// The pages that hold the positions from .. to - 1.
void check_pages(const Pages& p, int64_t sequence, int64_t from, int64_t to, int64_t rows) {
  const int64_t* own = p.pages + sequence * p.max_pages;
  const int64_t first = from + p.padding[sequence], last = to + p.padding[sequence] - 1;
  if (last < first) return;
  if (p.max_pages == 1) {
    check_range("pages", own[0], 0, (rows - 1) / p.page_size);
    return check_range("context", own[0] * p.page_size + last, 0, rows - 1);
  }
  check_range("context", last / p.page_size, 0, p.max_pages - 1);
  for (int64_t page = first / p.page_size; page <= last / p.page_size; page++)
    check_range("pages", own[page], 0, rows / p.page_size - 1);
}

void check_spans(const ScoreArgs& a, int64_t block) {
  const int64_t *candidates = a.candidates + 2 * block, *context = a.context + 2 * block;
  constexpr int64_t kMost = int64_t(1) << 40;  // far from where sums of positions overflow
  check_range("candidates", candidates[0], 0, kMost);
  check_range("candidates", candidates[1], candidates[0], kMost);
  check_range("context", context[0], 0, candidates[0]);
  check_range("context", context[1], candidates[1], kMost);
  check_range("start_loc", a.start_loc[block + 1] - a.start_loc[block], candidates[1] - candidates[0],
              candidates[1] - candidates[0]);
}

void check_view(const View& view, const ScoreArgs& a, int64_t rows) {
  check_range("run_size", view.run_size, 1, INT64_MAX);
  check_bounds("run_start_loc", view.run_start_loc, a.num_blocks, rows);
  for (int64_t b = 0; b < a.num_blocks; b++) {
    const int64_t runs = view.run_start_loc[b + 1] - view.run_start_loc[b];
    check_range("runs of a block", runs, 1, rows);
    if (view.alike) check_range("alike", view.alike[b], 0, runs);
  }
}

}  // namespace

void check_heads(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t half) {
  if (num_kv_heads < 1 || num_q_heads < 1 || num_q_heads % num_kv_heads)
    refuse("num_q_heads", "a multiple of num_kv_heads (" + text(num_kv_heads) + ")", text(num_q_heads));
  if (head_dim % 16 || head_dim < 16 || head_dim > 256)
    refuse("head_dim", "a multiple of 16 up to 256", text(head_dim));
  check_range("rotary_dim / 2", half, 0, head_dim / 2);
}

void check_values(const ScoreArgs& a, const ScoreSizes& sizes) {
  check_range("page_size", a.pages.page_size, 1, int64_t(1) << 40);
  for (int64_t s = 0; s < sizes.sequences; s++) check_range("padding", a.pages.padding[s], 0, int64_t(1) << 40);
  for (int64_t v = 0; v < a.num_views; v++) check_view(a.views[v], a, sizes.runs[v]);
  int64_t from = 0, to = 0;  // checked already, of the sequence of the block before
  for (int64_t b = 0; b < a.num_blocks; b++) {
    const int64_t sequence = a.sequences[b], begin = a.context[2 * b], end = a.context[2 * b + 1];
    check_range("sequences", sequence, 0, sizes.sequences - 1);
    check_spans(a, b);
    const bool goes_on = b && sequence == a.sequences[b - 1] && begin >= from && begin <= to;
    check_pages(a.pages, sequence, goes_on ? to : begin, end, a.keys.count);
    if (!goes_on) from = begin;
    to = goes_on && to > end ? to : end;
  }
  check_bounds("start_loc", a.start_loc, a.num_blocks, sizes.votes);
}

void check_values(const TopkArgs& a, int64_t num_votes) {
  check_bounds("start_loc", a.start_loc, a.num_blocks, num_votes);
  for (int64_t b = 0; b < a.num_blocks; b++) check_range("k", a.k, 1, a.start_loc[b + 1] - a.start_loc[b]);
}

void check_values(const PoolArgs& a, int64_t num_queries, int64_t positions) {
  for (int64_t b = 0; b < a.num_blocks; b++) {
    check_range("starts", a.starts[b], 0, num_queries);
    check_range("counts", a.counts[b], 1, num_queries - a.starts[b]);
    check_range("counts", a.counts[b], 1, positions);
  }
}

void check_values(const AttentionArgs& a, const AttentionSizes& sizes) {
  check_bounds("query_start_loc", a.query_start_loc, a.num_blocks, sizes.queries);
  check_bounds("slot_start_loc", a.slot_start_loc, a.num_blocks, sizes.slots);
  if (a.num_blocks > 0) check_range("query_start_loc", a.query_start_loc[0], 0, 0);  // no row before it is written
  for (int64_t b = 0; b < a.num_blocks; b++) {
    const int64_t own = a.query_start_loc[b + 1] - a.query_start_loc[b];
    const int64_t attended = a.slot_start_loc[b + 1] - a.slot_start_loc[b];
    if (attended < own) refuse("slots of a block", "at least its " + text(own) + " queries", text(attended));
    if (attended > sizes.positions) refuse("cos", "of at least " + text(attended) + " rows", text(sizes.positions));
  }
  const int64_t rows = a.keys.count < a.values.count ? a.keys.count : a.values.count;
  if (a.num_blocks > 0)
    check_indices("slots", a.slots + a.slot_start_loc[0], a.slot_start_loc[a.num_blocks] - a.slot_start_loc[0], rows);
}

void check_values(const QuantizeArgs& a, int64_t num_centers) {
  check_indices("tokens", a.tokens, a.count, a.keys.count);
  check_indices("owners", a.owners, a.count, num_centers);
  check_indices("into", a.into, a.count, a.out.count);
}

void check_values(const SlotsArgs& a, int64_t num_sequences, int64_t num_slots) {
  check_range("page_size", a.pages.page_size, 1, int64_t(1) << 40);
  check_indices("sequences", a.sequences, a.num_blocks, num_sequences);
  for (int64_t b = 0; b < a.num_blocks; b++) {
    check_range("places", a.places[b], 0, num_slots - a.k);
    const int64_t padding = a.pages.padding[a.sequences[b]];
    check_range("padding", padding, 0, a.pages.page_size);
    check_indices("chosen", a.chosen + b * a.k, a.k, a.pages.max_pages * a.pages.page_size - padding);
  }
}

void check_values(const RangesArgs& a, int64_t num_sequences, int64_t num_slots) {
  check_range("page_size", a.pages.page_size, 1, int64_t(1) << 40);
  int64_t left = num_slots;
  for (int64_t i = 0; i < a.num_ranges; i++) {
    const int64_t sequence = a.ranges[3 * i], from = a.ranges[3 * i + 1], to = a.ranges[3 * i + 2];
    check_range("sequences", sequence, -1, num_sequences - 1);
    check_range("ranges", from, 0, to);
    check_range("positions of all ranges", to - from, 0, left);
    left -= to - from;
    if (sequence < 0) continue;
    check_range("padding", a.pages.padding[sequence], 0, a.pages.page_size);
    check_range("ranges", to, 0, a.pages.max_pages * a.pages.page_size - a.pages.padding[sequence]);
  }
  check_range("slots", num_slots, num_slots - left, num_slots - left);
}

void check_values(const WriteArgs& a) {
  check_range("slots", a.count, 0, a.from[0].count);
  const int64_t rows = a.to[0].count < a.to[1].count ? a.to[0].count : a.to[1].count;
  for (int64_t i = 0; i < a.count; i++) check_range("slots", a.slots[i], -1, rows - 1);
}

}  // namespace tokenselect
