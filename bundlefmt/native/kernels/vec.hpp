// A vector of floats as wide as the instruction set that this file is compiled for, and how stored
// numbers become one. Arithmetic is the compiler's (vector extensions, so NEON comes by itself);
// conversions are written out, since compilers make slow code of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec broadcast(float number) { return Vec{} + number; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += v[i];
  return total;
#endif
}

#if defined(__AVX512F__)

inline Vec from_f16(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline Vec from_bf16(const uint8_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline Vec from_i8(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// 16 bytes hold number i in their low nibbles and number 16 + i in their high ones, each 8 too
// large. A permutation looks at the low four bits only, so it is the table lookup for both.
inline void from_nibbles(const uint8_t* from, float scale, Vec* to) {
  const __m512 levels = _mm512_mul_ps(
      _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_ps(scale));
  const __m512i bytes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  to[0] = _mm512_permutexvar_ps(bytes, levels);
  to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
}

#elif defined(__AVX2__)

inline Vec from_f16(const uint8_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline Vec from_bf16(const uint8_t* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline Vec from_i8(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

inline void from_nibbles(const uint8_t* from, float scale, Vec* to) {
  const __m256i low_bits = _mm256_set1_epi32(15);
  const __m256 eight = _mm256_set1_ps(8);
  const __m256 factor = _mm256_set1_ps(scale);
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * half)));
    const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, low_bits));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
    to[half] = _mm256_mul_ps(_mm256_sub_ps(low, eight), factor);
    to[2 + half] = _mm256_mul_ps(_mm256_sub_ps(high, eight), factor);
  }
}

#else

typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

// Sign, exponent and mantissa move to their float32 places, the bias (127 - 15) is put right by a
// product, which normalises subnormals too; infinities and NaN get the exponent that they lack.
inline Vec from_f16(const uint8_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits);
  const Bits fields = ((bits & 0x8000) << 16) | ((bits & 0x7FFF) << 13);
  const Bits rebiased = reinterpret_cast<Bits>(reinterpret_cast<Vec>(fields) * 0x1p112F);
  const Bits special = reinterpret_cast<Bits>((bits & 0x7C00) == 0x7C00);
  return reinterpret_cast<Vec>(rebiased | (special & 0x7F800000));
}

inline Vec from_bf16(const uint8_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

inline Vec from_i8(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
}

inline void from_nibbles(const uint8_t* from, float scale, Vec* to) {
  typedef uint8_t Packed __attribute__((vector_size(WIDTH)));
  for (int part = 0; part < 16 / WIDTH; ++part) {
    Packed packed;
    std::memcpy(&packed, from + part * WIDTH, sizeof packed);
    const Vec low = __builtin_convertvector(packed & 15, Vec);
    const Vec high = __builtin_convertvector(packed >> 4, Vec);
    to[part] = (low - 8) * scale;
    to[16 / WIDTH + part] = (high - 8) * scale;
  }
}

#endif

// The scale of a block: one f16.
inline float scale_of(const uint8_t* block) {
#if defined(__AVX2__)
  uint16_t half;
  std::memcpy(&half, block, sizeof half);
  return _cvtsh_ss(half);
#else
  uint8_t halves[2 * WIDTH] = {block[0], block[1]};
  return from_f16(halves)[0];
#endif
}

}  // namespace
