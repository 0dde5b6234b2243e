// Root mean square normalisation of a few rows, rounded where the models round: before the weight and after it.
#include "simd.h"

namespace tokenselect::TS_ISA {

void rms_norm(const NormArgs& a) {
  float* row = (float*)scratch(0, a.size * sizeof(float));
  for (int64_t r = 0; r < a.rows; r++) {
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
}

}  // namespace tokenselect::TS_ISA
