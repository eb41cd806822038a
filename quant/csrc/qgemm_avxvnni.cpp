// AVX-VNNI: AVX2's registers with vpdpbusd, for processors without AVX-512. Eight rows (half a tile) to a register.
#include <immintrin.h>

#include "qgemm.h"

namespace {

inline __m256 bytes_to_float(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

template <int C>
inline void dot_int4(const uint8_t* tile, const int32_t* a, __m256i* acc) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i v = load(tile + 64 * j);
    const __m256i low = _mm256_and_si256(v, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) {
      acc[c] = _mm256_dpbusd_avx_epi32(acc[c], low, _mm256_set1_epi32(a[8 * c + 2 * j]));
      acc[c] = _mm256_dpbusd_avx_epi32(acc[c], high, _mm256_set1_epi32(a[8 * c + 2 * j + 1]));
    }
  }
}

// vpdpbusd wants unsigned weights: 128 is added to each and its product with the activations taken off beforehand.
template <int C>
inline void dot_int8(const uint8_t* tile, const int32_t* a, const int32_t* sum, __m256i* acc) {
  const __m256i sign = _mm256_set1_epi8(-128);
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) acc[c] = _mm256_set1_epi32(-128 * sum[c]);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i v = _mm256_xor_si256(load(tile + 64 * j), sign);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) acc[c] = _mm256_dpbusd_avx_epi32(acc[c], v, _mm256_set1_epi32(a[8 * c + j]));
  }
}

// Halves first..first + H - 1 of a tile: one column reads both at once, more columns need the registers.
template <int C, int H, int Bits>
void dots(const glm4_weight* w, int64_t tile, int first, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * (64 * Bits) + 32 * first;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + 8 * first;
  const int32_t *a = x->quads, *sum = x->sum;
  const float* scale = x->scale;
  __m256 total[H][C];
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) total[h][c] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < per_group; ++b) {
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const __m256 s = bytes_to_float(scales + g * GLM4_ROWS + 8 * h);
        __m256i acc[C];
        if (Bits == 4) {
          dot_int4<C>(codes + 32 * h, a, acc);
        } else {
          dot_int8<C>(codes + 32 * h, a, sum, acc);
        }
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
          const __m256 by = _mm256_mul_ps(s, _mm256_set1_ps(scale[c]));
          total[h][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[c]), by, total[h][c]);
        }
      }
      codes += 64 * Bits, a += 8 * C, scale += C, sum += C;
    }
  }
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + GLM4_ROWS * c + 8 * (first + h), total[h][c]);
}

template <int C>
void mins(const glm4_weight* w, int64_t tile, int half, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group;
  const uint8_t* m = w->mins + tile * groups * GLM4_ROWS + 8 * half;
  __m256 total[C];
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) total[c] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 v = bytes_to_float(m + g * GLM4_ROWS);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) total[c] = _mm256_fmadd_ps(v, _mm256_set1_ps(x->group_sum[g * C + c]), total[c]);
  }
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + GLM4_ROWS * c + 8 * half, total[c]);
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  constexpr int at_once = C == 1 ? 2 : 1;
  for (int half = 0; half < 2; half += at_once) {
    if (w->bits == 8) {
      dots<C, at_once, 8>(w, tile, half, x, dot);
    } else {
      dots<C, at_once, 4>(w, tile, half, x, dot);
    }
  }
  if (w->bits == 8) return;
  for (int half = 0; half < 2; ++half) mins<C>(w, tile, half, x, min);
}

constexpr glm4_tile_kernel kByWidth[GLM4_AVXVNNI_WIDTH] = {tile_of<1>, tile_of<2>, tile_of<3>,
                                                           tile_of<4>, tile_of<5>, tile_of<6>};

}  // namespace

void glm4_tile_avxvnni(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  kByWidth[x->width - 1](w, tile, x, dot, min);
}
