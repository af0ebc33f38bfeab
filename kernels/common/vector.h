// Vectors of fp32 as wide as the processor's, in the portable form of GCC and clang; bf16 loads and stores; exp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalars.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return Floats(__builtin_convertvector(half, Bits) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// The bits of bf16, rounded half to even; NaN stays NaN.
inline Bits bits_of(Floats v) {
  const Bits bits = Bits(v);
  const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (v == v) ? rounded : Bits{} + 0x7FC0;
}

inline void store(BFloat16* p, Floats v) {
  const Halves half = __builtin_convertvector(bits_of(v), Halves);
  std::memcpy(p, &half, sizeof half);
}

// What a value becomes when it is stored as T.
template <class T>
inline Floats rounded(Floats v) {
  return Floats(bits_of(v) << 16);
}

template <>
inline Floats rounded<float>(Floats v) {
  return v;
}

inline float sum_of(Floats v) {
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// exp to 2 units in the last place (the polynomial of Cephes' expf); below -87.3 it is 1.2e-38. NaN stays NaN.
inline Floats exp_of(Floats x) {
  x = x < -87.33f ? Floats{} - 87.33f : x;
  x = x > 88.37f ? Floats{} + 88.37f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats finite = n == n ? n : Floats{};
  return p * Floats((__builtin_convertvector(finite, Ints) + 127) << 23);
}

}  // namespace
