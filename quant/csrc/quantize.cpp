// float weights -> codes, scales and mins. Every float operation is the reference's (kernels/reference.py), in its order,
// so that both give the same bytes; compiled without contraction into fused multiply-adds for that reason.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "qgemm.h"
#include "thread_pool.h"

namespace {

constexpr float kHuge = 1e18f;
constexpr float kPerByte = static_cast<float>(1.0 / 255), kPerInt8 = static_cast<float>(1.0 / 127);
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even

inline float inverse(float step) { return step > GLM4_TINY ? 1.0f / step : 0.0f; }
inline float round_even(float v) { return (v + kRound) - kRound; }
// Written as minps and maxps compare, so that the compiler may use them.
inline float least(float a, float b) { return a < b ? a : b; }
inline float most(float a, float b) { return a > b ? a : b; }
inline float clamp(float v, float low, float high) { return least(most(v, low), high); }

// Combines v[0..2H-1] by halves into v[0]: the reference's order, and whole registers at a time.
template <int H, class Combine>
inline void fold(float* v, Combine combine) {
  for (int i = 0; i < H; ++i) v[i] = combine(v[i], v[i + H]);
  if constexpr (H > 1) fold<H / 2>(v, combine);
}

// |v| as an integer that orders as the floats do, with infinity and NaN on top: this file is compiled for finite numbers.
inline int32_t magnitude(float v) {
  int32_t bits;
  memcpy(&bits, &v, 4);
  return bits & 0x7fffffff;
}

// Loads one row as float32; the column of the first value that cannot be quantized, or -1.
int64_t load_row(const glm4_matrix& m, int64_t row, int64_t k, float* out) {
  if (m.dtype == GLM4_FLOAT32) {
    memcpy(out, static_cast<const float*>(m.data) + row * m.stride, sizeof(float) * k);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(m.data) + row * m.stride;
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      memcpy(out + i, &bits, 4);
    }
  }
  const int32_t limit = magnitude(kHuge);
  int32_t top = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t m = magnitude(out[i]);
    top = m > top ? m : top;
  }
  if (top <= limit) return -1;
  int64_t i = 0;
  while (magnitude(out[i]) <= limit) ++i;
  return i;
}

template <int G>
float squared_error(const float* w, float top, float step, float low) {
  const float inv = inverse(step);
  float e[G];
  for (int i = 0; i < G; ++i) {
    const float code = round_even(clamp((w[i] + low) * inv, 0.0f, top));
    const float off = code * step - low - w[i];
    e[i] = off * off;
  }
  fold<G / 2>(e, [](float a, float b) { return a + b; });
  return e[0];
}

template <int G>
void search(const float* w, int shares, float top, float* step, float* low) {
  float small[G], large[G];
  memcpy(small, w, sizeof(small));
  memcpy(large, w, sizeof(large));
  fold<G / 2>(small, least);
  fold<G / 2>(large, most);
  const float whole = 0.0f - least(small[0], 0.0f), per_code = static_cast<float>(1.0 / top);
  float best = 3e38f;
  for (int i = 0; i < shares; ++i) {
    const float* share = GLM4_SHARES[i];
    const float m = whole * share[0], s = (large[0] * share[1] + m) * per_code;
    const float error = squared_error<G>(w, top, s, m);
    if (!(error < best)) continue;
    best = error, *step = s, *low = m;
  }
}

template <int G>
void search_groups(const float* w, int64_t groups, int shares, float top, float* step, float* low) {
  for (int64_t g = 0; g < groups; ++g) search<G>(w + g * G, shares, top, step + g, low + g);
}

void search_scalar(const float* row, int64_t k, int32_t group, int32_t shares, float top, float* step, float* low) {
  if (group == 32) return search_groups<32>(row, k / 32, shares, top, step, low);
  if (group == 64) return search_groups<64>(row, k / 64, shares, top, step, low);
  search_groups<128>(row, k / 128, shares, top, step, low);
}

glm4_search search_of(int32_t isa) {
#if defined(GLM4LITE_HAVE_AVX2)
  if (isa >= GLM4_AVX2) return glm4_search_avx2;
#endif
  (void)isa;
  return search_scalar;
}

glm4_tile_quantizer tile_quantizer_of(int32_t isa) {
#if defined(GLM4LITE_HAVE_AVX512VNNI)
  if (isa >= GLM4_AVX512VNNI) return glm4_quantize_tile_avx512;
#endif
#if defined(GLM4LITE_HAVE_AVX2)
  if (isa >= GLM4_AVX2) return glm4_quantize_tile_avx2;
#endif
  (void)isa;
  return glm4_quantize_tile_scalar;
}

glm4_tile_fitter tile_fitter_of(int32_t isa) {
#if defined(GLM4LITE_HAVE_AVX512VNNI)
  if (isa >= GLM4_AVX512VNNI) return glm4_fit_tile_avx512;
#endif
#if defined(GLM4LITE_HAVE_AVX2)
  if (isa >= GLM4_AVX2) return glm4_fit_tile_avx2;
#endif
  (void)isa;
  return glm4_fit_tile_scalar;
}

