// One row tile times panels of activations, written once for AVX2 and AVX-VNNI over the few operations in which they
// differ; qgemm_<isa>.cpp defines those and includes this file (internal linkage: each has its own copy).
//
// A register holds four columns of eight rows, kHalves of them a tile. Few columns of activations are multiplied with the
// codes as they lie in memory. For more, pieces of the tile are prepared in the first-level cache: one byte a code, in the
// order of 8-bit weights, scales and minima as they are multiplied. All panels go through a piece before the next one. A
// sum is added up in the same order either way.
#ifndef GLM4LITE_QGEMM_256_H
#define GLM4LITE_QGEMM_256_H

#include <string.h>

#include "qgemm.h"

namespace {

constexpr int kHalves = 2;
constexpr int kDirect = GLM4_256_FEW;  // columns whose sums leave registers for unpacking; for twice as many it is cheaper
constexpr int64_t kPiece = 16;  // blocks of 32 columns in a piece
constexpr int64_t kBlockBytes = GLM4_ROWS * GLM4_COLS;  // of a block, one byte a code

struct Piece {
  alignas(32) uint8_t codes[kPiece * kBlockBytes];  // of weights of fewer than 8 bits
  Scale scales[kPiece][kHalves];                    // of each block
  Floats mins[kPiece][kHalves];                     // of each group
};

// Groups begin..end-1 of one tile.
struct Part {
  const glm4_weight* w;
  int64_t tile, begin, end;
  const uint8_t* codes;
  const Piece* piece;  // null: everything is read as it lies in memory

  int64_t per_group() const { return w->group / GLM4_COLS; }
  const uint8_t* scales() const { return w->scales + (tile * (w->k / w->group) + begin) * GLM4_ROWS; }
  const uint8_t* mins() const { return w->mins + (tile * (w->k / w->group) + begin) * GLM4_ROWS; }
};

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
inline Floats bytes_to_float(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// `count` digits at bit `From` of each byte moved to bit `To`, without what stands beside them.
template <int From, int To, int Count>
inline Ints digits(Ints v) {
  if (From > To) v = _mm256_srli_epi16(v, From > To ? From - To : 0);
  if (From < To) v = _mm256_slli_epi16(v, From < To ? To - From : 0);
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(((1 << Count) - 1) << To)));
}

// Codes of quad J of half a block's rows.
template <int Bits, int J>
inline Ints codes_of(const uint8_t* half) {
  constexpr bool four = (Bits & 4) != 0, two = (Bits & 2) != 0, one = (Bits & 1) != 0;
  Ints w{};
  if (four) w = digits<J % 2 * 4, 0, 4>(load(half + 64 * (J / 2)));
  if (two) w = _mm256_or_si256(w, digits<J % 4 * 2, four ? 4 : 0, 2>(load(half + (four ? 256 : 0) + 64 * (J / 4))));
  if (one) w = _mm256_or_si256(w, digits<J, Bits - 1, 1>(load(half + 64 * (Bits - 1))));
  return w;
}

// Four columns of the tile with quad `j` of every column of the panel.
template <int C, int Bits>
inline void add_quad(const Ints* w, const int32_t* a, int j, const Scale* s, Ints (*sum)[kHalves]) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    add_products<Bits>(sum[c], w, _mm256_set1_epi32(a[8 * c + j]), s);
    settle(sum[c][0]), settle(sum[c][1]);
  }
}

template <int C, int Bits, int J>
inline void add_packed(const uint8_t* codes, const int32_t* a, const Scale* s, Ints (*sum)[kHalves]) {
  if constexpr (J < 8) {
    const Ints w[kHalves] = {codes_of<Bits, J>(codes), codes_of<Bits, J>(codes + 32)};
    add_quad<C, Bits>(w, a, J, s, sum);
    add_packed<C, Bits, J + 1>(codes, a, s, sum);
  }
}

template <int C, int Bits, bool Packed>
inline void add_block(const uint8_t* codes, const int32_t* a, const Scale* s, Ints (*sum)[kHalves]) {
  if constexpr (Packed) {
    add_packed<C, Bits, 0>(codes, a, s, sum);
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
inline void add_min(Floats low, Floats high, const float* group_sum, Floats (*total)[kHalves]) {
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    const Floats by = _mm256_set1_ps(group_sum[c]);
    total[c][0] = _mm256_fmadd_ps(low, by, total[c][0]);
    total[c][1] = _mm256_fmadd_ps(high, by, total[c][1]);
  }
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

// Multiplies with a panel of C columns; adds to dot and min.
template <int C, int Bits, bool Prepared>
void dots(const Part& part, const glm4_panel* x, float* dot, float* min) {
  constexpr bool alone = C == 1, packed = Bits < 8 && !Prepared;
  constexpr bool with_mins = alone && packed;  // one column has the registers for its float sums
  const int64_t per_group = part.per_group(), first = part.begin * per_group, blocks = part.end * per_group - first;
  const int shift = static_cast<int>(per_group / 2);  // 1, 2 or 4 blocks are a group
  const uint8_t *codes = part.codes, *scales = part.scales(), *mins = Bits < 8 ? part.mins() : nullptr;
  const int32_t *a = x->quads + first * 8 * C, *sums = x->sum + first * C;
  const float *by = x->scale + first * C, *group_sum = x->group_sum + part.begin * C;
  Floats total[C][kHalves], low[C][kHalves];
  if (alone) load_sums<C>(dot, total);
  if (with_mins) load_sums<C>(min, low);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t g = b >> shift;
    if (with_mins && b == g << shift) {
      const uint8_t* m = mins + g * GLM4_ROWS;
      add_min<C>(bytes_to_float(m), bytes_to_float(m + 8), group_sum + g * C, low);
    }
    Scale own[kHalves];
    if (!Prepared) own[0] = scale_of<0>(scales + g * GLM4_ROWS), own[1] = scale_of<1>(scales + g * GLM4_ROWS);
    const Scale* s = Prepared ? part.piece->scales[b] : own;
    if (packed || (Bits == 8 && C > 1)) fetch_ahead<Bits>(codes);
    Ints sum[C][kHalves];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) sum[c][0] = sum[c][1] = first_sum<Bits>(sums[c]);
    add_block<C, Bits, packed>(codes, a, s, sum);
    if (!alone) forget(dot);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) {
      const Floats scale = _mm256_set1_ps(by[c]);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        if (alone) {
          total[c][h] = add_scaled<Bits>(sum[c][h], s[h], scale, total[c][h]);
        } else {
          float* at = dot + GLM4_ROWS * c + 8 * h;
          _mm256_storeu_ps(at, add_scaled<Bits>(sum[c][h], s[h], scale, _mm256_loadu_ps(at)));
        }
      }
    }
    codes += packed ? 64 * Bits : kBlockBytes, a += 8 * C, by += C, sums += C;
  }
  if (alone) store_sums<C>(total, dot);
  if (with_mins) return store_sums<C>(low, min);
  if (Bits == 8) return;
  load_sums<C>(min, low);
  for (int64_t g = 0; g < part.end - part.begin; ++g, mins += GLM4_ROWS, group_sum += C) {
    if (Prepared) {
      add_min<C>(part.piece->mins[g][0], part.piece->mins[g][1], group_sum, low);
    } else {
      add_min<C>(bytes_to_float(mins), bytes_to_float(mins + 8), group_sum, low);
    }
  }
  store_sums<C>(low, min);
}

