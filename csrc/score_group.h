// What scores together, and what is known of it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tokenselect::TS_ISA {
namespace {

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
  int64_t chunks, length;    // chunks of keys; weights from a row to the next, not a power of two
  Stats* stats;              // [rows, chunks]
  int64_t run_size[kMaxViews];  // keys that share a rotation: all of them where a view has one run
  int64_t alike[kMaxViews];     // so many first runs of all blocks share one, and count as one
  void* weights;             // [rows, length] exponentials: half precision, or float for float keys

  // Row of the view's tables for a block's run `i`; its last one goes on for all that follows.
  int64_t row_of_run(int64_t v, int64_t block, int64_t i) const {
    const int64_t* runs = a.views[v].run_start_loc + first_block + block;
    return runs[0] + i < runs[1] ? runs[0] + i : runs[1] - 1;
  }
};

// The run of each view that a position lies in; of runs that are alike the last stands for all.
struct Runs {
  int64_t index[kMaxViews], end[kMaxViews];  // its number, and the position where it ends

  Runs(const Group& g, int64_t at) {
    for (int64_t v = 0; v < g.a.num_views; v++) {
      index[v] = (at - g.begin) / g.run_size[v];
      if (index[v] < g.alike[v]) index[v] = g.alike[v] - 1;
      end[v] = g.begin + (index[v] + 1) * g.run_size[v];
    }
  }

  // The first position from here on that lies in another run, of any view, or `stop`.
  int64_t until(const Group& g, int64_t stop) const {
    for (int64_t v = 0; v < g.a.num_views; v++) stop = end[v] < stop ? end[v] : stop;
    return stop;
  }

  void move(const Group& g, int64_t at) {
    for (int64_t v = 0; v < g.a.num_views; v++)
      if (end[v] <= at) index[v]++, end[v] += g.run_size[v];
  }
};

}  // namespace
}  // namespace tokenselect::TS_ISA
