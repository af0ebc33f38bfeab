// Products of a few tokens with int8 weights: each weight is read once for up to four tokens, sums are exact int32.
//
// y[m, n] = token_scale[m] * sum over groups of scale[n, g] * (sum over the group of x[m, k] * w[n, k])

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX2__
inline __m256i widened(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline int32_t total_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
#endif

// Sums of products of one row of weights with COUNT rows of codes, `stride` apart.
template <int COUNT>
inline void dot(const int8_t* a, int64_t stride, const int8_t* b, int64_t size, int32_t* sums) {
  int64_t k = 0;
  for (int m = 0; m < COUNT; ++m) sums[m] = 0;
#ifdef __AVX2__
  __m256i even[COUNT], odd[COUNT];
  for (int m = 0; m < COUNT; ++m) even[m] = odd[m] = _mm256_setzero_si256();
  for (; k + 32 <= size; k += 32) {
    const __m256i low = widened(b + k), high = widened(b + k + 16);
    for (int m = 0; m < COUNT; ++m) {
      even[m] = _mm256_add_epi32(even[m], _mm256_madd_epi16(low, widened(a + m * stride + k)));
      odd[m] = _mm256_add_epi32(odd[m], _mm256_madd_epi16(high, widened(a + m * stride + k + 16)));
    }
  }
  for (int m = 0; m < COUNT; ++m) sums[m] = total_of(_mm256_add_epi32(even[m], odd[m]));
#endif
  for (; k < size; ++k) {
    for (int m = 0; m < COUNT; ++m) sums[m] += int32_t(a[m * stride + k]) * b[k];
  }
}

constexpr int TOKENS = 4;

template <int COUNT>
void row(const int8_t* x, const float* token_scale, const int8_t* w, const float* scale, float* y, int64_t n,
         int64_t features, int64_t group, int64_t stride) {
  float total[COUNT] = {};
  int32_t sums[COUNT];
  for (int64_t begin = 0, g = 0; begin < features; begin += group, ++g) {
    dot<COUNT>(x + begin, features, w + n * features + begin, group, sums);
    for (int m = 0; m < COUNT; ++m) total[m] += float(sums[m]) * scale[g];
  }
  for (int m = 0; m < COUNT; ++m) y[m * stride + n] = total[m] * token_scale[m];
}

}  // namespace

extern "C" {

// x: [tokens, features]; w: [rows, features]; scale: [rows, features / group]; y: fp32 [tokens, rows].
void qatapult_decode(const int8_t* x, const float* token_scale, const int8_t* w, const float* scale, float* y,
                     int64_t tokens, int64_t rows, int64_t features, int64_t group, int threads) {
  const int64_t groups = features / group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t m = 0; m < tokens; m += TOKENS) {
      const int64_t count = tokens - m < TOKENS ? tokens - m : TOKENS;
      auto run = count == 1 ? row<1> : count == 2 ? row<2> : count == 3 ? row<3> : row<TOKENS>;
      run(x + m * features, token_scale + m, w, scale + n * groups, y + m * rows, n, features, group, rows);
    }
  }
}
}
