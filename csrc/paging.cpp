// What a paged cache needs beside attention: new tokens written to their rows, and rows of chosen positions found.
#include <cstring>

#include "kernels.h"

namespace tokenselect {

void store_rows(const WriteArgs& a) {
  const int64_t bytes = bytes_of(a.from[0].dtype);
  auto at = [&](const Rows& rows, int64_t row, int64_t head) {
    return (char*)rows.data + (row * rows.row_stride + head * rows.head_stride) * bytes;
  };
  for (int64_t i = 0; i < a.count; i++) {
    if (a.slots[i] < 0) continue;  // padding
    for (int part = 0; part < 2; part++)
      for (int64_t h = 0; h < a.num_heads; h++)
        std::memcpy(at(a.to[part], a.slots[i], h), at(a.from[part], i, h), a.head_dim * bytes);
  }
}

void store_slots(const SlotsArgs& a) {
  for (int64_t b = 0; b < a.num_blocks; b++) {
    const int64_t sequence = a.sequences[b], *own = a.pages.pages + sequence * a.pages.max_pages;
    for (int64_t i = 0; i < a.k; i++) {
      const int64_t at = a.chosen[b * a.k + i] + a.pages.padding[sequence];
      a.slots[a.places[b] + i] = own[at / a.pages.page_size] * a.pages.page_size + at % a.pages.page_size;
    }
  }
}

void store_ranges(const RangesArgs& a) {
  int64_t* out = a.slots;
  for (int64_t i = 0; i < a.num_ranges; i++) {
    const int64_t sequence = a.ranges[3 * i], from = a.ranges[3 * i + 1], to = a.ranges[3 * i + 2];
    if (sequence < 0) std::memset(out, 0, (to - from) * sizeof(int64_t));
    else rows_of(a.pages, sequence, from, to, out);
    out += to - from;
  }
}

}  // namespace tokenselect
