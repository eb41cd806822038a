// NEON with 8-bit matrix products (Armv8.6): smmla multiplies two rows of eight columns with two columns of the panel.
// A sum of four: (row 0, row 1) x (column 0, column 1). The float operations are those of qgemm_neon.cpp, which also
// serves a panel of one column.
#include <arm_neon.h>

#include "qgemm.h"

namespace {

inline float32x4_t bytes_to_float(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

// Columns 8 * j..8 * j + 7 of rows first..first + 7, two rows to a register.
template <int Bits>
inline void weights(const uint8_t* tile, int j, int8x16_t* w) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    int32x4_t early, late;  // the first and the last four columns of four rows
    if (Bits == 4) {
      const uint8x16_t bytes = vld1q_u8(tile + 64 * j + 16 * v);
      early = vreinterpretq_s32_u8(vandq_u8(bytes, vdupq_n_u8(15)));
      late = vreinterpretq_s32_u8(vshrq_n_u8(bytes, 4));
    } else {
      early = vreinterpretq_s32_u8(vld1q_u8(tile + 128 * j + 16 * v));
      late = vreinterpretq_s32_u8(vld1q_u8(tile + 128 * j + 64 + 16 * v));
    }
    w[2 * v] = vreinterpretq_s8_s32(vzip1q_s32(early, late));
    w[2 * v + 1] = vreinterpretq_s8_s32(vzip2q_s32(early, late));
  }
}

// acc[pair of columns][pair of rows]; the last of an odd number of columns is paired with itself.
template <int C, int Bits>
inline void dot_block(const uint8_t* tile, const int8_t* a, int32x4_t (*acc)[4]) {
  constexpr int pairs = (C + 1) / 2;
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < 4; ++r) acc[p][r] = vdupq_n_s32(0);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    int8x16_t w[4];
    weights<Bits>(tile, j, w);
#pragma GCC unroll 4
    for (int p = 0; p < pairs; ++p) {
      const int second = 2 * p + 1 < C ? 2 * p + 1 : 2 * p;
      const int8x16_t x = vcombine_s8(vld1_s8(a + 64 * p + 8 * j), vld1_s8(a + 32 * second + 8 * j));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[p][r] = vmmlaq_s32(acc[p][r], w[r], x);
    }
  }
}

// Eight rows from `first` on.
template <int C, int Bits>
void dots(const glm4_weight* w, int64_t tile, int first, const glm4_panel* x, float* out) {
  constexpr int pairs = (C + 1) / 2;
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * (64 * Bits) + 4 * first;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + first;
  const int8_t* a = reinterpret_cast<const int8_t*>(x->quads);
  const float* scale = x->scale;
  float32x4_t total[pairs][4];
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < 4; ++r) total[p][r] = vdupq_n_f32(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    const float32x4_t low = bytes_to_float(scales + g * GLM4_ROWS), high = bytes_to_float(scales + g * GLM4_ROWS + 4);
    const float32x4_t s[4] = {vzip1q_f32(low, low), vzip2q_f32(low, low), vzip1q_f32(high, high),
                              vzip2q_f32(high, high)};  // each row twice
    for (int64_t b = 0; b < per_group; ++b) {
      int32x4_t acc[pairs][4];
      dot_block<C, Bits>(codes, a, acc);
#pragma GCC unroll 4
      for (int p = 0; p < pairs; ++p) {
        const int second = 2 * p + 1 < C ? 2 * p + 1 : 2 * p;
        const float both[4] = {scale[2 * p], scale[second], scale[2 * p], scale[second]};
        const float32x4_t by = vld1q_f32(both);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
          total[p][r] = vfmaq_f32(total[p][r], vcvtq_f32_s32(acc[p][r]), vmulq_f32(s[r], by));
      }
      codes += 64 * Bits, a += 32 * C, scale += C;
    }
  }
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < 4; r += 2) {
      float* to = out + GLM4_ROWS * 2 * p + first + 2 * r;
      vst1q_f32(to, vuzp1q_f32(total[p][r], total[p][r + 1]));
      if (2 * p + 1 < C) vst1q_f32(to + GLM4_ROWS, vuzp2q_f32(total[p][r], total[p][r + 1]));
    }
}

void mins(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group, width = x->width;
  for (int r = 0; r < GLM4_ROWS; r += 4) {
    const uint8_t* m = w->mins + tile * groups * GLM4_ROWS + r;
    float32x4_t total[GLM4_NEONI8MM_WIDTH];
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
  for (int first = 0; first < GLM4_ROWS; first += 8) {
    if (w->bits == 8) {
      dots<C, 8>(w, tile, first, x, dot);
    } else {
      dots<C, 4>(w, tile, first, x, dot);
    }
  }
  if (w->bits == 4) mins(w, tile, x, min);
}

void tile_of_one(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  glm4_tile_neon(w, tile, x, 1, dot, min);
}

using OnePanel = void (*)(const glm4_weight*, int64_t, const glm4_panel*, float*, float*);
constexpr OnePanel kByWidth[GLM4_NEONI8MM_WIDTH] = {tile_of_one, tile_of<2>, tile_of<3>,
                                                            tile_of<4>,     tile_of<5>, tile_of<6>};

}  // namespace

void glm4_tile_neoni8mm(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  for (; count > 0; dot += GLM4_ROWS * x->width, min += GLM4_ROWS * x->width, ++x, --count)
    kByWidth[x->width - 1](w, tile, x, dot, min);
}
