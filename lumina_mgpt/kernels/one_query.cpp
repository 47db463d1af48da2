// Attention of one query a row over a KV cache in bf16, or in int8 with one scale for each slot and head.
//
// torch's kernel reads the cache at a fraction of the memory bandwidth. This one reads keys and values once and writes
// only the weights of one head in between. A query is split into three int8 parts to multiply it by int8 keys. Needs
// AVX-512 F, BW, VL and VNNI.

#include <algorithm>
#include <vector>

#include "native.h"

namespace {

// Replaces weights[0 ... slots) by their softmax; the buffer extends to the next multiple of 16.
void softmax(float* weights, long slots) {
  for (long s = slots; s % 16; ++s) weights[s] = -__builtin_inff();
  __m512 largest = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
  for (long s = 0; s < slots; s += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(weights + s));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (long s = 0; s < slots; s += 16) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(weights + s), top));
    _mm512_storeu_ps(weights + s, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  for (long s = 0; s < slots; s += 16)
    _mm512_storeu_ps(weights + s, _mm512_mul_ps(_mm512_loadu_ps(weights + s), share));
}

// Writes the scores of a query (H) and bf16 keys (slots, H).
template <int H>
void scores(const float* query, const uint16_t* keys, const float*, long slots, float* weights) {
  constexpr int PARTS = H / 16;
  __m512 q[PARTS];
  for (int part = 0; part < PARTS; ++part) q[part] = _mm512_loadu_ps(query + part * 16);
  for (long s = 0; s < slots; ++s, keys += H) {
    for (int at = 0; at < H; at += 32) fetch(keys + at);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int part = 0; part < PARTS; part += 2) {
      even = _mm512_fmadd_ps(q[part], sixteen(keys + part * 16), even);
      odd = _mm512_fmadd_ps(q[part + 1], sixteen(keys + part * 16 + 16), odd);
    }
    weights[s] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
}

// Adds neighbouring 128-bit lanes: sums of lanes 0 + 1 and 2 + 3 of a, then those of b.
inline __m512i add_lanes(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

inline __m512i sixteen_sums(const __m512i (&fours)[4]) {
  return add_lanes(add_lanes(fours[0], fours[1]), add_lanes(fours[2], fours[3]));
}

// For each of four vectors, the sum of its lanes in each 128 bits: lane i of the result belongs to vector i.
inline __m512i add_in_lanes(const __m512i (&sums)[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// A query in three int8 parts: (65536 parts[0] + 256 parts[1] + parts[2]) * scale. The error is at most 1/16,000,000 of
// its largest number. The upper total is the sum of 256 parts[0] + parts[1], the lower one that of parts[2].
template <int H>
struct SplitQuery {
  alignas(64) int8_t parts[3][H];
  float scale;
  int32_t upper_total, lower_total;

  explicit SplitQuery(const float* numbers) {
    constexpr float LARGEST = 8355000;  // below 127 * 65536 + 127 * 256 + 127 by more than the rounding of a float
    __m512 largest = _mm512_setzero_ps(), invalid = _mm512_setzero_ps();
    for (int i = 0; i < H; i += 16) {
      const __m512 x = _mm512_loadu_ps(numbers + i);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
      invalid = _mm512_fmadd_ps(x, _mm512_setzero_ps(), invalid);  // NaN if a number is infinite or NaN
    }
    const float most = _mm512_reduce_max_ps(largest);
    const bool zero = most < 1e-30f;
    const __m512 factor = _mm512_set1_ps(zero ? 0 : LARGEST / most);
    const __m512i half = _mm512_set1_epi32(128);
    __m512i upper_sum = _mm512_setzero_si512(), lower_sum = upper_sum;
    for (int i = 0; i < H; i += 16) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(numbers + i), factor));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8);
      const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
      const __m512i first = _mm512_srai_epi32(_mm512_add_epi32(upper, half), 8);
      store_bytes(parts[0] + i, first);
      store_bytes(parts[1] + i, _mm512_sub_epi32(upper, _mm512_slli_epi32(first, 8)));
      store_bytes(parts[2] + i, lower);
      upper_sum = _mm512_add_epi32(upper_sum, upper);
      lower_sum = _mm512_add_epi32(lower_sum, lower);
    }
    scale = (zero ? 0 : most / LARGEST) + _mm512_reduce_add_ps(invalid);
    upper_total = _mm512_reduce_add_epi32(upper_sum);
    lower_total = _mm512_reduce_add_epi32(lower_sum);
  }
};

inline __m512i offset(int32_t total) {
  return _mm512_set1_epi32(static_cast<int32_t>(-128u * static_cast<uint32_t>(total)));
}

