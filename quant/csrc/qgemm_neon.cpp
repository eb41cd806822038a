// NEON with dot products (Armv8.2): one register holds four columns of four rows; sdot adds their products with one
// lane's four activations. Nibbles are 0..15, so the signed instruction serves both kinds of weights.
#include <arm_neon.h>

#include "qgemm.h"

namespace {

// Four rows' bytes -> floats.
inline float32x4_t bytes_to_float(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

// Four columns (lane J % 4 of one register of activations) of V * 4 rows.
template <int V, int J>
inline void add_quad(const int8x16_t* w, const int8x16_t* a, int32x4_t* acc) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) acc[v] = vdotq_laneq_s32(acc[v], w[v], a[J / 4], J % 4);
}

template <int C, int V, int J>
inline void add_int4(const uint8_t* tile, const int8x16_t (*a)[2], int32x4_t (*acc)[V]) {
  int8x16_t low[V], high[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const uint8x16_t bytes = vld1q_u8(tile + 64 * J + 16 * v);
    low[v] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    high[v] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
  }
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    add_quad<V, 2 * J>(low, a[c], acc[c]);
    add_quad<V, 2 * J + 1>(high, a[c], acc[c]);
  }
}

template <int C, int V, int J>
inline void add_int8(const uint8_t* tile, const int8x16_t (*a)[2], int32x4_t (*acc)[V]) {
  int8x16_t w[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) w[v] = vreinterpretq_s8_u8(vld1q_u8(tile + 64 * J + 16 * v));
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) add_quad<V, J>(w, a[c], acc[c]);
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
  if (Bits == 4) {
    add_int4<C, V, 0>(tile, a, acc), add_int4<C, V, 1>(tile, a, acc);
    add_int4<C, V, 2>(tile, a, acc), add_int4<C, V, 3>(tile, a, acc);
  } else {
    add_int8<C, V, 0>(tile, a, acc), add_int8<C, V, 1>(tile, a, acc);
    add_int8<C, V, 2>(tile, a, acc), add_int8<C, V, 3>(tile, a, acc);
    add_int8<C, V, 4>(tile, a, acc), add_int8<C, V, 5>(tile, a, acc);
    add_int8<C, V, 6>(tile, a, acc), add_int8<C, V, 7>(tile, a, acc);
  }
}

// Rows first..first + 4 V - 1 of a tile.
template <int C, int V, int Bits>
void dots(const glm4_weight* w, int64_t tile, int first, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * (64 * Bits) + 4 * first;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + first;
  const int8_t* a = reinterpret_cast<const int8_t*>(x->quads);
  const float* scale = x->scale;
  float32x4_t total[C][V];
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[c][v] = vdupq_n_f32(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    float32x4_t s[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[v] = bytes_to_float(scales + g * GLM4_ROWS + 4 * v);
    for (int64_t b = 0; b < per_group; ++b) {
      int32x4_t acc[C][V];
      dot_block<C, V, Bits>(codes, a, acc);
#pragma GCC unroll 6
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          total[c][v] = vfmaq_f32(total[c][v], vcvtq_f32_s32(acc[c][v]), vmulq_n_f32(s[v], scale[c]));
      codes += 64 * Bits, a += 32 * C, scale += C;
    }
  }
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vst1q_f32(out + GLM4_ROWS * c + first + 4 * v, total[c][v]);
}

void mins(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group, width = x->width;
  for (int r = 0; r < GLM4_ROWS; r += 4) {
    const uint8_t* m = w->mins + tile * groups * GLM4_ROWS + r;
    float32x4_t total[GLM4_NEON_WIDTH];
    for (int c = 0; c < width; ++c) total[c] = vdupq_n_f32(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const float32x4_t v = bytes_to_float(m + g * GLM4_ROWS);
      for (int c = 0; c < width; ++c) total[c] = vfmaq_n_f32(total[c], v, x->group_sum[g * width + c]);
    }
    for (int c = 0; c < width; ++c) vst1q_f32(out + GLM4_ROWS * c + r, total[c]);
  }
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  constexpr int vectors = C <= 2 ? 4 : 2;  // whole tiles where the registers hold their sums
  for (int first = 0; first < GLM4_ROWS; first += 4 * vectors) {
    if (w->bits == 8) {
      dots<C, vectors, 8>(w, tile, first, x, dot);
    } else {
      dots<C, vectors, 4>(w, tile, first, x, dot);
    }
  }
  if (w->bits == 4) mins(w, tile, x, min);
}

using OnePanel = void (*)(const glm4_weight*, int64_t, const glm4_panel*, float*, float*);
constexpr OnePanel kByWidth[GLM4_NEON_WIDTH] = {tile_of<1>, tile_of<2>, tile_of<3>,
                                                        tile_of<4>, tile_of<5>, tile_of<6>};

}  // namespace

void glm4_tile_neon(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  for (; count > 0; dot += GLM4_ROWS * x->width, min += GLM4_ROWS * x->width, ++x, --count)
    kByWidth[x->width - 1](w, tile, x, dot, min);
}
