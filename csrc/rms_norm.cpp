// Root mean square normalisation rounded where the models round: before the weight and after it.
#include "simd.h"

namespace tokenselect::TS_ISA {

static constexpr int64_t kLeastNumbers = 16384;  // below which a second thread costs more than it brings

void rms_norm(const NormArgs& a) {
  auto normalise = [&](int64_t from, int64_t to) {
    float* row = (float*)scratch(0, a.size * sizeof(float));
    for (int64_t r = from; r < to; r++) {
      const int64_t first = r * a.size;
      vf sum{};
      for (int64_t d = 0; d < a.size; d += W) {
        const vf x = load_as_float(a.input, first + d, a.dtype);
        store(row + d, x);
        sum += x * x;
      }
      const float factor = 1.0f / __builtin_sqrtf(sum_of(sum) / (float)a.size + a.epsilon);
      for (int64_t d = 0; d < a.size; d += W) {
        store_from_float(a.out, first + d, a.dtype, load<vf>(row + d) * factor);
        const vf rounded = load_as_float(a.out, first + d, a.dtype);
        store_from_float(a.out, first + d, a.dtype, rounded * load_as_float(a.weight, d, a.dtype));
      }
    }
  };
  parallel_for(a.rows, 1 + kLeastNumbers / a.size, normalise);
}

}  // namespace tokenselect::TS_ISA
