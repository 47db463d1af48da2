// Sums of products of int8 rows and 4-bit numbers in the tile unit, for x86 with AMX (Sapphire Rapids and later).

#include "native.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};
};

long step_inputs(long group) { return group < 64 ? group : 64; }  // inputs of one tile

// Compiler barrier: compilers do not know that tile instructions access memory, and would move stores across them.
inline void written() { asm volatile("" ::: "memory"); }

}  // namespace

// Tiles 0 ... 3 are sums, 4 and 5 the parts of the rows, 6 and 7 columns of the matrix.
void configure_tiles(long rows, long group) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_a_row[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? step_inputs(group) : 64);
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : step_inputs(group) / 4);
  }
  written();
  _tile_loadconfig(&config);
}

void release_tiles() { _tile_release(); }

void tile_sums(const int8_t* high, const int8_t* low, long apart, const uint8_t* columns, long group,
               int32_t sums[2][2][TILE][TILE]) {
  const long step = step_inputs(group);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  written();
  for (long k = 0; k < group; k += step) {
    _tile_loadd(4, high + k, apart);
    _tile_loadd(5, low + k, apart);
    _tile_loadd(6, columns + k * 16, 64);
    _tile_loadd(7, columns + (group + k) * 16, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
  written();
}
