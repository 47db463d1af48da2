// Products of bf16 rows and matrices of 4-bit numbers, for x86 with AVX-512 VNNI.
//
// Each group of inputs of a row is split into two int8 parts. Products of integers are exact: a row's result does not
// depend on the number of rows, or on whether tiles compute it. With up to two rows, the numbers are multiplied as they
// are read. With more, one group of a block is unpacked to the first-level cache and serves all rows.

#include <algorithm>
#include <cmath>
#include <memory>

#include "native.h"

namespace {

constexpr long SLAB = 256;  // rows of one pass; their sums fit in the second-level cache
constexpr long MAX_GROUP = 128;
constexpr int COLUMNS = OUTPUTS / 16;
constexpr long FEW = 4;  // up to so many rows, tiles would be mostly empty

// The rows of one pass in two parts, with what each group of inputs needs.
struct Rows {
  long count, inputs, group, groups;
  std::unique_ptr<int8_t[]> high, low;        // (count, inputs)
  std::unique_ptr<float[]> scales, sums;      // (count, groups): of the parts, and sums of x
  std::unique_ptr<int32_t[]> starts;          // (count, groups): -8 times the sum of the integers

  Rows(long count, long inputs, long group)
      : count(count), inputs(inputs), group(group), groups(inputs / group), high(new int8_t[count * inputs]),
        low(new int8_t[count * inputs]), scales(new float[count * groups]), sums(new float[count * groups]),
        starts(new int32_t[count * groups]) {}

  // Splits row m. With weights `norm`, the row is normalized first and rounded to bf16 twice, as in RMSNorm.
  void prepare(long m, const uint16_t* x, const uint16_t* norm, float eps) {
    alignas(64) float numbers[MAX_GROUP];
    __m512 factor = _mm512_set1_ps(1);
    if (norm) {
      __m512 squares = _mm512_setzero_ps();
      for (long k = 0; k < inputs; k += 16) squares = _mm512_fmadd_ps(sixteen(x + k), sixteen(x + k), squares);
      factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(inputs) + eps));
    }
    for (long g = 0; g < groups; ++g) {
      __m512 sum = _mm512_setzero_ps();
      for (long k = 0; k < group; k += 16) {
        __m512 part = sixteen(x + g * group + k);
        if (norm) part = rounded(_mm512_mul_ps(rounded(_mm512_mul_ps(part, factor)), sixteen(norm + g * group + k)));
        _mm512_store_ps(numbers + k, part);
        sum = _mm512_add_ps(sum, part);
      }
      const long first = m * inputs + g * group, at = m * groups + g;
      const Split parts = split(numbers, group, high.get() + first, low.get() + first);
      scales[at] = parts.scale;
      sums[at] = _mm512_reduce_add_ps(sum);
      starts[at] = static_cast<int32_t>(-8u * static_cast<uint32_t>(parts.total));
    }
  }
};

inline __m512i four_inputs(const int8_t* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

inline __m512i joined(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

// Adds the product of one group to sixteen totals of row m. `pairs` has scale and zero of each output, `sums` are the
// sums of products of integers.
inline void finish(const Rows& rows, long m, long g, const uint16_t* pairs, __m512i sums, float* totals) {
  const __m512i both = _mm512_loadu_si512(pairs);
  const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  const long at = m * rows.groups + g;
  const __m512i whole = _mm512_add_epi32(sums, _mm512_set1_epi32(rows.starts[at]));
  const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[at]));
  const __m512 total = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(whole), _mm512_loadu_ps(totals));
  _mm512_storeu_ps(totals, _mm512_fmadd_ps(zero, _mm512_set1_ps(rows.sums[at]), total));
}

