// Declarations and helpers of the kernels. Needs AVX-512 F, BW and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

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

// Rounds to the nearest number of bf16, ties to even. Not the instruction of AVX512_BF16, which some processors lack.
inline __m512 rounded(__m512 numbers) {
  const __m512i bits = _mm512_castps_si512(numbers);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  const __m512i whole = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(_mm512_and_si512(whole, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline void store_sixteen(uint16_t* bf16, __m512 numbers) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(rounded(numbers)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), _mm512_cvtepi32_epi16(high));
}

inline void store_bytes(int8_t* to, __m512i numbers) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(numbers));
}

// Returns e^x for x <= 0 with an error of at most 3e-7: 2^n times the Taylor polynomial of degree 6 on
// [-ln 2 / 2, ln 2 / 2].
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-128.0f), x);  // below -128 the result is 0; this order of operands keeps NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

// Adds products of unsigned numbers and signed inputs, four in each lane. For the intrinsic _mm512_dpbusd_epi32, g++ 12
// copies each sum twice, and some to the stack.
inline void add_products(__m512i& sums, __m512i numbers, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(numbers), "v"(inputs));
}

// Numbers in two int8 parts: (256 high + low) * scale. `total` is the sum of 256 high + low.
struct Split {
  float scale;
  int32_t total;
};

// Splits `count` numbers, a multiple of 16. The error is at most 1/65000 of the largest number. Numbers below 1e-30 are
// taken as 0. If one is infinite or NaN, the scale is NaN.
inline Split split(const float* numbers, long count, int8_t* high, int8_t* low) {
  constexpr float LARGEST = 32639;  // 256 * 127 + 127
  __m512 largest = _mm512_setzero_ps(), invalid = _mm512_setzero_ps();
  for (long k = 0; k < count; k += 16) {
    const __m512 x = _mm512_loadu_ps(numbers + k);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    invalid = _mm512_fmadd_ps(x, _mm512_setzero_ps(), invalid);
  }
  const float most = _mm512_reduce_max_ps(largest);
  const bool zero = most < 1e-30f;
  const __m512 factor = _mm512_set1_ps(zero ? 0 : LARGEST / most);
  __m512i total = _mm512_setzero_si512();
  for (long k = 0; k < count; k += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(numbers + k), factor));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    store_bytes(high + k, upper);
    store_bytes(low + k, _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8)));
    total = _mm512_add_epi32(total, whole);
  }
  return {(zero ? 0 : most / LARGEST) + _mm512_reduce_add_ps(invalid), _mm512_reduce_add_epi32(total)};
}

constexpr long OUTPUTS = 64;  // of a block of a matrix

// A matrix (outputs, K) of 4-bit numbers; `outputs` is a multiple of OUTPUTS. Shapes: packed as `ops.blocked_numbers`
// returns it; scale_zero (outputs / 64, K / group, 64, 2) bf16; out (M, outputs) bf16.
struct Int4Matrix {
  const uint8_t* packed;
  const uint16_t* scale_zero;
  uint16_t* out;
  long outputs;
};

// Products of the rows x (M, K), in bf16, and `count` matrices, written to their `out`.
struct Int4Products {
  const uint16_t* x;
  const Int4Matrix* matrices;
  long count, M, K, group;   // group is 32, 64 or 128
  const uint16_t* norm;      // weights (K) of the RMS norm of x; null for no norm
  float eps;                 // of the norm
  bool gated;                // whether out of the first of two matrices is silu(first product) * second product
  const uint16_t* residual;  // (M, outputs), which is added to the product of a single matrix; null for none
  bool tiles;                // whether the processor has AMX
  long threads;
};
void int4_products(const Int4Products& call);

// AMX. A tile of sums has up to 16 rows of 16 int32 numbers.
constexpr long TILE = 16;
void configure_tiles(long rows, long group);
void release_tiles();
// Products of `rows` rows of int8 numbers in two parts, `apart` bytes apart, and two columns of 16 outputs. Shapes:
// columns (2, group / 4, 16, 4) uint8; sums (parts, columns, 16, 16).
void tile_sums(const int8_t* high, const int8_t* low, long apart, const uint8_t* columns, long group,
               int32_t sums[2][2][TILE][TILE]);

// Writes x (M, K) @ (numbers * scale).T to out (M, N). numbers (N, K) is int8, all else bf16; N and K are multiples of
// 16.
void int8_rows(const uint16_t* x, const int8_t* numbers, const uint16_t* scale, uint16_t* out, long M, long N, long K,
               long threads);

// One layer's keys and values (rows, heads, slots, H) of a KV cache: bf16, or int8 with scales (rows, heads, slots).
struct Store {
  void *keys, *values;
  float *key_scales, *value_scales;  // null for bf16
  long slots;
};

// Weights (weight_rows, H) and biases (bias_rows, H) in bf16 of the layer norm of heads.
struct HeadWeights {
  const uint16_t *weight, *bias;
  long weight_rows, bias_rows;
};

// Normalizes and rotates queries (B, T, N, H) and keys (B, T, K, H), and writes keys and values (B, T, K, H) to a
// cache. All are bf16. Cosines and sines are float32, (angles, H), with `angles` = T, the same for each row, or B T;
// positions alike. H is 64 or 128.
struct Heads {
  const uint16_t *q, *k, *v;
  uint16_t* out;  // queries
  HeadWeights of_q, of_k;
  const float *cos, *sin;
  const int64_t* positions;
  long angles, places;  // rows of cos and sin, and of positions
  Store store;
  long B, T, N, K, H, threads;
};
void heads(const Heads& call);

// Attention of one query a row. query and out (B, N, H) are bf16; row b reads its first slots[b] slots. `row` and
// `apart` are the strides of the first two dimensions of keys and values (B, K, slots, H); `scale_row` and
// `scale_apart` are those of the scales (B, K, slots), which are null for bf16. H is 64 or 128.
void one_query(const uint16_t* query, const void* keys, const void* values, const float* key_scales,
               const float* value_scales, const int64_t* slots, uint16_t* out, long B, long N, long K, long H, long row,
               long apart, long scale_row, long scale_apart, float scale, long threads);
