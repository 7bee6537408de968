// float16 and bfloat16 in integer arithmetic: exact widening, rounding to nearest even, NaN kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../device/element.h"

namespace perfusion {

namespace host {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace host

inline float word_as_float(uint32_t word) { return host::float_of(word); }
inline uint32_t float_as_word(float x) { return host::bits_of(x); }

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return host::float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023u;
  if (exponent == 31) return host::float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return host::float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class Element>
Element from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = host::bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = host::bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and beyond round to infinity
  if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(host::float_of(size) * 0x1p24f)))};
  }
  return {static_cast<uint16_t>(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13)};
}

template <class Element>
uint32_t pack(float low, float high) {
  return from_float<Element>(low).bits | static_cast<uint32_t>(from_float<Element>(high).bits) << 16;
}

}  // namespace perfusion