// Codes of fewer bits in the order of eight-bit ones.
template <int Bits, int J = 0>
inline void unpack(const uint8_t* codes, uint8_t* to) {
  if constexpr (J < 8) {
    if (J == 0) fetch_ahead<Bits>(codes);
    for (int h = 0; h < kHalves; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * J + 32 * h), codes_of<Bits, J>(codes + 32 * h));
    unpack<Bits, J + 1>(codes, to);
  }
}

// Asks for the scales or minima of the piece after the next one.
inline void fetch_bytes(const uint8_t* groups) {
  for (int i = 0; i < 256; i += 64) _mm_prefetch(reinterpret_cast<const char*>(groups + 512 + i), _MM_HINT_T1);
}

template <int Bits>
void prepare(Part* part, Piece* piece) {
  const uint8_t *scales = part->scales(), *mins = Bits < 8 ? part->mins() : nullptr;
  fetch_bytes(scales);
  if (Bits < 8) fetch_bytes(mins);
  int64_t b = 0;
  for (int64_t g = 0; g < part->end - part->begin; ++g, scales += GLM4_ROWS) {
    for (const int64_t end = b + part->per_group(); b < end; ++b) {
      piece->scales[b][0] = scale_of<0>(scales), piece->scales[b][1] = scale_of<1>(scales);
      if constexpr (Bits < 8) unpack<Bits>(part->codes + b * (64 * Bits), piece->codes + b * kBlockBytes);
    }
    if (Bits == 8) continue;
    piece->mins[g][0] = bytes_to_float(mins), piece->mins[g][1] = bytes_to_float(mins + 8);
    mins += GLM4_ROWS;
  }
  part->piece = piece;
  if (Bits < 8) part->codes = piece->codes;
}

using Dots = void (*)(const Part&, const glm4_panel*, float*, float*);

template <int C, int Bits, bool Prepared>
constexpr Dots choose(int width) {
  if constexpr (C == 0) {
    return nullptr;
  } else {
    return width == C ? dots<C, Bits, Prepared> : choose<C - 1, Bits, Prepared>(width);
  }
}

template <int Width, int Bits>
void multiply_panels(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  const int64_t groups = w->k / w->group, bytes = w->group / GLM4_COLS * 64 * Bits;
  const uint8_t* codes = w->qweight + tile * groups * bytes;
  int64_t columns = 0;
  for (int64_t p = 0; p < count; ++p) columns += x[p].width;
  memset(dot, 0, sizeof(float) * GLM4_ROWS * columns);
  memset(min, 0, sizeof(float) * GLM4_ROWS * columns);
  const bool direct = columns <= 2 * kDirect && x[count - 1].width <= kDirect;  // the widest
  const int64_t step = direct && count == 1 ? groups : kPiece * GLM4_COLS / w->group;
  Piece piece;
  for (int64_t begin = 0; begin < groups; begin += step) {
    Part part{w, tile, begin, begin + step < groups ? begin + step : groups, codes + begin * bytes, nullptr};
    if (!direct) prepare<Bits>(&part, &piece);
    float *to = dot, *low = min;
    for (int64_t p = 0; p < count; to += GLM4_ROWS * x[p].width, low += GLM4_ROWS * x[p].width, ++p)
      (direct ? choose<kDirect, Bits, false>(x[p].width) : choose<Width, Bits, true>(x[p].width))(part, x + p, to, low);
  }
}

// glm4_tile_kernel of an ISA whose widest panel has `Width` columns.
template <int Width>
void multiply_tile(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  switch (w->bits) {
    case 2: return multiply_panels<Width, 2>(w, tile, x, count, dot, min);
    case 3: return multiply_panels<Width, 3>(w, tile, x, count, dot, min);
    case 4: return multiply_panels<Width, 4>(w, tile, x, count, dot, min);
    case 5: return multiply_panels<Width, 5>(w, tile, x, count, dot, min);
    case 6: return multiply_panels<Width, 6>(w, tile, x, count, dot, min);
    default: return multiply_panels<Width, 8>(w, tile, x, count, dot, min);
  }
}

}  // namespace

#endif
