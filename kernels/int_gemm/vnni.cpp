// Integer products by AVX512-VNNI: 4-bit codes are unpacked in registers or in the cache, sums are exact int32.
//
// y[m, n] = token_scale[m] * sum over groups of scale[g, n] * (sum over the group of x[m, k] * (q[n, k] - shift[g, n]))
//
// Codes are stored unsigned, u = q + 8 or q + 128, because `vpdpbusd` multiplies unsigned by signed bytes; what that adds is
// taken back by the sum of the token's codes. Weights lie in tiles of 16 rows: a block of 8 columns is 16 rows of 4
// codes, and then the next 4 columns of the same rows, as 128 bytes, or with the latter in the high nibbles, as 64.

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#include "buffer.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_CALL __attribute__((always_inline))

namespace {

// Calls f(0) ... f(N - 1) with constants. Loops over tokens and tiles are written so because their sums must be in
// registers: with loops that are unrolled later, GCC leaves the arrays in memory.
template <int N, class Call>
INLINE void times(const Call& f) {
  if constexpr (N > 0) {
    times<N - 1>(f);
    f(std::integral_constant<int, N - 1>());
  }
}

constexpr int ROWS = 16;   // of weights in a tile: the int32 lanes of a register
constexpr int STEP = 8;    // columns of a block
constexpr int TOKENS = 6;  // 6 tokens x 4 tiles of sums, 4 registers of weights and 2 of activations are 30 of 32
constexpr int CHUNK = 96;  // tokens for which a panel of weights is unpacked once

using Quantizer = void (*)(int dtype, const void* x, void* out, int8_t* codes, float* scales, float* zeros,
                           int64_t rows, int64_t size, int qmin, int qmax, float offset, float steps, int stored,
                           int symmetric, int threads);

struct Weight {  // as `Weight` in vnni.py
  const uint8_t* codes;
  const float *scale, *shift, *bias;
  int64_t rows, features, groups;
  Quantizer quantizer;  // of the tokens (of fake_quant.cpp)
  int32_t nibbles, qmin, qmax, stored;
  float steps;

  int zero() const { return nibbles ? 8 : 128; }  // the stored code of 0
  int64_t padded() const { return (features + STEP - 1) / STEP * STEP; }
  int64_t group() const { return padded() / groups; }
};

struct Input {
  const int8_t* codes;   // [tokens, features]
  const int32_t* sums;   // [tokens, groups], of the codes
  const float* scale;    // [tokens]
};

struct Output {
  void* values;
  int dtype;  // 0 fp32, 1 bf16, 2 fp16
};

inline __m512i broadcast(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// sums += products of unsigned and signed bytes. As an intrinsic, GCC 12 keeps the sums in memory.
INLINE void multiply_add(__m512i& sums, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
}

inline void unpacked(const uint8_t* block, __m512i& first, __m512i& second) {
  const __m512i both = _mm512_loadu_si512(block), low = _mm512_set1_epi8(15);
  first = _mm512_and_si512(both, low);
  second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
}

// Adds the products of 4 columns for MR tokens and NR tiles.
template <int MR, int NR>
INLINE void add(const int8_t* x, int64_t features, const __m512i (&w)[NR], __m512i (&sums)[MR][NR]) {
  times<MR>([&](auto m) INLINE_CALL {
    const __m512i four = broadcast(x + m * features);
    times<NR>([&](auto n) INLINE_CALL { multiply_add(sums[m][n], w[n], four); });
  });
}

// Adds the products of `blocks` blocks of columns.
template <int MR, int NR, bool NIBBLES>
INLINE void multiply(const int8_t* x, int64_t features, const uint8_t* w, int64_t tile, int64_t blocks,
                     __m512i (&sums)[MR][NR]) {
  if constexpr (NIBBLES) {
    for (int64_t b = 0; b < blocks; ++b, x += STEP, w += 64) {
      __m512i first[NR], second[NR];
      times<NR>([&](auto n) INLINE_CALL { unpacked(w + n * tile, first[n], second[n]); });
      add<MR, NR>(x, features, first, sums);
      add<MR, NR>(x + 4, features, second, sums);
    }
  } else {
    for (int64_t half = 0; half < 2 * blocks; ++half, x += STEP / 2, w += 64) {
      __m512i four[NR];
      times<NR>([&](auto n) INLINE_CALL { four[n] = _mm512_loadu_si512(w + n * tile); });
      add<MR, NR>(x, features, four, sums);
    }
  }
}

inline __mmask16 lanes(int64_t left) { return left >= ROWS ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1; }

// Round half to even; NaN stays NaN.
inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store(const Output& out, int64_t at, __m512 v, __mmask16 mask) {
  if (out.dtype == 0) return _mm512_mask_storeu_ps(static_cast<float*>(out.values) + at, mask, v);
  const __m256i half = out.dtype == 1 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.values) + at, mask, half);
}

