// Products of bf16 rows and matrices of 4-bit numbers, for x86 with AMX and AVX-512 (Sapphire Rapids and later).
//
// For one or two rows, torch's kernel reads the matrix at less than half of the memory bandwidth; for more rows, its
// time is proportional to their number. This kernel converts 32 x 64 numbers at a time to bf16 in the first-level
// cache, and the tile unit multiplies up to sixteen rows by them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "native.h"

namespace {

constexpr long TILE = 16;     // rows of a tile, and its float32 columns
constexpr long STEP = 32;     // inputs of a tile
constexpr long SLAB = 256;    // rows of one pass; their sums fit in the second-level cache
constexpr long MAX_GROUP = 128;
constexpr long PART = TILE * STEP;  // bf16 numbers in one tile of weights
constexpr int PARTS = OUTPUTS / TILE;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};
};

struct Tables {
  alignas(64) uint8_t pairs[2][64];  // permutation that puts the bytes of two inputs together, for 16 + 16 outputs
  alignas(64) uint16_t numbers[32];  // -8 ... 7 in bf16, twice because the index has five bits

  Tables() {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const int byte = (lane & 1) * 32 + lane / 2 + 16 * half;
        pairs[half][2 * lane] = pairs[half][2 * lane + 1] = static_cast<uint8_t>(byte);
      }
      const float number = static_cast<float>((lane & 15) - 8);
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      numbers[lane] = static_cast<uint16_t>(bits >> 16);
    }
  }
};
const Tables TABLES;

// Converts `inputs` inputs of a block to tiles: PARTS tiles for each 32 inputs, with 16 pairs of inputs in a tile.
inline __attribute__((always_inline)) void unpack(const uint8_t* packed, long inputs, uint16_t* tiles) {
  const __m512i first = _mm512_load_si512(TABLES.pairs[0]), second = _mm512_load_si512(TABLES.pairs[1]);
  const __m512i numbers = _mm512_load_si512(TABLES.numbers);
  for (long k = 0; k < inputs; k += 2, packed += OUTPUTS) {
    fetch(packed);
    const __m512i bytes = _mm512_loadu_si512(packed);
    const __m512i a = _mm512_permutexvar_epi8(first, bytes), b = _mm512_permutexvar_epi8(second, bytes);
    uint16_t* to = tiles + k / STEP * (PARTS * PART) + k % STEP * TILE;
    _mm512_store_si512(to, _mm512_permutexvar_epi16(a, numbers));
    _mm512_store_si512(to + PART, _mm512_permutexvar_epi16(b, numbers));
    _mm512_store_si512(to + 2 * PART, _mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4), numbers));
    _mm512_store_si512(to + 3 * PART, _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), numbers));
  }
}

// Compiler barrier: compilers do not know that tile instructions access memory, and would move stores across them.
inline void written() { asm volatile("" ::: "memory"); }

// Adds the products of some rows and 32 inputs to tiles 0 ... 3.
inline void multiply(const uint16_t* rows, long row_bytes, const uint16_t* tiles) {
  written();
  _tile_loadd(4, rows, row_bytes);
  _tile_loadd(5, tiles, 64);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, tiles + PART, 64);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(7, tiles + 2 * PART, 64);
  _tile_dpbf16ps(2, 4, 7);
  _tile_loadd(5, tiles + 3 * PART, 64);
  _tile_dpbf16ps(3, 4, 5);
}

// Rows of one pass, in `chunks` of `height` rows; zero rows fill the last chunk.
struct Rows {
  long count, inputs, group, chunks, height;
  const uint16_t* x;
  std::vector<uint16_t> padded;
  std::vector<float> sums;  // of x over each group; factors of the zeros

  Rows(const uint16_t* from, long count, long inputs, long group) : count(count), inputs(inputs), group(group), x(from) {
    chunks = (count + TILE - 1) / TILE;
    height = (count + chunks - 1) / chunks;
    for (long at = 0; at < count * inputs; at += group) {
      __m512 sum = _mm512_setzero_ps();
      for (long k = 0; k < group; k += 16) sum = _mm512_add_ps(sum, sixteen(from + at + k));
      sums.push_back(_mm512_reduce_add_ps(sum));
    }
    if (chunks * height > count) {
      padded.assign(chunks * height * inputs, 0);
      std::memcpy(padded.data(), from, count * inputs * sizeof *from);
      x = padded.data();
    }
  }
};

