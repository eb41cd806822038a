// AVX2: eight rows at a time (half a tile). vpmaddubsw adds pairs of products in 16 bits.
#include <immintrin.h>

#include "qgemm.h"

namespace {

inline __m256 bytes_to_float(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// A lane adds 8 pairs of at most 2 * 15 * 127 each: 30480 fits 16 bits, so one widening per block is enough.
template <int C>
inline void dot_int4(const uint8_t* tile, const int32_t* a, __m256i* acc) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i v = load(tile + 64 * j);
    const __m256i low = _mm256_and_si256(v, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      acc[c] = _mm256_add_epi16(acc[c], _mm256_maddubs_epi16(low, _mm256_set1_epi32(a[8 * c + 2 * j])));
      acc[c] = _mm256_add_epi16(acc[c], _mm256_maddubs_epi16(high, _mm256_set1_epi32(a[8 * c + 2 * j + 1])));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) acc[c] = _mm256_madd_epi16(acc[c], ones);
}

// The weight's sign moves to the activation: |w| <= 128 and |a| <= 127, so a pair is at most 32512 and fits 16 bits.
template <int C>
inline void dot_int8(const uint8_t* tile, const int32_t* a, __m256i* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i v = load(tile + 64 * j), size = _mm256_abs_epi8(v);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(a[8 * c + j]), v));
      acc[c] = _mm256_add_epi32(acc[c], _mm256_madd_epi16(pairs, ones));
    }
  }
}

template <int C, int Bits>
void dots(const glm4_weight* w, int64_t tile, int half, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * (64 * Bits) + 32 * half;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS + 8 * half;
  const int32_t* a = x->quads;
  const float* scale = x->scale;
  __m256 total[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) total[c] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 s = bytes_to_float(scales + g * GLM4_ROWS);
    for (int64_t b = 0; b < per_group; ++b) {
      __m256i acc[C];
      if (Bits == 4) {
        dot_int4<C>(codes, a, acc);
      } else {
        dot_int8<C>(codes, a, acc);
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        total[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[c]), _mm256_mul_ps(s, _mm256_set1_ps(scale[c])), total[c]);
      codes += 64 * Bits, a += 8 * C, scale += C;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + GLM4_ROWS * c + 8 * half, total[c]);
}

template <int C>
void mins(const glm4_weight* w, int64_t tile, int half, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group;
  const uint8_t* m = w->mins + tile * groups * GLM4_ROWS + 8 * half;
  __m256 total[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) total[c] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 v = bytes_to_float(m + g * GLM4_ROWS);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[c] = _mm256_fmadd_ps(v, _mm256_set1_ps(x->group_sum[g * C + c]), total[c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + GLM4_ROWS * c + 8 * half, total[c]);
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  for (int half = 0; half < 2; ++half) {
    if (w->bits == 8) {
      dots<C, 8>(w, tile, half, x, dot);
    } else {
      dots<C, 4>(w, tile, half, x, dot);
      mins<C>(w, tile, half, x, min);
    }
  }
}

constexpr glm4_tile_kernel kByWidth[GLM4_AVX2_WIDTH] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>};

}  // namespace

void glm4_tile_avx2(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  kByWidth[x->width - 1](w, tile, x, dot, min);
}
