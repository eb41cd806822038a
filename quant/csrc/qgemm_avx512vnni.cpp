// AVX-512 VNNI: one register holds four columns of all 16 rows; vpdpbusd adds their products with four broadcast
// activations. Per 512 four-bit weights and one column: 4 loads, 12 mask/shift, 8 vpdpbusd, 3 for the scales; of three
// bits 3 loads, 30 mask/shift and as many of the rest.
#include <immintrin.h>

#include "qgemm.h"

namespace {

inline __m512 bytes_to_float(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Sums of one column that do not wait for each other: vpdpbusd takes four cycles, and eight in a row are more than the
// processor can hide behind the next blocks (int4 at one column ran half as fast).
template <int C>
constexpr int kChains = C == 1 ? 4 : C <= 3 ? 2 : 1;

template <int C>
inline void add_chains(__m512i acc[][kChains<C>], __m512i* out) {
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
    for (int half = kChains<C> / 2; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) acc[c][i] = _mm512_add_epi32(acc[c][i], acc[c][i + half]);
    out[c] = acc[c][0];
  }
}

// Loaded once: the compiler would read it for each use, and the loads are what limits.
inline __m512i load_once(const uint8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  __asm__("" : "+v"(v));
  return v;
}

// The digits at bit `From` of each byte moved to bit `To`; what stands beside them is of other codes.
template <int From, int To>
inline __m512i moved(__m512i v) {
  if constexpr (From == To) return v;
  return From > To ? _mm512_srli_epi16(v, From > To ? From - To : 0) : _mm512_slli_epi16(v, From > To ? 0 : To - From);
}

// `low` with the digits of `mask` taken from `high`.
inline __m512i with_digits(__m512i low, __m512i high, int mask) {
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(static_cast<char>(mask)), 0xF8);  // a | (b & c)
}

// The planes of a block whose vectors are of use for more than one pair of quads.
struct Held {
  __m512i two, one;
};

// Codes of quads 2j and 2j + 1 of a block.
template <int Bits, int J>
inline void codes_of(const uint8_t* tile, Held& held, __m512i* w) {
  constexpr bool four = (Bits & 4) != 0, two = (Bits & 2) != 0, one = (Bits & 1) != 0;
  constexpr int at_two = four ? 4 : 0, at_one = Bits - 1;  // the lowest digit of each plane
  if constexpr (four) {
    const __m512i v = load_once(tile + 64 * J), nibble = _mm512_set1_epi8(15);
    w[0] = _mm512_and_si512(v, nibble), w[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
  }
  if constexpr (two) {
    if (J % 2 == 0) held.two = load_once(tile + (four ? 256 : 0) + 32 * J);
    constexpr int bit = J % 2 * 4, mask = 3 << at_two;
    const __m512i v[2] = {moved<bit, at_two>(held.two), moved<bit + 2, at_two>(held.two)};
    for (int i = 0; i < 2; ++i)
      w[i] = four ? with_digits(w[i], v[i], mask) : _mm512_and_si512(v[i], _mm512_set1_epi8(mask));
  }
  if constexpr (one) {
    if (J == 0) held.one = load_once(tile + 64 * (Bits - 1));
    w[0] = with_digits(w[0], moved<2 * J, at_one>(held.one), 1 << at_one);
    w[1] = with_digits(w[1], moved<2 * J + 1, at_one>(held.one), 1 << at_one);
  }
}

template <int C, int Bits, int J>
inline void add_quads(const uint8_t* tile, const int32_t* a, Held& held, __m512i (*acc)[kChains<C>]) {
  __m512i w[2];
  codes_of<Bits, J>(tile, held, w);
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    __m512i &even = acc[c][2 * J % kChains<C>], &odd = acc[c][(2 * J + 1) % kChains<C>];
    even = _mm512_dpbusd_epi32(even, w[0], _mm512_set1_epi32(a[8 * c + 2 * J]));
    odd = _mm512_dpbusd_epi32(odd, w[1], _mm512_set1_epi32(a[8 * c + 2 * J + 1]));
  }
}

template <int C, int Bits>
inline void dot_affine(const uint8_t* tile, const int32_t* a, __m512i* out) {
  __m512i acc[C][kChains<C>];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c)
    for (int i = 0; i < kChains<C>; ++i) acc[c][i] = _mm512_setzero_si512();
  Held held{};
  add_quads<C, Bits, 0>(tile, a, held, acc), add_quads<C, Bits, 1>(tile, a, held, acc);
  add_quads<C, Bits, 2>(tile, a, held, acc), add_quads<C, Bits, 3>(tile, a, held, acc);
  add_chains<C>(acc, out);
}

