// int32 sums of an integer product -> scaled values with bias, in one pass over memory.

#include <cstdint>

#include "scalars.h"

namespace {

template <class T>
void scaled(const int32_t* sums, const float* token_scale, const float* scale, const float* bias, T* out,
            int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* from = sums + row * columns;
    T* to = out + row * columns;
    const float own = token_scale[row];
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) to[i] = store<T>(float(from[i]) * scale[i] * own + bias[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) to[i] = store<T>(float(from[i]) * scale[i] * own);
    }
  }
}

}  // namespace

extern "C" {

// out[m, n] = sums[m, n] * scale[n] * token_scale[m] + bias[n]; dtype of out: 0 fp32, 1 bf16, 2 fp16; bias may be null.
void qatapult_scaled(int dtype, const int32_t* sums, const float* token_scale, const float* scale, const float* bias,
                     void* out, int64_t rows, int64_t columns, int threads) {
  if (dtype == 0) scaled(sums, token_scale, scale, bias, static_cast<float*>(out), rows, columns, threads);
  if (dtype == 1) scaled(sums, token_scale, scale, bias, static_cast<BFloat16*>(out), rows, columns, threads);
  if (dtype == 2) scaled(sums, token_scale, scale, bias, static_cast<_Float16*>(out), rows, columns, threads);
}
}
