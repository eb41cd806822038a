// Float vectors of the width an ISA file is compiled for. Included by ISA files only, inside an anonymous namespace:
// nothing here may be shared between them, for the linker keeps one copy, maybe one that crashes elsewhere.
#ifndef GLM4LITE_VECTOR_H
#define GLM4LITE_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define GLM4_LANES 16
#elif defined(__AVX2__)
#define GLM4_LANES 8
#else
#define GLM4_LANES 4
#endif

namespace {

typedef float Vec __attribute__((vector_size(4 * GLM4_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * GLM4_LANES)));

inline Vec all(float v) { return v - Vec{}; }  // minus zero changes no float: one broadcast
inline Ints bits_of(Vec v) { return reinterpret_cast<Ints>(v); }
inline Vec float_of(Ints v) { return reinterpret_cast<Vec>(v); }
inline Vec choose(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }
// By name, for GCC 12 turns __builtin_convertvector from bytes, and a loop too, into scalar conversions: 40 cycles.
inline Vec widen(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON)
  int32_t four;
  memcpy(&four, p, sizeof(four));
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
  Vec r;
  for (int i = 0; i < GLM4_LANES; ++i) r[i] = p[i];
  return r;
#endif
}

// The lowest bytes of 32 whole numbers. By name for the same reason.
inline void narrow(const Ints* v, int8_t* to) {
#if defined(__AVX512F__)
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + i, _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v[i])));
#elif defined(__AVX2__)
  __m256i low[4];
  for (int i = 0; i < 4; ++i) low[i] = _mm256_and_si256(reinterpret_cast<__m256i>(v[i]), _mm256_set1_epi32(255));
  const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(low[0], low[1]), _mm256_packus_epi32(low[2], low[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__ARM_NEON)
  for (int i = 0; i < 8; i += 2) {
    const int16x4_t first = vmovn_s32(reinterpret_cast<int32x4_t>(v[i]));
    const int16x4_t second = vmovn_s32(reinterpret_cast<int32x4_t>(v[i + 1]));
    vst1_s8(to + 4 * i, vmovn_s16(vcombine_s16(first, second)));
  }
#else
  for (int i = 0; i < 32; ++i) to[i] = static_cast<int8_t>(v[i / GLM4_LANES][i % GLM4_LANES]);
#endif
}

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }
inline Vec larger(Vec a, Vec b) { return choose(a < b, b, a); }
inline Vec magnitude(Vec v) { return float_of(bits_of(v) & 0x7fffffff); }

// The lower lanes with the upper ones until one is left; everywhere in this order, which a sum of floats depends on.
template <class F>
inline float reduce(Vec v, F both) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = both(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
  const __m256 eight = v;
#endif
  const __m128 four = both(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = both(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(both(two, _mm_movehdup_ps(two)));
#else
  float part[GLM4_LANES];
  memcpy(part, &v, sizeof(v));
  for (int half = GLM4_LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = both(part[i], part[i + half]);
  return part[0];
#endif
}

inline float sum_of(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
inline float largest_of(Vec v) {
  return reduce(v, [](auto a, auto b) { return a < b ? b : a; });
}

// e^x with a relative error below 2e-7 (Cephes' polynomial); 0 below -87, e^87 above 87, NaN for NaN.
inline Vec exponential(Vec x) {
  x = choose(x < all(-87.0f), all(-87.5f), x);
  x = choose(all(87.0f) < x, all(87.0f), x);
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x * all(1.44269504f) + magic, n = shifted - magic;
  const Vec r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
  Vec p = r * all(1.9875691500e-4f) + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  const Vec power = float_of((bits_of(shifted) << 23) + (bits_of(all(1.0f)) & 0x7fffffff));
  return choose(x < all(-87.0f), all(0.0f), p * power);
}

}  // namespace

#endif
