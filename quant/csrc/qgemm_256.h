// One row tile times panels of activations, written once for AVX2 and AVX-VNNI over the few operations in which they
// differ; qgemm_<isa>.cpp defines those and includes this file (internal linkage: each has its own copy).
//
// A register holds four columns of eight rows, kHalves of them a tile. One panel is multiplied with the codes as they
// lie in memory, and so are two. For more, pieces of the tile are unpacked into the first-level cache, one byte a code,
// in the order of 8-bit weights, and all panels go through a piece before the next one. A sum is added up in the same
// order either way.
#ifndef GLM4LITE_QGEMM_256_H
#define GLM4LITE_QGEMM_256_H

#include <string.h>

#include "qgemm.h"

namespace {

constexpr int kHalves = 2;
constexpr int kMostPacked = 2;  // panels for which unpacking costs more than it saves
constexpr int64_t kPiece = 16;  // blocks of 32 columns that are unpacked at once: 8 KiB
constexpr int64_t kBlockBytes = GLM4_ROWS * GLM4_COLS;  // of an unpacked block

// Asks for codes of `Bits` bits, for the second-level cache, long before they are used: the processor's own prefetching
// loses its way among several streams. It is left alone with one column of 8 bits, which waits for memory only.
template <int Bits>
inline void fetch_ahead(const uint8_t* codes) {
  constexpr int ahead = 8192;
  for (int i = 0; i < Bits; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + ahead + 64 * i), _MM_HINT_T1);
}

// Keeps the compiler from changing the order of the additions, or from reading again what it has read: either costs it
// the registers.
inline void settle(Ints& v) { __asm__("" : "+x"(v)); }

// Keeps it from holding in registers, or on the stack as well, what lies there.
inline void forget(float*& p) { __asm__("" : "+r"(p)); }

inline Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Floats bytes_to_float(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Four columns of the tile with quad `j` of every column of the panel.
template <int C, int Bits>
inline void add_quad(const Ints* w, const int32_t* a, int j, const Scale* s, Ints (*sum)[kHalves]) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    const Ints x = _mm256_set1_epi32(a[8 * c + j]);
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      sum[c][h] = add_products<Bits>(sum[c][h], w[h], x, s[h]);
      settle(sum[c][h]);
    }
  }
}

template <int C, int Bits, bool Packed>
inline void add_block(const uint8_t* codes, const int32_t* a, const Scale* s, Ints (*sum)[kHalves]) {
  if constexpr (Packed) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Ints v[kHalves] = {load(codes + 64 * j), load(codes + 64 * j + 32)};
      const Ints low[kHalves] = {low_nibbles(v[0]), low_nibbles(v[1])};
      add_quad<C, Bits>(low, a, 2 * j, s, sum);
      const Ints high[kHalves] = {high_nibbles(v[0]), high_nibbles(v[1])};
      add_quad<C, Bits>(high, a, 2 * j + 1, s, sum);
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const Ints w[kHalves] = {as_factor<Bits>(load(codes + 64 * j)), as_factor<Bits>(load(codes + 64 * j + 32))};
      add_quad<C, Bits>(w, a, j, s, sum);
    }
  }
}

// Adds a group's minima times the activations' sum.
template <int C>
inline void add_min(const uint8_t* m, const float* group_sum, Floats (*total)[kHalves]) {
  const Floats v[kHalves] = {bytes_to_float(m), bytes_to_float(m + 8)};
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) total[c][h] = _mm256_fmadd_ps(v[h], _mm256_set1_ps(group_sum[c]), total[c][h]);
}

template <int C>
inline void load_sums(const float* from, Floats (*total)[kHalves]) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) total[c][h] = _mm256_loadu_ps(from + GLM4_ROWS * c + 8 * h);
}

template <int C>
inline void store_sums(const Floats (*total)[kHalves], float* to) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) _mm256_storeu_ps(to + GLM4_ROWS * c + 8 * h, total[c][h]);
}

