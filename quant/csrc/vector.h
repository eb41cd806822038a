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

#if defined(__GNUC__) && !defined(GLM4LITE_PLAIN_VECTORS)  // the latter tests what other compilers get

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

#else  // a compiler without vector types: the same meaning, element by element

struct Ints {
  int32_t v[GLM4_LANES];
};
struct Vec {
  float v[GLM4_LANES];
  float& operator[](int i) { return v[i]; }
  float operator[](int i) const { return v[i]; }
};
template <class F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < GLM4_LANES; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
inline Ints each_int(F f) {
  Ints r;
  for (int i = 0; i < GLM4_LANES; ++i) r.v[i] = f(i);
  return r;
}
inline Vec all(float v) { return each([&](int) { return v; }); }
inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }
inline Ints operator<(Vec a, Vec b) { return each_int([&](int i) { return a.v[i] < b.v[i] ? -1 : 0; }); }
inline Ints operator<<(Ints a, int n) { return each_int([&](int i) { return a.v[i] << n; }); }
inline Ints operator&(Ints a, int32_t m) { return each_int([&](int i) { return a.v[i] & m; }); }
inline Ints operator+(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] + b.v[i]; }); }
inline Ints bits_of(Vec a) {
  Ints r;
  memcpy(&r, &a, sizeof(r));
  return r;
}
inline Vec float_of(Ints a) {
  Vec r;
  memcpy(&r, &a, sizeof(r));
  return r;
}
inline Vec choose(Ints m, Vec yes, Vec no) { return each([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; }); }
inline Vec widen(const int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }

#endif

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }
inline Vec larger(Vec a, Vec b) { return choose(a < b, b, a); }
inline Vec magnitude(Vec v) { return float_of(bits_of(v) & 0x7fffffff); }

inline float sum_of(Vec v) {
  float part[GLM4_LANES];
  store(part, v);
  for (int half = GLM4_LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

inline float largest_of(Vec v) {
  float part[GLM4_LANES];
  store(part, v);
  for (int half = GLM4_LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = part[i] < part[i + half] ? part[i + half] : part[i];
  return part[0];
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
