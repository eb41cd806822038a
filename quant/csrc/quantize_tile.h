// One tile of 16 rows -> int4 codes, scales and mins, with the least error weighted by the importance of each column.
// Included once by each ISA's file and compiled there for it, so everything here has internal linkage. One lane is one
// row: sums run along the columns in the reference's order, no fused multiply-adds, so that every ISA and the reference
// (kernels/calibrated.py) give the same bytes.
#ifndef GLM4LITE_QUANTIZE_TILE_H
#define GLM4LITE_QUANTIZE_TILE_H

#include <math.h>
#include <string.h>

#include "qgemm.h"

namespace {

#define GLM4_INLINE static inline __attribute__((always_inline))

// 16 lanes in registers of the ISA's own size: one, two or four vectors.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
typedef float FloatPart __attribute__((vector_size(kRegister)));
typedef int32_t WordPart __attribute__((vector_size(kRegister)));
GLM4_INLINE WordPart whole(FloatPart v) { return __builtin_convertvector(v, WordPart); }
GLM4_INLINE WordPart less(FloatPart a, FloatPart b) { return a < b; }

constexpr int kParts = 64 / sizeof(FloatPart);

template <class Part, class Number>
struct Vector {
  Part part[kParts];
  Number& operator[](int i) { return reinterpret_cast<Number*>(part)[i]; }
};
typedef Vector<FloatPart, float> Lanes;
typedef Vector<WordPart, int32_t> Words;

#define GLM4_EACH(Result, expression)                           \
  Result out;                                                   \
  for (int i = 0; i < kParts; ++i) out.part[i] = (expression);  \
  return out;
#define GLM4_BOTH(Type, op)                                                                   \
  GLM4_INLINE Type operator op(Type a, Type b) { GLM4_EACH(Type, a.part[i] op b.part[i]) }    \
  GLM4_INLINE void operator op##=(Type & a, Type b) { a = a op b; }
GLM4_BOTH(Lanes, +)
GLM4_BOTH(Lanes, -)
GLM4_BOTH(Lanes, *)
GLM4_BOTH(Lanes, /)
GLM4_BOTH(Words, |)
GLM4_INLINE Words operator<(Lanes a, Lanes b) { GLM4_EACH(Words, less(a.part[i], b.part[i])) }
GLM4_INLINE Words operator>(Lanes a, Lanes b) { return b < a; }
GLM4_INLINE Words operator<<(Words a, int n) { GLM4_EACH(Words, a.part[i] << n) }
GLM4_INLINE Lanes select(Words mask, Lanes a, Lanes b) { GLM4_EACH(Lanes, mask.part[i] ? a.part[i] : b.part[i]) }
GLM4_INLINE Words whole(Lanes v) { GLM4_EACH(Words, whole(v.part[i])) }

GLM4_INLINE Lanes all(float v) { GLM4_EACH(Lanes, FloatPart{} + v) }
GLM4_INLINE Lanes least(Lanes a, Lanes b) { return select(a < b, a, b); }
GLM4_INLINE Lanes most(Lanes a, Lanes b) { return select(a > b, a, b); }
GLM4_INLINE Lanes rounded(Lanes v) {
  const Lanes r = all(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even
  return (v + r) - r;
}
GLM4_INLINE Lanes inverse(Lanes v) { return select(v > all(GLM4_TINY), all(1.0f) / v, all(0.0f)); }
GLM4_INLINE Lanes code_of(Lanes x, Lanes low, Lanes inv) {
  return rounded(least(most((x + low) * inv, all(0.0f)), all(15.0f)));
}

constexpr int kMaxGroup = 128;

// One group of 16 rows, each divided by its largest magnitude; v is what an error of x counts.
struct TileGroup {
  int size;
  Lanes x[kMaxGroup], v[kMaxGroup];
  Lanes low, high, v_sum, vx_sum, vxx_sum;
  Lanes unit;  // the magnitude x was divided by
};

struct Fit {
  Lanes step, low, error;
};

GLM4_INLINE void load_group(TileGroup& g, const float* rows, int64_t k, int64_t first, const float* importance) {
  Lanes top = all(0.0f), squares = all(0.0f);
  for (int i = 0; i < g.size; ++i) {
    Lanes x;
    for (int r = 0; r < GLM4_ROWS; ++r) x[r] = rows[r * k + first + i];
    g.x[i] = x;
    top = most(top, most(x, all(0.0f) - x));
  }
  const Lanes inv = inverse(top);
  g.unit = top;
  g.low = g.high = g.v_sum = g.vx_sum = g.vxx_sum = all(0.0f);
  for (int i = 0; i < g.size; ++i) {
    const Lanes x = g.x[i] = g.x[i] * inv;
    squares += x * x;
    g.low = least(g.low, x);
    g.high = i ? most(g.high, x) : x;
  }
  Lanes rms = squares * all(1.0f / static_cast<float>(g.size));
  for (int r = 0; r < GLM4_ROWS; ++r) rms[r] = sqrtf(rms[r]);
  for (int i = 0; i < g.size; ++i) {
    const Lanes x = g.x[i];
    const Lanes v = importance ? (most(x, all(0.0f) - x) + rms) * all(importance[first + i]) : all(1.0f);
    g.v[i] = v;
    g.v_sum += v;
    g.vx_sum += v * x;
    g.vxx_sum += v * x * x;
  }
}

// Rounds at (step, low), then solves the weighted least squares for the pair that fits these codes best.
GLM4_INLINE Fit refit(const TileGroup& g, Lanes step, Lanes low) {
  const Lanes inv = inverse(step), zero = all(0.0f);
  Lanes q1 = zero, q2 = zero, qx = zero;
  for (int i = 0; i < g.size; ++i) {
    const Lanes q = code_of(g.x[i], low, inv), vq = g.v[i] * q;
    q1 += vq;
    q2 += vq * q;
    qx += vq * g.x[i];
  }
  const Lanes determinant = g.v_sum * q2 - q1 * q1;
  const Words regular = determinant > g.v_sum * q2 * all(1e-5f);
  const Lanes safe = select(regular, determinant, all(1.0f));
  Lanes s = (g.v_sum * qx - g.vx_sum * q1) / safe;
  Lanes m = (s * q1 - g.vx_sum) / select(regular, g.v_sum, all(1.0f));
  const Lanes through_zero = qx / select(q2 > zero, q2, all(1.0f));
  s = select(m < zero, through_zero, s);
  m = most(m, zero);
  const Words keep = s > zero;  // else the codes say nothing
  s = select(regular, select(keep, s, step), step);
  m = select(regular, select(keep, m, low), low);
  const Lanes two = all(2.0f);
  const Lanes error = s * s * q2 - two * s * m * q1 + m * m * g.v_sum - two * s * qx + two * m * g.vx_sum + g.vxx_sum;
  return {s, m, error};
}

GLM4_INLINE Lanes error_at(const TileGroup& g, Lanes step, Lanes low) {
  const Lanes inv = inverse(step);
  Lanes error = all(0.0f);
  for (int i = 0; i < g.size; ++i) {
    const Lanes off = code_of(g.x[i], low, inv) * step - low - g.x[i];
    error += g.v[i] * off * off;
  }
  return error;
}

GLM4_INLINE void take_better(Fit& best, const Fit& other) {
  const Words better = other.error < best.error;
  best.step = select(better, other.step, best.step);
  best.low = select(better, other.low, best.low);
  best.error = select(better, other.error, best.error);
}

GLM4_INLINE Fit search_group(const TileGroup& g) {
  const Lanes whole_low = all(0.0f) - g.low;
  Fit best{all(0.0f), all(0.0f), all(3e38f)};
  for (const float* share : GLM4_STARTS) {
    const Lanes low = whole_low * all(share[0]), step = (g.high * all(share[1]) + low) * all(GLM4_PER_NIBBLE);
    take_better(best, refit(g, step, low));
  }
  for (int i = 0; i < GLM4_REFITS; ++i) take_better(best, refit(g, best.step, best.low));
  return best;
}

// What one row's groups share: the sizes of one step of a scale and of a min.
struct RowPair {
  Lanes step, low;
};

// The bytes next to the fit that give the least error with codes rounded for them.
GLM4_INLINE void best_bytes(const TileGroup& g, const RowPair& unit, Lanes& scale, Lanes& min) {
  const Lanes inv = inverse(g.unit), step = unit.step * inv, low = unit.low * inv;
  const Lanes first_scale = scale, first_min = min, used = select(unit.step > all(GLM4_TINY), all(1.0f), all(0.0f));
  Lanes best = error_at(g, scale * step, min * low);
  for (int ds = -1; ds <= 1; ++ds)
    for (int dm = -1; dm <= 1; ++dm) {
      if (ds == 0 && dm == 0) continue;
      const Lanes s = least(most(first_scale + all(static_cast<float>(ds)), all(1.0f)), all(255.0f)) * used;
      const Lanes m = least(most(first_min + all(static_cast<float>(dm)), all(0.0f)), all(255.0f));
      const Lanes error = error_at(g, s * step, m * low);
      const Words better = error < best;
      scale = select(better, s, scale);
      min = select(better, m, min);
      best = select(better, error, best);
    }
}

// Codes of 32 columns: word j holds, for each row, the nibbles of columns 8j..8j+7.
GLM4_INLINE void store_codes(uint8_t* out, const Lanes* q) {
  for (int j = 0; j < 4; ++j) {
    Words word = whole(q[8 * j]) | (whole(q[8 * j + 4]) << 4);
    for (int i = 1; i < 4; ++i) word |= (whole(q[8 * j + i]) | (whole(q[8 * j + 4 + i]) << 4)) << (8 * i);
    memcpy(out + 64 * j, &word, 64);
  }
}

GLM4_INLINE void store_plane(uint8_t* out, Lanes v) {
  for (int r = 0; r < GLM4_ROWS; ++r) out[r] = static_cast<uint8_t>(static_cast<int32_t>(v[r]));
}

// Codes of one group, rounded for its bytes.
GLM4_INLINE void store_group(const glm4_weight& w, int64_t tile, const float* rows, int64_t first, Lanes step,
                             Lanes low) {
  const Lanes inv = inverse(step);
  for (int64_t column = first; column < first + w.group; column += GLM4_COLS) {
    Lanes q[GLM4_COLS];
    for (int i = 0; i < GLM4_COLS; ++i) {
      Lanes x;
      for (int r = 0; r < GLM4_ROWS; ++r) x[r] = rows[r * w.k + column + i];
      q[i] = code_of(x, low, inv);
    }
    store_codes(w.qweight + (tile * (w.k / GLM4_COLS) + column / GLM4_COLS) * 256, q);
  }
}

// rows: 16 x k floats, zeros past the weight's end; scratch: 2 * 16 * (k / group) floats.
static void quantize_tile(const glm4_weight& w, int64_t tile, const float* rows, const float* importance,
                          float* scratch) {
  const int64_t groups = w.k / w.group;
  float *steps = scratch, *lows = scratch + groups * GLM4_ROWS;
  TileGroup g;
  g.size = w.group;
  RowPair unit{all(0.0f), all(0.0f)};
  for (int64_t j = 0; j < groups; ++j) {
    load_group(g, rows, w.k, j * w.group, importance);
    const Fit fit = search_group(g);
    const Lanes step = fit.step * g.unit, low = fit.low * g.unit;
    memcpy(steps + j * GLM4_ROWS, &step, sizeof(step));
    memcpy(lows + j * GLM4_ROWS, &low, sizeof(low));
    unit.step = most(unit.step, step);
    unit.low = most(unit.low, low);
  }
  unit.step = unit.step * all(static_cast<float>(1.0 / 255)), unit.low = unit.low * all(static_cast<float>(1.0 / 255));
  const int64_t n0 = tile * GLM4_ROWS;
  for (int r = 0; r < GLM4_ROWS && n0 + r < w.n; ++r) w.row_scale[n0 + r] = unit.step[r], w.row_min[n0 + r] = unit.low[r];
  const Lanes inv_step = inverse(unit.step), inv_low = inverse(unit.low);
  const Lanes used = select(unit.step > all(GLM4_TINY), all(1.0f), all(0.0f));
  for (int64_t j = 0; j < groups; ++j) {
    load_group(g, rows, w.k, j * w.group, importance);
    Lanes step, low;
    memcpy(&step, steps + j * GLM4_ROWS, sizeof(step));
    memcpy(&low, lows + j * GLM4_ROWS, sizeof(low));
    Lanes scale = least(most(rounded(step * inv_step), all(1.0f)), all(255.0f)) * used;
    Lanes min = least(most(rounded(low * inv_low), all(0.0f)), all(255.0f));
    best_bytes(g, unit, scale, min);
    const int64_t at = (tile * groups + j) * GLM4_ROWS;
    store_plane(w.scales + at, scale);
    store_plane(w.mins + at, min);
    store_group(w, tile, rows, j * w.group, scale * unit.step, min * unit.low);
  }
}

// ---- the grids of other engines: a whole zero, and a scale of 16 bits ----

GLM4_INLINE Words bits_of(Lanes v) {
  Words out;
  memcpy(&out, &v, sizeof(out));
  return out;
}
GLM4_INLINE Lanes with_bits(Words v) {
  Lanes out;
  memcpy(&out, &v, sizeof(out));
  return out;
}

// To nearest, ties to even, as the type holds it; float16 of what is beyond its range is not cut off.
GLM4_INLINE Lanes held(Lanes v, int32_t type) {
  const int dropped = type == GLM4_BFLOAT16 ? 16 : 13;
  Words bits = bits_of(v);
  for (int i = 0; i < kParts; ++i)
    bits.part[i] = (bits.part[i] + ((1 << (dropped - 1)) - 1) + ((bits.part[i] >> dropped) & 1)) & -(1 << dropped);
  if (type == GLM4_BFLOAT16) return with_bits(bits);
  const Lanes half = all(0.75f);  // whose last bit is that of the smallest float16
  const Lanes size = most(v, all(0.0f) - v);
  return select(size < all(6.103515625e-05f), (v + half) - half, with_bits(bits));
}

GLM4_INLINE Lanes signed_inverse(Lanes v) {
  return select(most(v, all(0.0f) - v) > all(GLM4_TINY), all(1.0f) / v, all(0.0f));
}

GLM4_INLINE Lanes whole_below(Lanes v) {
  const Lanes near = rounded(v);
  return select(near > v, near - all(1.0f), near);
}

struct WholeFit {
  Lanes scale, zero, error;
};

// Rounds at (scale, zero), then takes the scale that fits these codes best, as it is held.
GLM4_INLINE void try_scale(WholeFit& best, const TileGroup& g, Lanes scale, Lanes zero, int32_t type) {
  const Lanes low = scale * zero, inv = signed_inverse(scale);
  Lanes qx = all(0.0f), q2 = all(0.0f);
  for (int i = 0; i < g.size; ++i) {
    const Lanes q = code_of(g.x[i], low, inv) - zero, vq = g.v[i] * q;
    qx += vq * g.x[i];
    q2 += vq * q;
  }
  const Words some = q2 > all(0.0f);
  const Lanes fitting = select(some, qx / select(some, q2, all(1.0f)), scale);
  const Lanes s = held(fitting * g.unit, type) * inverse(g.unit);
  const Lanes error = s * s * q2 - all(2.0f) * s * qx + g.vxx_sum;
  const Words better = error < best.error;
  best.scale = select(better, s, best.scale);
  best.zero = select(better, zero, best.zero);
  best.error = select(better, error, best.error);
}

GLM4_INLINE WholeFit search_whole(const TileGroup& g, const glm4_grid& to) {
  const Lanes high = most(g.high, all(0.0f)), low = all(0.0f) - g.low;
  WholeFit best{all(0.0f), all(0.0f), all(3e38f)};
  if (to.middle) {  // what is largest takes the code that has no opposite
    const Lanes top = select(high > low, all(0.0f) - high, low);
    for (const float share : GLM4_TOP_SHARES) try_scale(best, g, top * all(share / 8.0f), all(8.0f), to.scale_type);
  } else {
    for (const float share : GLM4_RANGE_SHARES) {
      const Lanes scale = (high + low) * all(share / 15.0f);
      const Lanes below = whole_below(low * all(share) * signed_inverse(scale));
      for (int more = 0; more < 2; ++more) {
        const Lanes zero = least(most(below + all(static_cast<float>(more)), all(0.0f)), all(15.0f));
        try_scale(best, g, scale, zero, to.scale_type);
      }
    }
  }
  for (const float factor : GLM4_POLISH) try_scale(best, g, best.scale * all(factor), best.zero, to.scale_type);
  return best;
}

// data: 16 x k floats, zeros past the matrix' end, of which `rows` are written.
static void fit_tile(const glm4_grid& to, int64_t tile, int64_t rows, const float* data, const float* importance) {
  const int64_t groups = to.k / to.group, n0 = tile * GLM4_ROWS;
  TileGroup g;
  g.size = to.group;
  for (int64_t j = 0; j < groups; ++j) {
    load_group(g, data, to.k, j * to.group, importance);
    WholeFit fit = search_whole(g, to);
    Lanes scale = held(fit.scale * g.unit, to.scale_type);
    const Lanes low = scale * fit.zero, inv = signed_inverse(scale);
    for (int r = 0; r < rows; ++r) {
      to.scale[(n0 + r) * groups + j] = scale[r];
      to.zero[(n0 + r) * groups + j] = fit.zero[r];
    }
    for (int64_t column = j * to.group; column < (j + 1) * to.group; ++column) {
      Lanes x;
      for (int r = 0; r < GLM4_ROWS; ++r) x[r] = data[r * to.k + column];
      Lanes q = code_of(x, low, inv);
      uint8_t* out = to.codes + n0 * to.k + column;
      for (int r = 0; r < rows; ++r) out[r * to.k] = static_cast<uint8_t>(static_cast<int32_t>(q[r]));
    }
  }
}

}  // namespace

#endif
