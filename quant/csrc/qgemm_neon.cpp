// NEON with dot products (Armv8.2): one register holds four columns of four rows; sdot adds their products with one
// lane's four activations. Nibbles are 0..15, so the signed instruction serves both kinds of weights.
#include <arm_neon.h>

#include "codes_neon.h"
#include "qgemm.h"

namespace {

// One group's bytes of V * 4 rows, widened.
template <int V>
inline void widen(const uint8_t* p, uint32x4_t* out) {
  if constexpr (V == 4) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    out[0] = vmovl_u16(vget_low_u16(low)), out[1] = vmovl_high_u16(low);
    out[2] = vmovl_u16(vget_low_u16(high)), out[3] = vmovl_high_u16(high);
  } else {
    const uint16x8_t both = vmovl_u8(vld1_u8(p));
    out[0] = vmovl_u16(vget_low_u16(both)), out[1] = vmovl_high_u16(both);
  }
}

// Four columns (lane J % 4 of one register of activations) of V * 4 rows.
template <int V, int J>
inline void add_quad(const int8x16_t* w, const int8x16_t* a, int32x4_t* acc) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) acc[v] = vdotq_laneq_s32(acc[v], w[v], a[J / 4], J % 4);
}

template <int C, int V, int Bits, int J>
inline void add_quads(const uint8_t* tile, const int8x16_t (*a)[2], int32x4_t (*acc)[V]) {
  if constexpr (J < 8) {
    int8x16_t w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = codes_of<Bits, J>(tile + 16 * v);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) add_quad<V, J>(w, a[c], acc[c]);
    add_quads<C, V, Bits, J + 1>(tile, a, acc);
  }
}

template <int C, int V, int Bits>
inline void dot_block(const uint8_t* tile, const int8_t* quads, int32x4_t (*acc)[V]) {
  int8x16_t a[C][2];
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    a[c][0] = vld1q_s8(quads + 32 * c), a[c][1] = vld1q_s8(quads + 32 * c + 16);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[c][v] = vdupq_n_s32(0);
  }
  add_quads<C, V, Bits, 0>(tile, a, acc);
}

// Adds a group's minima times the activations' sums.
template <int C, int V>
inline void add_mins(const uint8_t* mins, const float* group_sum, float32x4_t (*total)[V]) {
  uint32x4_t bytes[V];
  widen<V>(mins, bytes);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const float32x4_t m = vcvtq_f32_u32(bytes[v]);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) total[c][v] = vfmaq_n_f32(total[c][v], m, group_sum[c]);
  }
}

template <int C, int V>
inline void clear(float32x4_t (*total)[V]) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[c][v] = vdupq_n_f32(0.0f);
}

template <int C, int V>
inline void store(const float32x4_t (*total)[V], float* out) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vst1q_f32(out + GLM4_ROWS * c + 4 * v, total[c][v]);
}

// Rows first..first + 4 V - 1 of a tile. A sum is multiplied with its group's scale as a whole number: up to 4 bits
// exact in a float (15 * 127 * 32 * 255 < 2^24).
template <int C, int V, int Bits>
void dots(const glm4_weight* w, int64_t tile, int first, const glm4_panel* x, float* dot, float* min) {
  constexpr bool with_mins = C == 1 && Bits < 8;  // one column has the registers for both sums
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS, blocks = w->k / GLM4_COLS;
  const int shift = static_cast<int>(per_group / 2);  // 1, 2 or 4 blocks are a group
  const uint8_t* codes = w->qweight + tile * blocks * (64 * Bits) + 4 * first;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + first;
  const uint8_t* mins = with_mins ? w->mins + tile * groups * GLM4_ROWS + first : nullptr;
  const int8_t* a = reinterpret_cast<const int8_t*>(x->quads);
  const float* by = x->scale;
  float32x4_t total[C][V], low[C][V];
  clear<C, V>(total);
  if (with_mins) clear<C, V>(low);
  for (int64_t b = 0; b < blocks; ++b, codes += 64 * Bits, a += 32 * C, by += C) {
    const int64_t g = b >> shift;
    int32x4_t acc[C][V];
    dot_block<C, V, Bits>(codes, a, acc);
    uint32x4_t s[V];
    widen<V>(scales + g * GLM4_ROWS, s);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int32x4_t scaled = vmulq_s32(acc[c][v], vreinterpretq_s32_u32(s[v]));
        total[c][v] = vfmaq_n_f32(total[c][v], vcvtq_f32_s32(scaled), by[c]);
      }
    if (with_mins && b == g << shift) add_mins<C, V>(mins + g * GLM4_ROWS, x->group_sum + g * C, low);
  }
  store<C, V>(total, dot + first);
  if (with_mins) store<C, V>(low, min + first);
}

template <int C>
void all_mins(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group;
  const uint8_t* mins = w->mins + tile * groups * GLM4_ROWS;
  float32x4_t total[C][4];
  clear<C, 4>(total);
  for (int64_t g = 0; g < groups; ++g) add_mins<C, 4>(mins + g * GLM4_ROWS, x->group_sum + g * C, total);
  store<C, 4>(total, out);
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  constexpr int vectors = C <= 2 ? 4 : 2;  // whole tiles where the registers hold their sums
  for (int first = 0; first < GLM4_ROWS; first += 4 * vectors) {
    switch (w->bits) {
      case 2: dots<C, vectors, 2>(w, tile, first, x, dot, min); break;
      case 3: dots<C, vectors, 3>(w, tile, first, x, dot, min); break;
      case 4: dots<C, vectors, 4>(w, tile, first, x, dot, min); break;
      case 5: dots<C, vectors, 5>(w, tile, first, x, dot, min); break;
      case 6: dots<C, vectors, 6>(w, tile, first, x, dot, min); break;
      default: dots<C, vectors, 8>(w, tile, first, x, dot, min);
    }
  }
  if (C > 1 && w->bits < 8) glm4_mins_neon(w, tile, x, min);
}

using OnePanel = void (*)(const glm4_weight*, int64_t, const glm4_panel*, float*, float*);
constexpr OnePanel kByWidth[GLM4_NEON_WIDTH] = {tile_of<1>, tile_of<2>, tile_of<3>,
                                                        tile_of<4>, tile_of<5>, tile_of<6>};

using Mins = void (*)(const glm4_weight*, int64_t, const glm4_panel*, float*);
constexpr Mins kMinsByWidth[GLM4_NEON_WIDTH] = {all_mins<1>, all_mins<2>, all_mins<3>,
                                                all_mins<4>, all_mins<5>, all_mins<6>};

}  // namespace

void glm4_mins_neon(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* min) {
  kMinsByWidth[x->width - 1](w, tile, x, min);
}

void glm4_tile_neon(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  for (; count > 0; dot += GLM4_ROWS * x->width, min += GLM4_ROWS * x->width, ++x, --count)
    kByWidth[x->width - 1](w, tile, x, dot, min);
}
