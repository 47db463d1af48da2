// Declarations and helpers of the kernels. Needs AVX-512 F and BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr long FAR = 8192, NEAR = 1024;  // prefetch distances in bytes, to the second- and first-level cache

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

constexpr long OUTPUTS = 64;  // of a block in torch's packing: 32 bytes an input, each of outputs n and n + 32

// A matrix (outputs, K) of 4-bit numbers, packed by torch's _convert_weight_to_int4pack_for_cpu; `outputs` is a
// multiple of OUTPUTS. Shapes: scale_zero (outputs / 64, K / group, 64, 2) bf16; out (M, outputs) bf16.
struct Int4Matrix {
  const uint8_t* packed;
  const uint16_t* scale_zero;
  uint16_t* out;
  long outputs;
};

// Writes x @ W.T of `count` matrices to their `out`. x (M, K) is bf16; group is 32, 64 or 128.
void int4_amx(const uint16_t* x, const Int4Matrix* matrices, long count, long M, long K, long group, long threads);

// Writes x (M, K) @ (numbers * scale).T to out (M, N). numbers (N, K) is int8, all else bf16; N and K are multiples of
// 16.
void int8_rows(const uint16_t* x, const int8_t* numbers, const uint16_t* scale, uint16_t* out, long M, long N, long K,
               long threads);

// Attention of one query a row. query and out (B, N, H) are bf16; row b reads its first slots[b] slots. `row` and
// `apart` are the strides of the first two dimensions of keys and values (B, K, slots, H); `scale_row` and
// `scale_apart` are those of the scales (B, K, slots), which are null for bf16. H is 64 or 128.
void one_query(const uint16_t* query, const void* keys, const void* values, const float* key_scales,
               const float* value_scales, const int64_t* slots, uint16_t* out, long B, long N, long K, long H, long row,
               long apart, long scale_row, long scale_apart, float scale, long threads);