// Groups begin..end-1 of one tile, whose codes of those groups are at `codes`, with one panel; adds to dot and min.
template <int C, int Bits, bool Packed>
void dots(const glm4_weight* w, int64_t tile, int64_t begin, int64_t end, const uint8_t* codes, const glm4_panel* x,
          float* dot, float* min) {
  constexpr bool alone = C == 1, with_mins = alone && Bits == 4;  // one column has the registers for its float sums
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const int shift = static_cast<int>(per_group / 2);  // 1, 2 or 4 blocks are a group
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS;
  const uint8_t* mins = Bits == 4 ? w->mins + tile * groups * GLM4_ROWS : nullptr;
  const int32_t *a = x->quads + begin * per_group * 8 * C, *sums = x->sum + begin * per_group * C;
  const float* by = x->scale + begin * per_group * C;
  Floats total[C][kHalves], low[C][kHalves];
  if (alone) load_sums<C>(dot, total);
  if (with_mins) load_sums<C>(min, low);
  for (int64_t b = begin * per_group; b < end * per_group; ++b) {
    const int64_t g = b >> shift;
    if (with_mins && b == g << shift) add_min<C>(mins + g * GLM4_ROWS, x->group_sum + g * C, low);
    const Scale s[kHalves] = {scale_of<0>(scales + g * GLM4_ROWS), scale_of<1>(scales + g * GLM4_ROWS)};
    if (Packed || (Bits == 8 && C > 1)) fetch_ahead<Bits>(codes);
    Ints sum[C][kHalves];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) sum[c][0] = sum[c][1] = first_sum<Bits>(sums[c]);
    add_block<C, Bits, Packed>(codes, a, s, sum);
    if (!alone) forget(dot);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        if (alone) {
          total[c][h] = add_scaled<Bits>(sum[c][h], s[h], by[c], total[c][h]);
        } else {
          float* at = dot + GLM4_ROWS * c + 8 * h;
          _mm256_storeu_ps(at, add_scaled<Bits>(sum[c][h], s[h], by[c], _mm256_loadu_ps(at)));
        }
      }
    codes += Packed ? kBlockBytes / 2 : kBlockBytes, a += 8 * C, by += C, sums += C;
  }
  if (alone) store_sums<C>(total, dot);
  if (with_mins) return store_sums<C>(low, min);
  if (Bits == 8) return;
  load_sums<C>(min, low);
  for (int64_t g = begin; g < end; ++g) add_min<C>(mins + g * GLM4_ROWS, x->group_sum + g * C, low);
  store_sums<C>(low, min);
}

// Four-bit codes in the order of eight-bit ones.
void unpack(const uint8_t* codes, int64_t blocks, uint8_t* to) {
  for (; blocks > 0; --blocks) {
    fetch_ahead<4>(codes);
    for (int j = 0; j < 4; ++j, codes += 64, to += 128)
      for (int h = 0; h < kHalves; ++h) {
        const Ints both = load(codes + 32 * h);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h), low_nibbles(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h + 64), high_nibbles(both));
      }
  }
}

using Dots = void (*)(const glm4_weight*, int64_t, int64_t, int64_t, const uint8_t*, const glm4_panel*, float*, float*);

template <int C>
constexpr Dots choose(int width, int bits, bool packed) {
  if constexpr (C == 0) {
    return nullptr;
  } else {
    if (width != C) return choose<C - 1>(width, bits, packed);
    return bits == 8 ? dots<C, 8, false> : packed ? dots<C, 4, true> : dots<C, 4, false>;
  }
}

// glm4_tile_kernel of an ISA whose widest panel has `Width` columns.
template <int Width>
void multiply_tile(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  const int64_t groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const int64_t step = count == 1 ? groups : kPiece / per_group;
  const bool packed = count <= kMostPacked, unpacking = w->bits == 4 && !packed;
  const uint8_t* codes = w->qweight + tile * (w->k / GLM4_COLS) * 64 * w->bits;
  alignas(32) uint8_t piece[kPiece * kBlockBytes];
  for (int64_t begin = 0; begin < groups; begin += step, codes += step * per_group * 64 * w->bits) {
    const int64_t end = begin + step < groups ? begin + step : groups;
    if (unpacking) unpack(codes, (end - begin) * per_group, piece);
    float *to = dot, *low = min;
    for (int64_t p = 0; p < count; to += GLM4_ROWS * x[p].width, low += GLM4_ROWS * x[p].width, ++p) {
      if (begin == 0) memset(to, 0, sizeof(float) * GLM4_ROWS * x[p].width);
      if (begin == 0) memset(low, 0, sizeof(float) * GLM4_ROWS * x[p].width);
      choose<Width>(x[p].width, w->bits, packed)(w, tile, begin, end, unpacking ? piece : codes, x + p, to, low);
    }
  }
}

}  // namespace

#endif
