// The mean of a block's queries, each rotated by its place in the block: what votes for the block.
#include "simd.h"

namespace tokenselect::TS_ISA {

void pool_queries(const PoolArgs& a) {
  auto pool = [&](int64_t from, int64_t to) {
    float* row = (float*)scratch(0, a.head_dim * sizeof(float));
    for (int64_t i = from; i < to; i++) {
      const int64_t block = i / a.num_q_heads, head = i % a.num_q_heads, count = a.counts[block];
      float* sum = a.out + i * a.head_dim;
      __builtin_memset(sum, 0, a.head_dim * sizeof(float));
      for (int64_t t = 0; t < count; t++) {
        const int64_t first = ((a.starts[block] + t) * a.num_q_heads + head) * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d += W) store(row + d, load_as_float(a.queries, first + d, a.dtype));
        rotate_row(row, row, a.cos + t * a.half, a.sin + t * a.half, a.half, a.interleaved);
        for (int64_t d = 0; d < a.head_dim; d += W) store(sum + d, load<vf>(sum + d) + load<vf>(row + d));
      }
      for (int64_t d = 0; d < a.head_dim; d += W) store(sum + d, load<vf>(sum + d) * (1.0f / (float)count));
    }
  };
  parallel_for(a.num_blocks * a.num_q_heads, 1, pool);
}

}  // namespace tokenselect::TS_ISA
