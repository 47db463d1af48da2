// Between the products and the attention of a step: norm and rotation of queries and keys, and writing of the cache.
// Needs AVX-512 F, BW and VL.
//
// All numbers are rounded to bf16 where the modules of transformer.py round them.

#include <cmath>

#include "native.h"

namespace {

constexpr float EPSILON = 1e-5f;         // HEAD_NORM_EPS of transformer.py
constexpr float TINY = 1.17549435e-38f;  // the smallest normal number: scales of zeros

// Layer norm of one head. With one row of weights and biases it is rounded once, otherwise before they apply, too.
template <int PARTS>
void normalize(__m512 (&x)[PARTS], const HeadWeights& by, long head, long heads) {
  constexpr float width = PARTS * 16;
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (const auto& part : x) sum = _mm512_add_ps(sum, part);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
  for (auto& part : x) {
    part = _mm512_sub_ps(part, mean);
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + EPSILON));
  const uint16_t* weight = by.weight + head * by.weight_rows / heads * (PARTS * 16);
  const uint16_t* bias = by.bias + head * by.bias_rows / heads * (PARTS * 16);
  const bool once = by.weight_rows == 1 && by.bias_rows == 1;
  for (int part = 0; part < PARTS; ++part) {
    const __m512 normed = _mm512_mul_ps(x[part], factor);
    const __m512 scale = sixteen(weight + part * 16), shift = sixteen(bias + part * 16);
    x[part] = rounded(_mm512_fmadd_ps(once ? normed : rounded(normed), scale, shift));
  }
}

template <int PARTS>
void rotate(__m512 (&x)[PARTS], const float* cos, const float* sin) {
  __m512 turned[PARTS];
  for (int part = 0; part < PARTS; ++part) {
    const __m512 kept = _mm512_mul_ps(x[part], _mm512_loadu_ps(cos + part * 16));
    turned[part] = _mm512_fmadd_ps(x[(part + PARTS / 2) % PARTS], _mm512_loadu_ps(sin + part * 16), kept);
  }
  for (int part = 0; part < PARTS; ++part) x[part] = rounded(turned[part]);
}

// Writes a head to a slot of the cache: in bf16, or in int8 with a scale that maps the largest magnitude to 127.
template <int PARTS>
void write(const __m512 (&x)[PARTS], void* numbers, float* scales, long slot) {
  if (!scales) {
    for (int part = 0; part < PARTS; ++part)
      store_sixteen(static_cast<uint16_t*>(numbers) + (slot * PARTS + part) * 16, x[part]);
    return;
  }
  __m512 largest = _mm512_setzero_ps();
  __mmask16 nan = 0;  // the maximum ignores NaN
  for (const auto& part : x) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
    nan |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
  }
  const float most = nan ? __builtin_nanf("") : std::fmax(_mm512_reduce_max_ps(largest), TINY);
  const float scale = most / 127;
  scales[slot] = scale;
  for (int part = 0; part < PARTS; ++part)
    store_bytes(static_cast<int8_t*>(numbers) + (slot * PARTS + part) * 16,
                _mm512_cvtps_epi32(_mm512_div_ps(x[part], _mm512_set1_ps(scale))));
}

template <int H>
void all(const Heads& call) {
  constexpr int PARTS = H / 16;
  const long each = call.N + 2 * call.K;
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (long i = 0; i < call.B * call.T * each; ++i) {
    const long token = i / each, n = i % each, t = token % call.T;
    const bool query = n < call.N, key = !query && n < call.N + call.K;
    const long head = query ? n : key ? n - call.N : n - call.N - call.K, heads = query ? call.N : call.K;
    const uint16_t* from = (query ? call.q : key ? call.k : call.v) + (token * heads + head) * H;
    __m512 x[PARTS];
    for (int part = 0; part < PARTS; ++part) x[part] = sixteen(from + part * 16);
    if (query || key) {
      const long angle = (call.angles == call.T ? t : token) * H;
      normalize<PARTS>(x, query ? call.of_q : call.of_k, head, heads);
      rotate<PARTS>(x, call.cos + angle, call.sin + angle);
    }
    if (query) {
      uint16_t* to = call.out + (token * heads + head) * H;
      for (int part = 0; part < PARTS; ++part) store_sixteen(to + part * 16, x[part]);
    } else {
      const long position = call.positions[call.places == call.T ? t : token];
      const long slot = (token / call.T * call.K + head) * call.store.slots + position;
      const Store& to = call.store;
      write<PARTS>(x, key ? to.keys : to.values, key ? to.key_scales : to.value_scales, slot);
    }
  }
}

}  // namespace

void heads(const Heads& call) { call.H == 64 ? all<64>(call) : all<128>(call); }