// The same for int8 keys with scales. A key's bytes, their sign bits flipped, are the unsigned numbers key + 128.
template <int H>
void scores(const float* query, const int8_t* keys, const float* scales, long slots, float* weights) {
  constexpr int LINES = H / 64;
  const SplitQuery<H> q(query);
  __m512i parts[3][LINES];
  for (int part = 0; part < 3; ++part)
    for (int line = 0; line < LINES; ++line) parts[part][line] = _mm512_load_si512(q.parts[part] + line * 64);
  const __m512i flip = _mm512_set1_epi8(-128);
  const __m512i upper_offset = offset(q.upper_total), lower_offset = offset(q.lower_total);
  for (long s = 0; s < slots; s += 16) {
    __m512i upper_fours[4], lower_fours[4];
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      __m512i upper[4], lower[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int8_t* key = keys + std::min(s + four * 4 + i, slots - 1) * H;
        __m512i first = _mm512_setzero_si512();
        upper[i] = lower[i] = first;
#pragma GCC unroll 2
        for (int line = 0; line < LINES; ++line) {
          fetch(key + line * 64);
          const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(key + line * 64), flip);
          add_products(first, bytes, parts[0][line]);
          add_products(upper[i], bytes, parts[1][line]);
          add_products(lower[i], bytes, parts[2][line]);
        }
        upper[i] = _mm512_add_epi32(upper[i], _mm512_slli_epi32(first, 8));
      }
      upper_fours[four] = add_in_lanes(upper);
      lower_fours[four] = add_in_lanes(lower);
    }
    const __m512i high = sixteen_sums(upper_fours), low = sixteen_sums(lower_fours);
    const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(high, upper_offset)), _mm512_set1_ps(256),
                                       _mm512_cvtepi32_ps(_mm512_add_epi32(low, lower_offset)));
    const auto kept = static_cast<__mmask16>(slots - s < 16 ? (1 << (slots - s)) - 1 : 0xffff);
    const __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(kept, scales + s), _mm512_set1_ps(q.scale));
    _mm512_storeu_ps(weights + s, _mm512_mul_ps(sum, factor));
  }
}

// Attention of one head. Shapes: query and out (H); keys and values (slots, H); scales (slots), or null.
template <typename Number, int H>
void head(const uint16_t* query, const Number* keys, const Number* values, const float* key_scales,
          const float* value_scales, long slots, float scale, float* weights, uint16_t* out) {
  constexpr int PARTS = H / 16, BYTES = H * sizeof(Number);
  alignas(64) float scaled[H];
  __m512 mixed[PARTS];
  for (int part = 0; part < PARTS; ++part) {
    _mm512_store_ps(scaled + part * 16, _mm512_mul_ps(sixteen(query + part * 16), _mm512_set1_ps(scale)));
    mixed[part] = _mm512_setzero_ps();
  }
  scores<H>(scaled, keys, key_scales, slots, weights);
  softmax(weights, slots);
  for (long s = 0; s < slots; ++s) {
    const Number* value = values + s * H;
    for (int at = 0; at < BYTES; at += 64) fetch(reinterpret_cast<const char*>(value) + at);
    const __m512 weight = _mm512_set1_ps(weights[s] * (value_scales ? value_scales[s] : 1));
    for (int part = 0; part < PARTS; ++part)
      mixed[part] = _mm512_fmadd_ps(weight, sixteen(value + part * 16), mixed[part]);
  }
  for (int part = 0; part < PARTS; ++part) store_sixteen(out + part * 16, mixed[part]);
}

template <typename Number, int H>
void all(const uint16_t* query, const Number* keys, const Number* values, const float* key_scales,
         const float* value_scales, const int64_t* slots, uint16_t* out, long B, long N, long K, long row, long apart,
         long scale_row, long scale_apart, float scale, long threads) {
  long most = 0;
  for (long b = 0; b < B; ++b) most = slots[b] > most ? slots[b] : most;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> weights(most + 16);
#pragma omp for schedule(static)
    for (long n = 0; n < B * N; ++n) {
      const long b = n / N, held = b * row + n % N / (N / K) * apart;
      const long scaled = b * scale_row + n % N / (N / K) * scale_apart;
      head<Number, H>(query + n * H, keys + held, values + held, key_scales ? key_scales + scaled : nullptr,
                      value_scales ? value_scales + scaled : nullptr, slots[b], scale, weights.data(), out + n * H);
    }
  }
}

}  // namespace

void one_query(const uint16_t* query, const void* keys, const void* values, const float* key_scales,
               const float* value_scales, const int64_t* slots, uint16_t* out, long B, long N, long K, long H, long row,
               long apart, long scale_row, long scale_apart, float scale, long threads) {
#define RUN(Number, WIDTH)                                                                                             \
  all<Number, WIDTH>(query, static_cast<const Number*>(keys), static_cast<const Number*>(values), key_scales,          \
                     value_scales, slots, out, B, N, K, row, apart, scale_row, scale_apart, scale, threads)
  if (key_scales && H == 64) RUN(int8_t, 64);
  else if (key_scales) RUN(int8_t, 128);
  else if (H == 64) RUN(uint16_t, 64);
  else RUN(uint16_t, 128);
#undef RUN
}