// Multiplies R rows by a block while it is read. totals (R, 64). Whole bytes, 16 second + first, take the place of the
// second numbers, which saves unpacking them: the sums of first numbers are subtracted at the end of each group.
template <int R>
void direct(const Rows& rows, const uint8_t* packed, const uint16_t* scale_zero, float* totals) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (long g = 0; g < rows.groups; ++g, scale_zero += 2 * OUTPUTS) {
    __m512i high[R][COLUMNS], low[R][COLUMNS];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < COLUMNS; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
    fetch(scale_zero), fetch(scale_zero + 32), fetch(scale_zero + 64), fetch(scale_zero + 96);
    for (long k = g * rows.group; k < (g + 1) * rows.group; k += 4) {
      __m512i upper[R], lower[R];
      for (int r = 0; r < R; ++r) {
        upper[r] = four_inputs(rows.high.get() + r * rows.inputs + k);
        lower[r] = four_inputs(rows.low.get() + r * rows.inputs + k);
      }
      for (int c = 0; c < COLUMNS; c += 2, packed += 64) {
        fetch(packed);
        const __m512i bytes = _mm512_loadu_si512(packed);
        const __m512i first = _mm512_and_si512(bytes, mask);
        for (int r = 0; r < R; ++r) {
          add_products(high[r][c], first, upper[r]);
          add_products(low[r][c], first, lower[r]);
          add_products(high[r][c + 1], bytes, upper[r]);
          add_products(low[r][c + 1], bytes, lower[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < COLUMNS; c += 2) {
        const __m512i first = joined(high[r][c], low[r][c]), both = joined(high[r][c + 1], low[r][c + 1]);
        float* to = totals + r * OUTPUTS + 16 * c;
        finish(rows, r, g, scale_zero + 32 * c, first, to);
        finish(rows, r, g, scale_zero + 32 * c + 32, _mm512_srai_epi32(_mm512_sub_epi32(both, first), 4), to + 16);
      }
  }
}

// Unpacks one group of a block to columns (4, group / 4, 16, 4).
void unpack(const uint8_t* packed, long group, uint8_t* columns) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (long k = 0; k < group; k += 4)
    for (int c = 0; c < COLUMNS; c += 2, packed += 64) {
      fetch(packed);
      const __m512i bytes = _mm512_loadu_si512(packed);
      _mm512_store_si512(columns + c * group * 16 + k * 16, _mm512_and_si512(bytes, mask));
      _mm512_store_si512(columns + (c + 1) * group * 16 + k * 16, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
    }
}

// Multiplies R rows from row m by two unpacked columns of group g.
template <int R>
void two_columns(const Rows& rows, long m, long g, const uint8_t* columns, const uint16_t* pairs, float* totals) {
  __m512i high[R][2], low[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) high[r][c] = low[r][c] = _mm512_setzero_si512();
  const long at = m * rows.inputs + g * rows.group;
  for (long k = 0; k < rows.group; k += 4) {
    const __m512i first = _mm512_load_si512(columns + k * 16);
    const __m512i second = _mm512_load_si512(columns + (rows.group + k) * 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i upper = four_inputs(rows.high.get() + at + r * rows.inputs + k);
      const __m512i lower = four_inputs(rows.low.get() + at + r * rows.inputs + k);
      add_products(high[r][0], first, upper);
      add_products(low[r][0], first, lower);
      add_products(high[r][1], second, upper);
      add_products(low[r][1], second, lower);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c)
      finish(rows, m + r, g, pairs + 32 * c, joined(high[r][c], low[r][c]), totals + (m + r) * OUTPUTS + 16 * c);
}

// The same in tiles of `height` rows. The last tile of all may begin before row m; its rows before m are dropped.
void two_columns_in_tiles(const Rows& rows, long m, long height, long g, const uint8_t* columns, const uint16_t* pairs,
                          float* totals) {
  alignas(64) int32_t sums[2][2][TILE][TILE];
  const long first = std::min(m, rows.count - height), at = first * rows.inputs + g * rows.group;
  tile_sums(rows.high.get() + at, rows.low.get() + at, rows.inputs, columns, rows.group, sums);
  for (long r = m - first; r < height; ++r)
    for (int c = 0; c < 2; ++c)
      finish(rows, first + r, g, pairs + 32 * c,
             joined(_mm512_load_si512(sums[0][c][r]), _mm512_load_si512(sums[1][c][r])),
             totals + (first + r) * OUTPUTS + 16 * c);
}

// Computes a block of outputs for all rows. totals (count, 64); `columns` is a scratch buffer.
void block(const Rows& rows, const uint8_t* packed, const uint16_t* scale_zero, long tile_rows, uint8_t* columns,
           float* totals) {
  std::fill(totals, totals + rows.count * OUTPUTS, 0.0f);
  if (rows.count == 1) return direct<1>(rows, packed, scale_zero, totals);
  if (rows.count == 2) return direct<2>(rows, packed, scale_zero, totals);
  for (long g = 0; g < rows.groups; ++g, scale_zero += 2 * OUTPUTS, packed += rows.group * OUTPUTS / 2) {
    unpack(packed, rows.group, columns);
    for (int c = 0; c < COLUMNS; c += 2) {
      const uint8_t* two = columns + c * rows.group * 16;
      for (long m = 0; m < rows.count;) {
        const long left = rows.count - m;
        const uint16_t* pairs = scale_zero + 32 * c;
        if (tile_rows) {
          two_columns_in_tiles(rows, m, tile_rows, g, two, pairs, totals + 16 * c);
          m += tile_rows;
        } else {
          auto* run = left >= 4 ? two_columns<4> : left >= 2 ? two_columns<2> : two_columns<1>;
          run(rows, m, g, two, pairs, totals + 16 * c);
          m += left >= 4 ? 4 : left >= 2 ? 2 : 1;
        }
      }
    }
  }
}

// Returns silu(gate) * up, rounded to bf16 after each operation, as torch does.
inline __m512 gated(__m512 gate, __m512 up) {
  gate = rounded(gate);
  const __m512 one = _mm512_set1_ps(1), power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate)));
  const __mmask16 negative = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 share = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, power), _mm512_add_ps(one, power));
  return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, share)), rounded(up));
}

}  // namespace