// Values of 16 rows from a table [groups, rows].
inline __m512 loaded(const float* table, int64_t rows, int64_t group, int64_t row) {
  return _mm512_maskz_loadu_ps(lanes(rows - row), table + group * rows + row);
}

// What unsigned codes and zero points add to the sums, taken back.
inline __m512i correction(const Weight& weight, int32_t sum, int64_t group, int64_t row) {
  if (!weight.shift) return _mm512_set1_epi32(-weight.zero() * sum);
  const __m512i shift = _mm512_cvtps_epi32(loaded(weight.shift, weight.rows, group, row));
  return _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(-weight.zero()), shift), _mm512_set1_epi32(sum));
}

// MR tokens from `token` on, NR tiles from row `row` on; `w` is the first of these tiles.
template <int MR, int NR, bool NIBBLES>
void tile(const Weight& weight, const Input& in, const Output& out, const uint8_t* w, int64_t token, int64_t row) {
  const int64_t features = weight.padded(), group = weight.group(), blocks = group / STEP, groups = weight.groups;
  constexpr int64_t bytes = NIBBLES ? 64 : 128;
  const int64_t stride = features / STEP * bytes;
  const int8_t* x = in.codes + token * features;
  __m512 total[MR][NR];
  times<MR>([&](auto m) INLINE_CALL { times<NR>([&](auto n) INLINE_CALL { total[m][n] = _mm512_setzero_ps(); }); });
  for (int64_t g = 0; g < groups; ++g) {
    __m512i sums[MR][NR];
    times<MR>([&](auto m) INLINE_CALL {
      const int32_t sum = in.sums[(token + m) * groups + g];
      times<NR>([&](auto n) INLINE_CALL { sums[m][n] = correction(weight, sum, g, row + n * ROWS); });
    });
    multiply<MR, NR, NIBBLES>(x + g * group, features, w + g * blocks * bytes, stride, blocks, sums);
    times<NR>([&](auto n) INLINE_CALL {
      const __m512 scale = loaded(weight.scale, weight.rows, g, row + n * ROWS);
      times<MR>([&](auto m) INLINE_CALL {
        total[m][n] = _mm512_add_ps(total[m][n], _mm512_mul_ps(_mm512_cvtepi32_ps(sums[m][n]), scale));
      });
    });
  }
  times<NR>([&](auto n) INLINE_CALL {
    const int64_t first = row + n * ROWS;
    times<MR>([&](auto m) INLINE_CALL {
      __m512 y = _mm512_mul_ps(total[m][n], _mm512_set1_ps(in.scale[token + m]));
      if (weight.bias) y = _mm512_add_ps(y, loaded(weight.bias, weight.rows, 0, first));
      store(out, (token + m) * weight.rows + first, y, lanes(weight.rows - first));
    });
  });
}

// `count` tokens, TOKENS at a time.
template <int NR, bool NIBBLES>
void tokens(const Weight& weight, const Input& in, const Output& out, const uint8_t* w, int64_t token, int64_t count,
            int64_t row) {
  static constexpr decltype(&tile<1, NR, NIBBLES>) run[] = {
      tile<1, NR, NIBBLES>, tile<2, NR, NIBBLES>, tile<3, NR, NIBBLES>,
      tile<4, NR, NIBBLES>, tile<5, NR, NIBBLES>, tile<TOKENS, NR, NIBBLES>};
  for (int64_t end = token + count; token < end; token += TOKENS) {
    run[(end - token < TOKENS ? end - token : TOKENS) - 1](weight, in, out, w, token, row);
  }
}

// Few tokens: weights are unpacked in registers and every byte of them is read once.
void few(const Weight& weight, const Input& in, const Output& out, int64_t count, int threads) {
  const int64_t tile = weight.padded() / STEP * (weight.nibbles ? 64 : 128);
  const int64_t pairs = (weight.rows + 2 * ROWS - 1) / (2 * ROWS);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < pairs; ++p) {
    auto run = weight.nibbles ? tokens<2, true> : tokens<2, false>;
    run(weight, in, out, weight.codes + 2 * p * tile, 0, count, 2 * p * ROWS);
  }
}

