// Values that would make a kernel read or write outside its arguments are refused by name, once per call, on the calling
// thread. Shapes and dtypes have been checked before (tensor.h, bindings.cpp).
#pragma once

#include "kernels.h"

namespace tokenselect {

// How long the arrays are that the arguments point into.
struct ScoreSizes {
  int64_t sequences, votes, runs[kMaxViews];
};

struct AttentionSizes {
  int64_t queries, slots, positions;
};

void check_values(const ScoreArgs&, const ScoreSizes&);
void check_values(const TopkArgs&, int64_t num_votes);
void check_values(const PoolArgs&, int64_t num_queries, int64_t positions);
void check_values(const AttentionArgs&, const AttentionSizes&);
void check_values(const WriteArgs&);
void check_values(const QuantizeArgs&, int64_t num_centers);
void check_values(const SlotsArgs&, int64_t num_sequences, int64_t num_slots);
void check_values(const RangesArgs&, int64_t num_sequences, int64_t num_slots);

// Heads that the kernels take: whole groups of vectors of 16, pairs that fit in.
void check_heads(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t half);

}  // namespace tokenselect