void int4_products(const Int4Products& call) {
  long blocks = 0;
  for (long i = 0; i < (call.gated ? 1 : call.count); ++i) blocks += call.matrices[i].outputs / OUTPUTS;
  for (long start = 0; start < call.M; start += SLAB) {
    Rows rows(std::min(SLAB, call.M - start), call.K, call.group);
    const long tile_rows = call.tiles && rows.count > FEW ? std::min(rows.count, TILE) : 0;
#pragma omp parallel num_threads(call.threads)
    {
      alignas(64) uint8_t columns[MAX_GROUP * OUTPUTS];
      std::unique_ptr<float[]> totals(new float[2 * rows.count * OUTPUTS]);
      float* second = totals.get() + rows.count * OUTPUTS;
      if (tile_rows) configure_tiles(tile_rows, call.group);
#pragma omp for schedule(static)
      for (long m = 0; m < rows.count; ++m) rows.prepare(m, call.x + (start + m) * call.K, call.norm, call.eps);
#pragma omp for schedule(static)
      for (long at = 0; at < blocks; ++at) {
        const Int4Matrix* matrix = call.matrices;
        long n = at * OUTPUTS;
        for (; n >= matrix->outputs; ++matrix) n -= matrix->outputs;
        const long N = matrix->outputs, packed = n * call.K / 2, pairs = n * (call.K / call.group) * 2;
        block(rows, matrix->packed + packed, matrix->scale_zero + pairs, tile_rows, columns, totals.get());
        if (call.gated)
          block(rows, matrix[1].packed + packed, matrix[1].scale_zero + pairs, tile_rows, columns, second);
        for (long m = 0; m < rows.count; ++m)
          for (long c = 0; c < OUTPUTS; c += 16) {
            const long to = (start + m) * N + n + c;
            __m512 sum = _mm512_loadu_ps(totals.get() + m * OUTPUTS + c);
            if (call.gated) sum = gated(sum, _mm512_loadu_ps(second + m * OUTPUTS + c));
            if (call.residual) sum = _mm512_add_ps(rounded(sum), sixteen(call.residual + to));
            store_sixteen(matrix->out + to, sum);
          }
      }
      if (tile_rows) release_tiles();
    }
  }
}
