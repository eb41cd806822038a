// AVX2: vpmaddubsw adds pairs of products in 16 bits.
#include <immintrin.h>

#include <stdint.h>

namespace {

using Ints = __m256i;
using Floats = __m256;
using Scale = __m256i;  // of eight rows: twice 16 bits each, for vpmaddwd

template <int Half>
inline Scale scale_of(const uint8_t* p) {
  constexpr char r = 8 * Half, z = -1;
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_shuffle_epi8(
      twice, _mm256_setr_epi8(r, z, r, z, r + 1, z, r + 1, z, r + 2, z, r + 2, z, r + 3, z, r + 3, z, r + 4, z, r + 4,
                              z, r + 5, z, r + 5, z, r + 6, z, r + 6, z, r + 7, z, r + 7, z));
}

template <int Bits>
inline Ints as_factor(Ints w) {
  return w;
}

template <int Bits>
inline Ints first_sum(int32_t) {
  return _mm256_setzero_si256();
}

// Up to 4 bits: a lane of 16 bits adds 8 pairs of at most 2 * 15 * 127 each, 30480 in all.
// 5 and 6 bits: a pair is at most 2 * 63 * 127 = 16002, with the scale 2^22, and a lane of 32 bits stays below 2^26.
// 8 bits: the weight's sign moves to the activation; |w| <= 128 and |x| <= 127, so a pair is at most 32512. With the
// scale a lane of 32 bits stays below 2^27.
// Both halves are multiplied before they are added: in turn takes 5 % longer (Zen 4).
template <int Bits>
inline void add_products(Ints* sum, const Ints* w, Ints x, const Scale* s) {
  if (Bits <= 4) {
    Ints low = _mm256_maddubs_epi16(w[0], x), high = _mm256_maddubs_epi16(w[1], x);
    __asm__("" : "+x"(low), "+x"(high));
    sum[0] = _mm256_add_epi16(sum[0], low), sum[1] = _mm256_add_epi16(sum[1], high);
    return;
  }
  for (int h = 0; h < 2; ++h) {
    const Ints pairs = Bits < 8 ? _mm256_maddubs_epi16(w[h], x)
                                : _mm256_maddubs_epi16(_mm256_abs_epi8(w[h]), _mm256_sign_epi8(x, w[h]));
    sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(pairs, s[h]));
    __asm__("" : "+x"(sum[h]));
  }
}

// Up to 4 bits the scale is multiplied while the sum is widened (15 * 127 * 32 * 255 < 2^24 is exact as a float).
template <int Bits>
inline Floats add_scaled(Ints sum, Scale s, Floats by, Floats total) {
  const Ints scaled = Bits <= 4 ? _mm256_madd_epi16(sum, s) : sum;
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(scaled), by, total);
}

}  // namespace

#include "qgemm_256.h"

void glm4_tile_avx2(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  multiply_tile<GLM4_AVX2_WIDTH>(w, tile, x, count, dot, min);
}
