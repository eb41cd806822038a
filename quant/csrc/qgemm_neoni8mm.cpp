// NEON with 8-bit matrix products (Armv8.6): smmla multiplies two rows of eight columns with two columns of the panel.
// A sum of four: (row 0, row 1) x (column 0, column 1). The float operations are those of qgemm_neon.cpp, which also
// serves a panel of one column.
#include <arm_neon.h>

#include "codes_neon.h"
#include "qgemm.h"

namespace {

// Columns 8 * J..8 * J + 7 of rows first..first + 7, two rows to a register.
template <int Bits, int J>
inline void weights(const uint8_t* tile, int8x16_t* w) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {  // the first and the last four columns of four rows
    const int32x4_t early = vreinterpretq_s32_s8(codes_of<Bits, 2 * J>(tile + 16 * v));
    const int32x4_t late = vreinterpretq_s32_s8(codes_of<Bits, 2 * J + 1>(tile + 16 * v));
    w[2 * v] = vreinterpretq_s8_s32(vzip1q_s32(early, late));
    w[2 * v + 1] = vreinterpretq_s8_s32(vzip2q_s32(early, late));
  }
}

// Keeps the compiler from holding in registers, or on the stack as well, what lies there.
inline void forget(float*& p) { __asm__("" : "+r"(p)); }

template <int Pairs, int Bits, int J>
inline void add_eight(const uint8_t* tile, const int8x16_t (*x)[2], int32x4_t (*acc)[4]) {
  int8x16_t w[4];
  weights<Bits, J>(tile, w);
#pragma GCC unroll 3
  for (int p = 0; p < Pairs; ++p)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[p][r] = vmmlaq_s32(acc[p][r], w[r], x[p][J % 2]);
}

// acc[pair of columns][pair of rows]; the last of an odd number of columns is paired with itself.
template <int C, int Bits>
inline void dot_block(const uint8_t* tile, const int8_t* a, int32x4_t (*acc)[4]) {
  constexpr int pairs = (C + 1) / 2;
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < 4; ++r) acc[p][r] = vdupq_n_s32(0);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    int8x16_t x[pairs][2];  // eight columns of the weights each, for both of the pair
#pragma GCC unroll 3
    for (int p = 0; p < pairs; ++p) {
      const int second = 2 * p + 1 < C ? 2 * p + 1 : 2 * p;
      const int64x2_t one = vreinterpretq_s64_s8(vld1q_s8(a + 64 * p + 16 * half));
      const int64x2_t other = vreinterpretq_s64_s8(vld1q_s8(a + 32 * second + 16 * half));
      x[p][0] = vreinterpretq_s8_s64(vzip1q_s64(one, other)), x[p][1] = vreinterpretq_s8_s64(vzip2q_s64(one, other));
    }
    if (half == 0) {
      add_eight<pairs, Bits, 0>(tile, x, acc), add_eight<pairs, Bits, 1>(tile, x, acc);
    } else {
      add_eight<pairs, Bits, 2>(tile, x, acc), add_eight<pairs, Bits, 3>(tile, x, acc);
    }
  }
}

// Eight rows from `first` on.
template <int C, int Bits>
void dots(const glm4_weight* w, int64_t tile, int first, const glm4_panel* x, float* out) {
  constexpr int pairs = (C + 1) / 2;
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS, blocks = w->k / GLM4_COLS;
  const int shift = static_cast<int>(per_group / 2);  // 1, 2 or 4 blocks are a group
  const uint8_t* codes = w->qweight + tile * blocks * (64 * Bits) + 4 * first;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + first;
  const int8_t* a = reinterpret_cast<const int8_t*>(x->quads);
  const float* by = x->scale;
  float sums[pairs * 16] = {};  // of each accumulator: there are not enough registers for both
  for (int64_t b = 0; b < blocks; ++b, codes += 64 * Bits, a += 32 * C, by += C) {
    int32x4_t acc[pairs][4];
    dot_block<C, Bits>(codes, a, acc);
    const uint16x8_t bytes = vmovl_u8(vld1_u8(scales + (b >> shift) * GLM4_ROWS));
    const int32x4_t low = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(bytes)));
    const int32x4_t high = vreinterpretq_s32_u32(vmovl_high_u16(bytes));
    const int32x4_t s[4] = {vzip1q_s32(low, low), vzip2q_s32(low, low), vzip1q_s32(high, high),
                            vzip2q_s32(high, high)};  // each row twice
    float* total = sums;
    forget(total);
#pragma GCC unroll 3
    for (int p = 0; p < pairs; ++p) {
      const float32x2_t both = 2 * p + 1 < C ? vld1_f32(by + 2 * p) : vld1_dup_f32(by + 2 * p);
      const float32x4_t scale = vcombine_f32(both, both);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        float* at = total + 16 * p + 4 * r;
        vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(vmulq_s32(acc[p][r], s[r])), scale));
      }
    }
  }
  for (int p = 0; p < pairs; ++p)
    for (int r = 0; r < 4; r += 2) {
      float* to = out + GLM4_ROWS * 2 * p + first + 2 * r;
      const float32x4_t early = vld1q_f32(sums + 16 * p + 4 * r), late = vld1q_f32(sums + 16 * p + 4 * r + 4);
      vst1q_f32(to, vuzp1q_f32(early, late));
      if (2 * p + 1 < C) vst1q_f32(to + GLM4_ROWS, vuzp2q_f32(early, late));
    }
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  for (int first = 0; first < GLM4_ROWS; first += 8) {
    switch (w->bits) {
      case 2: dots<C, 2>(w, tile, first, x, dot); break;
      case 3: dots<C, 3>(w, tile, first, x, dot); break;
      case 4: dots<C, 4>(w, tile, first, x, dot); break;
      case 5: dots<C, 5>(w, tile, first, x, dot); break;
      case 6: dots<C, 6>(w, tile, first, x, dot); break;
      default: dots<C, 8>(w, tile, first, x, dot);
    }
  }
  if (w->bits < 8) glm4_mins_neon(w, tile, x, min);
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
