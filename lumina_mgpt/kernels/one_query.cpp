// Attention of one query a row over a KV cache in bf16, or in int8 with one scale for each slot and head.
//
// torch's kernel reads the cache at a fraction of the memory bandwidth. This one reads keys and values once and writes
// only the weights of one head in between. Needs AVX-512 F, BW and VL.

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
  for (long s = 0; s < slots; s += 16) _mm512_storeu_ps(weights + s, _mm512_mul_ps(_mm512_loadu_ps(weights + s), share));
}

// Attention of one head. Shapes: query and out (H); keys and values (slots, H); scales (slots), or null.
template <typename Number, int H>
void head(const uint16_t* query, const Number* keys, const Number* values, const float* key_scales,
          const float* value_scales, long slots, float scale, float* weights, uint16_t* out) {
  constexpr int PARTS = H / 16, BYTES = H * sizeof(Number);
  __m512 q[PARTS], mixed[PARTS];
  for (int part = 0; part < PARTS; ++part) {
    q[part] = _mm512_mul_ps(sixteen(query + part * 16), _mm512_set1_ps(scale));
    mixed[part] = _mm512_setzero_ps();
  }
  for (long s = 0; s < slots; ++s) {
    const Number* key = keys + s * H;
    for (int at = 0; at < BYTES; at += 64) fetch(reinterpret_cast<const char*>(key) + at);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int part = 0; part < PARTS; part += 2) {
      even = _mm512_fmadd_ps(q[part], sixteen(key + part * 16), even);
      odd = _mm512_fmadd_ps(q[part + 1], sixteen(key + part * 16 + 16), odd);
    }
    weights[s] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) * (key_scales ? key_scales[s] : 1);
  }
  softmax(weights, slots);
  for (long s = 0; s < slots; ++s) {
    const Number* value = values + s * H;
    for (int at = 0; at < BYTES; at += 64) fetch(reinterpret_cast<const char*>(value) + at);
    const __m512 weight = _mm512_set1_ps(weights[s] * (value_scales ? value_scales[s] : 1));
    for (int part = 0; part < PARTS; ++part) mixed[part] = _mm512_fmadd_ps(weight, sixteen(value + part * 16), mixed[part]);
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
