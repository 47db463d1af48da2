// The tile unit of AMX written as loops, after Intel's manual (TILELOADD, TDPBSUD, TILESTORED). A test compiles the
// kernels with it (-include), to run them on processors without AMX.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

struct EmulatedTile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
inline thread_local EmulatedTile emulated[8];

inline void emulated_config(const void* from) {
  const auto* config = static_cast<const uint8_t*>(from);
  if (config[0] != 1 || config[1] != 0) std::abort();
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * tile, 2);
    if (bytes > 64 || bytes % 4 || config[48 + tile] > 16) std::abort();  // the processor refuses these, too
    emulated[tile].bytes = bytes;
    emulated[tile].rows = config[48 + tile];
    std::memset(emulated[tile].data, 0, sizeof emulated[tile].data);
  }
}
inline void emulated_release() {
  for (auto& tile : emulated) tile.rows = tile.bytes = 0;
}
inline EmulatedTile& configured(int tile) {
  if (!emulated[tile].rows || !emulated[tile].bytes) std::abort();
  return emulated[tile];
}
inline void emulated_zero(int to) { std::memset(configured(to).data, 0, sizeof emulated[to].data); }
inline void emulated_load(int to, const void* base, long stride) {
  auto& tile = configured(to);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.data[row], static_cast<const uint8_t*>(base) + row * stride, tile.bytes);
}
inline void emulated_store(int from, void* base, long stride) {
  const auto& tile = configured(from);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, tile.data[row], tile.bytes);
}
inline void emulated_products(int sums, int a, int b) {  // a is signed, b is unsigned
  auto &to = configured(sums), &left = configured(a), &right = configured(b);
  if (to.rows != left.rows || to.bytes != right.bytes || left.bytes != 4 * right.rows) std::abort();
  for (int m = 0; m < to.rows; ++m)
    for (int n = 0; n < to.bytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, to.data[m] + 4 * n, 4);
      for (int k = 0; k < right.rows; ++k)
        for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(left.data[m][4 * k + i]) * right.data[k][4 * n + i];
      std::memcpy(to.data[m] + 4 * n, &sum, 4);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_config
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbsud emulated_products
