// The int8 copy of keys that scoring may read: integers of -127 .. 127 and one scale per token and head. Keys are
// counted from a center: channels that are large in every token would else leave no bits for what differs.
#include "simd.h"

namespace tokenselect::TS_ISA {

void quantize_rows(const QuantizeArgs& a) {
  auto quantize = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t token = i / a.heads, head = i % a.heads, to = a.into ? a.into[token] : token;
      const int64_t key = (a.tokens ? a.tokens[token] : token) * a.keys.row_stride + head * a.keys.head_stride;
      const int64_t owner = a.owners ? a.owners[token] : 0;
      const float* center = a.centers ? a.centers + (owner * a.heads + head) * a.size : nullptr;
      int8_t* out = (int8_t*)a.out.data + to * a.out.row_stride + head * a.out.head_stride;
      auto load_key = [&](int64_t d) {
        const vf x = load_as_float(a.keys.data, key + d, a.keys.dtype);
        return center ? x - load<vf>(center + d) : x;
      };
      vf most{};
      for (int64_t d = 0; d < a.size; d += W) most = vmax(most, (vf)((vu)load_key(d) & 0x7fffffffu));
      const float largest = max_of(most), scale = (largest > 1e-30f ? largest : 1e-30f) / 127.0f;
      for (int64_t d = 0; d < a.size; d += W) {
        // 1.5 * 2^23 rounds to an integer in the low bits, ties to even
        const vf x = load_key(d) / scale + 12582912.0f;
        for (int j = 0; j < W; j++) out[d + j] = (int8_t)((vi)x)[j];
      }
      ((float*)a.scales.data)[to * a.scales.row_stride + head * a.scales.head_stride] = scale;
    }
  };
  parallel_for(a.count * a.heads, 512, quantize);
}

}  // namespace tokenselect::TS_ISA