// One row of one tile: where its codes and bytes go.
struct RowTarget {
  const glm4_weight& w;
  int64_t tile;
  int row;

  uint8_t* codes(int64_t block) const {  // the row's first bytes
    return w.qweight + (tile * (w.k / GLM4_COLS) + block) * (64 * w.bits) + 4 * row;
  }
  uint8_t* plane(uint8_t* base, int64_t group) const {
    return base + (tile * (w.k / w.group) + group) * GLM4_ROWS + row;
  }
  int64_t n() const { return tile * GLM4_ROWS + row; }
  float top() const { return static_cast<float>((1 << w.bits) - 1); }  // the largest affine code
};

// A row's codes of a block, plane by plane: four codes at a time, one to a byte.
void store_codes(uint8_t* out, const uint8_t* codes, int bits) {
  uint32_t quads[8];
  memcpy(quads, codes, sizeof(quads));
  for (int digits = 8, at = 0; digits > 0; digits /= 2) {
    if (!(bits & digits)) continue;
    const uint32_t mask = ((1u << digits) - 1) * 0x01010101u;
    for (int quad = 0; quad < 8; out += 64) {
      uint32_t word = 0;
      for (int shift = 0; shift < 8; shift += digits, ++quad) word |= (quads[quad] >> at & mask) << shift;
      memcpy(out, &word, sizeof(word));
    }
    at += digits;
  }
}

void store_affine(const RowTarget& to, int64_t first, int group, const float* w, float step, float low) {
  const float inv = inverse(step), top = to.top();
  for (int b = 0; b < group / GLM4_COLS; ++b) {
    uint8_t q[GLM4_COLS];
    for (int i = 0; i < GLM4_COLS; ++i)
      q[i] = static_cast<uint8_t>(static_cast<int32_t>(round_even(clamp((w[32 * b + i] + low) * inv, 0.0f, top))));
    store_codes(to.codes(first / GLM4_COLS + b), q, to.w.bits);
  }
}

void store_int8(const RowTarget& to, int64_t first, int group, const float* w, float step) {
  const float inv = inverse(step);
  for (int b = 0; b < group / GLM4_COLS; ++b) {
    int8_t q[GLM4_COLS];
    for (int i = 0; i < GLM4_COLS; ++i)
      q[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(clamp(w[32 * b + i] * inv, -127.0f, 127.0f))));
    store_codes(to.codes(first / GLM4_COLS + b), reinterpret_cast<const uint8_t*>(q), 8);
  }
}

void row_affine(const RowTarget& to, const float* w, glm4_search search, int shares, float* step, float* low) {
  const int group = to.w.group;
  const int64_t groups = to.w.k / group;
  search(w, to.w.k, group, shares, to.top(), step, low);
  float top_step = 0.0f, top_low = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    top_step = std::max(top_step, step[g]);
    top_low = std::max(top_low, low[g]);
  }
  const float d = top_step * kPerByte, e = top_low * kPerByte, inv_d = inverse(d), inv_e = inverse(e);
  to.w.row_scale[to.n()] = d;
  to.w.row_min[to.n()] = e;
  for (int64_t g = 0; g < groups; ++g) {
    const float s = d > GLM4_TINY ? clamp(round_even(step[g] * inv_d), 1.0f, 255.0f) : 0.0f;
    const float m = clamp(round_even(low[g] * inv_e), 0.0f, 255.0f);
    *to.plane(to.w.scales, g) = static_cast<uint8_t>(s);
    *to.plane(to.w.mins, g) = static_cast<uint8_t>(m);
    store_affine(to, g * group, group, w + g * group, s * d, m * e);
  }
}

void row_int8(const RowTarget& to, const float* w, float* step) {
  const int group = to.w.group;
  const int64_t groups = to.w.k / group;
  float top = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    float lanes[GLM4_COLS] = {};
    for (int b = 0; b < group; b += GLM4_COLS)
      for (int i = 0; i < GLM4_COLS; ++i) lanes[i] = most(lanes[i], fabsf(w[g * group + b + i]));
    fold<GLM4_COLS / 2>(lanes, most);
    step[g] = lanes[0] * kPerInt8;
    top = std::max(top, step[g]);
  }
  const float d = top * kPerByte, inv_d = inverse(d);
  to.w.row_scale[to.n()] = d;
  for (int64_t g = 0; g < groups; ++g) {
    const float s = d > GLM4_TINY ? clamp(ceilf(step[g] * inv_d), 1.0f, 255.0f) : 0.0f;
    *to.plane(to.w.scales, g) = static_cast<uint8_t>(s);
    store_int8(to, g * group, group, w + g * group, s * d);
  }
}