// Many tokens: four tiles at a time become bytes in the cache and meet a chunk of tokens.
void many(const Weight& weight, const Input& in, const Output& out, int64_t count, int threads) {
  const int64_t blocks = weight.padded() / STEP, tiles = (weight.rows + 2 * ROWS - 1) / (2 * ROWS) * 2;
  const int64_t panels = (tiles + 3) / 4, chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> panel(weight.nibbles ? 4 * blocks * 128 : 0);
    int64_t held = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * chunks; ++task) {
      const int64_t first = task / chunks * 4, token = task % chunks * CHUNK;
      const int64_t wide = tiles - first < 4 ? tiles - first : 4;
      const uint8_t* w = weight.codes + first * blocks * 128;
      if (weight.nibbles) {
        if (held != first) {
          for (int64_t b = 0; b < wide * blocks; ++b) {
            __m512i low, high;
            unpacked(weight.codes + (first * blocks + b) * 64, low, high);
            _mm512_storeu_si512(panel.data() + b * 128, low);
            _mm512_storeu_si512(panel.data() + b * 128 + 64, high);
          }
          held = first;
        }
        w = panel.data();
      }
      auto run = wide == 4 ? tokens<4, false> : tokens<2, false>;
      run(weight, in, out, w, token, count - token < CHUNK ? count - token : CHUNK, first * ROWS);
    }
  }
}

}  // namespace

extern "C" {

int qatapult_vnni_available() { return 1; }

// codes: int8 [rows, features]; out: uint8 [tiles, blocks, 64 or 128], zeroed, `tiles` even.
void qatapult_vnni_pack(const int8_t* codes, uint8_t* out, int64_t rows, int64_t features, int nibbles, int threads) {
  const int64_t blocks = (features + STEP - 1) / STEP, bytes = nibbles ? 64 : 128;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < rows; first += ROWS) {
    for (int64_t n = first; n < rows && n < first + ROWS; ++n) {
      const int8_t* own = codes + n * features;
      uint8_t* to = out + first / ROWS * blocks * bytes + (n - first) * 4;
      for (int64_t b = 0; b < blocks; ++b, to += bytes) {
        for (int64_t k = b * STEP; k < features && k < (b + 1) * STEP; ++k) {
          const uint8_t u = uint8_t(own[k] + (nibbles ? 8 : 128));
          const int64_t at = k % 4, high = k % STEP / 4;
          if (nibbles) to[at] |= uint8_t(high ? u << 4 : u);
          else to[at + 64 * high] = u;
        }
      }
    }
  }
}

// y[count, rows] of x[count, features]; x is quantized as the weight says, or int8 codes (dtype -1) with `token_scale`.
void qatapult_vnni_linear(const Weight* weight, const void* x, int x_dtype, const float* token_scale, int64_t count,
                          void* y, int y_dtype, int threads) {
  thread_local std::vector<int8_t> own, wide;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> sums;
  const int64_t features = weight->features, padded = weight->padded(), group = weight->group();
  const int8_t* from = static_cast<const int8_t*>(x);
  if (x_dtype >= 0) {
    int8_t* const codes = room(own, count * features);
    float* const scale = room(scales, count);
    weight->quantizer(x_dtype, x, nullptr, codes, scale, nullptr, count, features, weight->qmin,
                      weight->qmax, 0, weight->steps, weight->stored, 1, count > TOKENS ? threads : 1);
    from = codes;
    token_scale = scale;
  }
  if (padded != features) {
    wide.assign(count * padded, 0);
    for (int64_t m = 0; m < count; ++m) std::memcpy(wide.data() + m * padded, from + m * features, features);
    from = wide.data();
  }
  const int64_t groups = count * weight->groups;
  int32_t* const totals = room(sums, groups);
#pragma omp parallel for num_threads(count > TOKENS ? threads : 1) schedule(static)
  for (int64_t i = 0; i < groups; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; ++k) sum += from[i * group + k];
    totals[i] = sum;
  }
  const Input in{from, totals, token_scale};
  (count > TOKENS ? many : few)(*weight, in, Output{y, y_dtype}, count, threads);
}
}

#else

extern "C" int qatapult_vnni_available() { return 0; }

#endif
