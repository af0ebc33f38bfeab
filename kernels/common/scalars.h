// Numbers of the dtypes that the CPU paths read and write, one at a time; compilers vectorise loops over them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

template <class T>
inline T store(float x) {
  return T(x);
}

template <>
inline BFloat16 store<BFloat16>(float x) {  // rounds half to even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded)};
}

// Calls a function with a value of the dtype: 0 fp32, 1 bf16.
template <class Call>
inline void with_fp32_or_bf16(int dtype, const Call& call) {
  if (dtype == 0) call(float());
  if (dtype == 1) call(BFloat16());
}

}  // namespace
