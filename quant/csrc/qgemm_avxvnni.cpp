// AVX-VNNI: AVX2's registers with vpdpbusd, for processors without AVX-512.
#include <immintrin.h>

#include <stdint.h>

namespace {

using Ints = __m256i;
using Floats = __m256;
using Scale = __m256;  // of eight rows

template <int Half>
inline Scale scale_of(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * Half))));
}

// vpdpbusd wants unsigned weights: 128 is added to those of 8 bits and its product with the activations taken off first.
template <int Bits>
inline Ints as_factor(Ints w) {
  return Bits == 8 ? _mm256_xor_si256(w, _mm256_set1_epi8(-128)) : w;
}

template <int Bits>
inline Ints first_sum(int32_t codes) {
  return Bits == 8 ? _mm256_set1_epi32(-128 * codes) : _mm256_setzero_si256();
}

template <int Bits>
inline void add_products(Ints* sum, const Ints* w, Ints x, const Scale*) {
  for (int h = 0; h < 2; ++h) {
#if defined(GLM4LITE_EVEX_VNNI)  // for tests: AVX-512's code of the same instruction, on hosts that have only that
    __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum[h]) : "x"(w[h]), "x"(x));
#else
    sum[h] = _mm256_dpbusd_avx_epi32(sum[h], w[h], x);
#endif
  }
}

template <int Bits>
inline Floats add_scaled(Ints sum, Scale s, Floats by, Floats total) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(s, by), total);
}

}  // namespace

#include "qgemm_256.h"

void glm4_tile_avxvnni(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  multiply_tile<GLM4_AVXVNNI_WIDTH>(w, tile, x, count, dot, min);
}
