// Keys and values of new tokens go to their rows of a paged cache.
#include <cstring>

#include "kernels.h"

namespace tokenselect {

void store_rows(const WriteArgs& a) {
  const int64_t size = a.head_dim * (a.from[0].dtype == DType::f32 ? 4 : 2);
  auto at = [&](const Rows& rows, int64_t row, int64_t head) {
    return (char*)rows.data + (row * rows.row_stride + head * rows.head_stride) * (size / a.head_dim);
  };
  for (int64_t i = 0; i < a.count; i++) {
    if (a.slots[i] < 0) continue;  // padding
    for (int part = 0; part < 2; part++)
      for (int64_t h = 0; h < a.num_heads; h++)
        std::memcpy(at(a.to[part], a.slots[i], h), at(a.from[part], i, h), size);
  }
}

}  // namespace tokenselect
