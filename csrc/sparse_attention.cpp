// Attention over the chosen rows at re-indexed positions: the i-th attended row is rotated to position i.
#include "few_rows.h"
#include "many_rows.h"

namespace tokenselect::TS_ISA {

void sparse_attention(const AttentionArgs& a) {
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  auto is_small = [&](int64_t b) { return (a.query_start_loc[b + 1] - a.query_start_loc[b]) * group <= kFewRows; };
  for (int64_t block = 0; block < a.num_blocks;) {
    int64_t next = block;
    while (next < a.num_blocks && is_small(next)) next++;
    if (next > block) {
      attend_small_blocks(a, block, next);
      block = next;
      continue;
    }
    switch (a.dtype) {
      case DType::bf16: attend_large_block<HalfProducts, DType::bf16>(a, block); break;
      case DType::f16: attend_large_block<Floats, DType::f16>(a, block); break;
      default: attend_large_block<Floats, DType::f32>(a, block); break;
    }
    block++;
  }
}

}  // namespace tokenselect::TS_ISA
