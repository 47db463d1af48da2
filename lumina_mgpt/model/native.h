// What the C++ files here share. AVX-512 F and BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr long FAR = 8192, NEAR = 1024;  // bytes ahead that are fetched into the second- and the first-level cache

inline void fetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from) + FAR, _MM_HINT_T1);
  _mm_prefetch(static_cast<const char*>(from) + NEAR, _MM_HINT_T0);
}

inline __m512 sixteen(const uint16_t* bf16) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 sixteen(const int8_t* numbers) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers))));
}

inline void store_sixteen(uint16_t* bf16, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers)));
}