// Computes one block of outputs for all rows. `totals` (chunks * height, 64) and `tiles` (one group) are scratch
// buffers.
void block(const Rows& rows, const uint8_t* packed, const uint16_t* scale_zero, uint16_t* out, long N, float* totals,
           uint16_t* tiles) {
  alignas(64) float sum[PARTS][TILE][TILE];
  const long groups = rows.inputs / rows.group, steps = rows.group / STEP, row_bytes = rows.inputs * 2;
  const long step_bytes = STEP * OUTPUTS / 2;
  std::fill(totals, totals + rows.chunks * rows.height * OUTPUTS, 0.0f);
  if (rows.chunks == 1) unpack(packed, STEP, tiles);
  for (long g = 0; g < groups; ++g) {
    if (rows.chunks > 1) unpack(packed + g * steps * step_bytes, rows.group, tiles);
    for (long c = 0; c < rows.chunks; ++c) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long s = 0; s < steps; ++s) {
        const long step = g * steps + s;
        const uint16_t* x = rows.x + c * rows.height * rows.inputs + step * STEP;
        if (rows.chunks > 1) {
          multiply(x, row_bytes, tiles + s * PARTS * PART);
        } else {  // unpacks the next step while the tile unit multiplies this one
          if (step + 1 < groups * steps)
            unpack(packed + (step + 1) * step_bytes, STEP, tiles + ((step + 1) & 1) * PARTS * PART);
          multiply(x, row_bytes, tiles + (step & 1) * PARTS * PART);
        }
      }
      _tile_stored(0, sum[0], 64);
      _tile_stored(1, sum[1], 64);
      _tile_stored(2, sum[2], 64);
      _tile_stored(3, sum[3], 64);
      written();
      for (int part = 0; part < PARTS; ++part) {
        const __m512i both = _mm512_loadu_si512(scale_zero + (g * OUTPUTS + part * TILE) * 2);
        const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        for (long r = 0, m = c * rows.height; r < rows.height && m < rows.count; ++r, ++m) {
          float* total = totals + m * OUTPUTS + part * TILE;
          const __m512 scaled = _mm512_fmadd_ps(scale, _mm512_load_ps(sum[part][r]), _mm512_loadu_ps(total));
          _mm512_storeu_ps(total, _mm512_fmadd_ps(zero, _mm512_set1_ps(rows.sums[m * groups + g]), scaled));
        }
      }
    }
  }
  for (long m = 0; m < rows.count; ++m)
    for (int part = 0; part < PARTS; ++part)
      store_sixteen(out + m * N + part * TILE, _mm512_loadu_ps(totals + m * OUTPUTS + part * TILE));
}

}  // namespace

void int4_amx(const uint16_t* x, const Int4Matrix* matrices, long count, long M, long K, long group, long threads) {
  long blocks = 0;
  for (long i = 0; i < count; ++i) blocks += matrices[i].outputs / OUTPUTS;
  for (long start = 0; start < M; start += SLAB) {
    const Rows rows(x + start * K, std::min(SLAB, M - start), K, group);
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes_a_row[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows.height : TILE);
    }
#pragma omp parallel num_threads(threads)
    {
      alignas(64) uint16_t tiles[MAX_GROUP / STEP * PARTS * PART];
      std::vector<float> totals(rows.chunks * rows.height * OUTPUTS);
      written();
      _tile_loadconfig(&config);
#pragma omp for schedule(static)
      for (long at = 0; at < blocks; ++at) {
        const Int4Matrix* matrix = matrices;
        long n = at * OUTPUTS;
        for (; n >= matrix->outputs; ++matrix) n -= matrix->outputs;
        block(rows, matrix->packed + n * K / 2, matrix->scale_zero + n * (K / group) * 2,
              matrix->out + start * matrix->outputs + n, matrix->outputs, totals.data(), tiles);
      }
      _tile_release();
    }
  }
}