// vpdpbusd wants unsigned weights: 128 is added to each and its product with the activations taken off beforehand.
template <int C>
inline void dot_int8(const uint8_t* tile, const int32_t* a, const int32_t* sum, __m512i* out) {
  const __m512i sign = _mm512_set1_epi8(-128);
  __m512i acc[C][kChains<C>];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    acc[c][0] = _mm512_set1_epi32(-128 * sum[c]);
    for (int i = 1; i < kChains<C>; ++i) acc[c][i] = _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * j), sign);
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      __m512i& to = acc[c][j % kChains<C>];
      to = _mm512_dpbusd_epi32(to, v, _mm512_set1_epi32(a[8 * c + j]));
    }
  }
  add_chains<C>(acc, out);
}

// Asks for the codes of a block long before they are used: the processor's own prefetching loses its way among several
// streams. One column waits for memory and gains nothing from the second-level cache; few columns of 8 bits are left
// to the processor.
template <int C, int Bits>
inline void fetch_ahead(const uint8_t* codes) {
  if (Bits == 8 && C <= 4) return;
  for (int i = 0; i < Bits; ++i)
    if (C == 1) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 4096 + 64 * i), _MM_HINT_T0);
    } else {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 16384 + 64 * i), _MM_HINT_T1);
    }
}

constexpr int kFewColumns = 2;  // so few wait for each other's results, not for the multiplier

template <int C>
inline void add_min(const uint8_t* m, const float* group_sum, __m512* total) {
  const __m512 v = bytes_to_float(m);
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) total[c] = _mm512_fmadd_ps(v, _mm512_set1_ps(group_sum[c]), total[c]);
}

// With few columns the minima are added on the way: a pass of their own would wait for each addition.
template <int C, int Bits>
void dots(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* out, float* min) {
  constexpr bool few = C <= kFewColumns, with_mins = few && Bits < 8;
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * (64 * Bits);
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS;
  const int32_t *a = x->quads, *sum = x->sum;
  const float* scale = x->scale;
  __m512 total[C], low[C];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) total[c] = low[c] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    if (with_mins) add_min<C>(w->mins + (tile * groups + g) * GLM4_ROWS, x->group_sum + g * C, low);
    const __m512 s = bytes_to_float(scales + g * GLM4_ROWS);
    for (int64_t b = 0; b < per_group; ++b) {
      fetch_ahead<C, Bits>(codes);
      __m512i acc[C];
      if constexpr (Bits < 8) {
        dot_affine<C, Bits>(codes, a, acc);
      } else {
        dot_int8<C>(codes, a, sum, acc);
      }
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c)
        total[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[c]), _mm512_mul_ps(s, _mm512_set1_ps(scale[c])), total[c]);
      codes += 64 * Bits, a += 8 * C, scale += C, sum += C;
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    _mm512_storeu_ps(out + GLM4_ROWS * c, total[c]);
    if (with_mins) _mm512_storeu_ps(min + GLM4_ROWS * c, low[c]);
  }
}

// The minima of all groups, in the same order for every width: a row has the same bits alone and in a batch.
template <int C>
void mins(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* out) {
  const int64_t groups = w->k / w->group;
  const uint8_t* m = w->mins + tile * groups * GLM4_ROWS;
  __m512 total[C];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) total[c] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) add_min<C>(m + g * GLM4_ROWS, x->group_sum + g * C, total);
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + GLM4_ROWS * c, total[c]);
}

template <int C>
void tile_of(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  switch (w->bits) {
    case 2: dots<C, 2>(w, tile, x, dot, min); break;
    case 3: dots<C, 3>(w, tile, x, dot, min); break;
    case 4: dots<C, 4>(w, tile, x, dot, min); break;
    case 5: dots<C, 5>(w, tile, x, dot, min); break;
    case 6: dots<C, 6>(w, tile, x, dot, min); break;
    default: return dots<C, 8>(w, tile, x, dot, nullptr);
  }
  if (C > kFewColumns) mins<C>(w, tile, x, min);
}

using OnePanel = void (*)(const glm4_weight*, int64_t, const glm4_panel*, float*, float*);
constexpr OnePanel kByWidth[GLM4_AVX512VNNI_WIDTH] = {
    tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>,  tile_of<5>,  tile_of<6>,
    tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};

}  // namespace

void glm4_tile_avx512vnni(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  for (; count > 0; dot += GLM4_ROWS * x->width, min += GLM4_ROWS * x->width, ++x, --count)
    kByWidth[x->width - 1](w, tile, x, dot, min);
}