// The last tile's rows past n: zero codes, scales and mins.
void clear_tile(const glm4_weight& w, int64_t tile) {
  const int64_t bytes = w.k / GLM4_COLS * 64 * w.bits, plane = w.k / w.group * GLM4_ROWS;
  memset(w.qweight + tile * bytes, 0, bytes);
  memset(w.scales + tile * plane, 0, plane);
  if (w.mins) memset(w.mins + tile * plane, 0, plane);
}

// The smallest row with a value that cannot be quantized; n where there is none.
class FirstBad {
 public:
  explicit FirstBad(int64_t n) : row_(n) {}
  int64_t row() const { return row_.load(); }
  void note(int64_t n) {
    int64_t seen = row_.load();
    while (n < seen && !row_.compare_exchange_weak(seen, n)) {
    }
  }

 private:
  std::atomic<int64_t> row_;
};

struct Job {
  const glm4_matrix& source;
  const glm4_weight& w;
  const glm4_inputs* inputs;
  int shares;
  glm4_search search;
  glm4_tile_quantizer quantize;

  bool by_tile() const { return w.bits < 8 && inputs; }
  int64_t scratch() const {
    return by_tile() ? w.k + GLM4_ROWS * (w.k + inputs->block + inputs->rank) : w.k + 2 * (w.k / w.group);
  }

  void row(const RowTarget& target, float* row) const {
    float *step = row + w.k, *low = step + w.k / w.group;
    if (w.bits == 8) {
      row_int8(target, row, step);
    } else {
      row_affine(target, row, search, shares, step, low);
    }
  }

  void tile(int64_t tile, float* row_of, FirstBad& bad) const {
    const int64_t begin = tile * GLM4_ROWS, end = std::min(w.n, begin + GLM4_ROWS);
    float* columns = row_of + w.k;  // [k][16], of a whole tile
    if (end - begin < GLM4_ROWS) {
      clear_tile(w, tile);
      if (by_tile()) std::fill_n(columns, GLM4_ROWS * w.k, 0.0f);
    }
    for (int64_t n = begin; n < end; ++n) {
      if (load_row(source, n, w.k, row_of) >= 0) return bad.note(n);
      if (!by_tile()) {
        row({w, tile, static_cast<int>(n - begin)}, row_of);
        continue;
      }
      for (int64_t i = 0; i < w.k; ++i) columns[i * GLM4_ROWS + n - begin] = row_of[i];
    }
    if (by_tile()) quantize(&w, tile, columns, inputs, columns + GLM4_ROWS * w.k);
  }
};

}  // namespace

GLM4_API int32_t glm4_quantize(const glm4_matrix* source, const glm4_weight* w, const glm4_inputs* inputs,
                               int32_t shares, int32_t isa, int32_t threads, int64_t* place) {
  const Job job{*source, *w, inputs, shares, search_of(isa), tile_quantizer_of(isa)};
  const int64_t tiles = (w->n + GLM4_ROWS - 1) / GLM4_ROWS;
  std::unique_ptr<float[]> scratch(new (std::nothrow) float[static_cast<size_t>(threads * job.scratch())]);
  if (!scratch) return GLM4_NO_MEMORY;
  FirstBad bad(w->n);
  auto tile = [&](int64_t i, int slot) { job.tile(i, scratch.get() + slot * job.scratch(), bad); };
  glm4::parallel_for(w->n * w->k < (1 << 16) ? 1 : threads, tiles, tile);
  if (bad.row() == w->n) return GLM4_OK;
  place[0] = bad.row();
  place[1] = load_row(*source, bad.row(), w->k, scratch.get());
  return GLM4_NOT_FINITE;
}

GLM4_API int32_t glm4_fit(const glm4_matrix* source, const glm4_grid* to, const float* importance, int32_t isa,
                          int32_t threads, int64_t* place) {
  const int64_t n = source->rows, k = to->k, size = (1 + GLM4_ROWS) * k;
  const glm4_tile_fitter fit = tile_fitter_of(isa);
  std::unique_ptr<float[]> scratch(new (std::nothrow) float[static_cast<size_t>(threads * size)]);
  if (!scratch) return GLM4_NO_MEMORY;
  FirstBad bad(n);
  auto tile = [&](int64_t i, int slot) {
    float *row = scratch.get() + slot * size, *columns = row + k;  // [k][16]
    const int64_t begin = i * GLM4_ROWS, rows = std::min<int64_t>(GLM4_ROWS, n - begin);
    if (rows < GLM4_ROWS) std::fill_n(columns, GLM4_ROWS * k, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      if (load_row(*source, begin + r, k, row) >= 0) return bad.note(begin + r);
      for (int64_t c = 0; c < k; ++c) columns[c * GLM4_ROWS + r] = row[c];
    }
    fit(to, i, rows, columns, importance);
  };
  glm4::parallel_for(n * k < (1 << 16) ? 1 : threads, (n + GLM4_ROWS - 1) / GLM4_ROWS, tile);
  if (bad.row() == n) return GLM4_OK;
  place[0] = bad.row();
  place[1] = load_row(*source, bad.row(), k, scratch.get());
  return GLM4_NOT_FINITE;
}
