// One tile of 16 rows -> codes of fewer than 8 bits, scales and mins, with the least error weighted by the importance of
// each column; what rounding a column costs is made up for in the columns behind it, where the inputs go together.
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
constexpr int kAtOnce = kParts == 1 ? 16 : kParts == 2 ? 4 : 2;  // sums that the registers hold

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
GLM4_INLINE Words operator&(Words a, int mask) { GLM4_EACH(Words, a.part[i] & mask) }
GLM4_INLINE Words operator>>(Words a, int n) { GLM4_EACH(Words, a.part[i] >> n) }
GLM4_INLINE Words operator<(Lanes a, Lanes b) { GLM4_EACH(Words, less(a.part[i], b.part[i])) }
GLM4_INLINE Words operator>(Lanes a, Lanes b) { return b < a; }
GLM4_INLINE Words operator<<(Words a, int n) { GLM4_EACH(Words, a.part[i] << n) }
GLM4_INLINE Lanes select(Words mask, Lanes a, Lanes b) { GLM4_EACH(Lanes, mask.part[i] ? a.part[i] : b.part[i]) }
GLM4_INLINE Words whole(Lanes v) { GLM4_EACH(Words, whole(v.part[i])) }

GLM4_INLINE Lanes all(float v) { GLM4_EACH(Lanes, v - FloatPart{}) }  // less zero: nothing is left to compute
GLM4_INLINE Lanes least(Lanes a, Lanes b) { return select(a < b, a, b); }
GLM4_INLINE Lanes most(Lanes a, Lanes b) { return select(a > b, a, b); }
GLM4_INLINE Lanes rounded(Lanes v) {
  const Lanes r = all(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even
  return (v + r) - r;
}
GLM4_INLINE Lanes inverse(Lanes v) { return select(v > all(GLM4_TINY), all(1.0f) / v, all(0.0f)); }
GLM4_INLINE Lanes code_of(Lanes x, Lanes low, Lanes inv, float top) {
  return rounded(least(most((x + low) * inv, all(0.0f)), all(top)));
}

// A register at a time: a copy of all 16 lanes at once goes through memory.
GLM4_INLINE FloatPart load_part(const float* from) {
  FloatPart out;
  memcpy(&out, from, sizeof(out));
  return out;
}
GLM4_INLINE Lanes load(const float* from) { GLM4_EACH(Lanes, load_part(from + i * (kRegister / 4))) }
GLM4_INLINE void store(float* to, Lanes v) {
  for (int i = 0; i < kParts; ++i) memcpy(to + i * (kRegister / 4), &v.part[i], kRegister);
}

constexpr int kMaxGroup = 128;

// One group of 16 rows, each divided by its largest magnitude; v is what an error of x counts.
struct TileGroup {
  int size;
  float top;  // the largest code
  Lanes x[kMaxGroup], v[kMaxGroup];
  Lanes low, high, v_sum, vx_sum, vxx_sum;
  Lanes unit;  // the magnitude x was divided by
};

struct Fit {
  Lanes step, low, error;
};

// columns: [size][16]; importance null: all errors count alike.
GLM4_INLINE void load_group(TileGroup& g, const float* columns, const float* importance) {
  Lanes top = all(0.0f), squares = all(0.0f);
  for (int i = 0; i < g.size; ++i) {
    const Lanes x = g.x[i] = load(columns + i * GLM4_ROWS);
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
    const Lanes v = importance ? (most(x, all(0.0f) - x) + rms) * all(importance[i]) : all(1.0f);
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
    const Lanes q = code_of(g.x[i], low, inv, g.top), vq = g.v[i] * q;
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
    const Lanes off = code_of(g.x[i], low, inv, g.top) * step - low - g.x[i];
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
  const Lanes whole_low = all(0.0f) - g.low, per_code = all(static_cast<float>(1.0 / g.top));
  Fit best{all(0.0f), all(0.0f), all(3e38f)};
  for (const float* share : GLM4_STARTS) {
    const Lanes low = whole_low * all(share[0]), step = (g.high * all(share[1]) + low) * per_code;
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

// Codes of 32 columns, plane by plane: a word of a vector holds a row's digits of all its quads.
GLM4_INLINE void store_codes(uint8_t* out, const Lanes* q, int bits) {
  for (int digits = 4, at = 0; digits > 0; digits /= 2) {
    if (!(bits & digits)) continue;
    for (int first = 0; first < GLM4_COLS; first += 32 / digits, out += 64) {
      Words word = all(0.0f) < all(0.0f);
      for (int i = 0; i < 32 / digits; ++i)
        word |= ((whole(q[first + i]) >> at) & ((1 << digits) - 1)) << (8 * (i % 4) + i / 4 * digits);
      memcpy(out, &word, 64);
    }
    at += digits;
  }
}

GLM4_INLINE void store_plane(uint8_t* out, Lanes v) {
  for (int r = 0; r < GLM4_ROWS; ++r) out[r] = static_cast<uint8_t>(static_cast<int32_t>(v[r]));
}

// The largest steps and lows of a row's groups become its 255 units of each.
GLM4_INLINE RowPair row_units(TileGroup& g, const glm4_weight& w, int64_t tile, const float* columns,
                              const float* importance) {
  RowPair unit{all(0.0f), all(0.0f)};
  for (int64_t first = 0; first < w.k; first += w.group) {
    load_group(g, columns + first * GLM4_ROWS, importance + first);
    const Fit fit = search_group(g);
    unit.step = most(unit.step, fit.step * g.unit);
    unit.low = most(unit.low, fit.low * g.unit);
  }
  unit.step = unit.step * all(static_cast<float>(1.0 / 255)), unit.low = unit.low * all(static_cast<float>(1.0 / 255));
  const int64_t n0 = tile * GLM4_ROWS;
  for (int r = 0; r < GLM4_ROWS && n0 + r < w.n; ++r) w.row_scale[n0 + r] = unit.step[r], w.row_min[n0 + r] = unit.low[r];
  return unit;
}

// Finds and stores a group's bytes; what they stand for.
GLM4_INLINE RowPair group_bytes(TileGroup& g, const glm4_weight& w, int64_t at, const RowPair& unit,
                                const float* columns, const float* importance) {
  load_group(g, columns, importance);
  const Fit fit = search_group(g);
  const Lanes used = select(unit.step > all(GLM4_TINY), all(1.0f), all(0.0f));
  const Lanes step = fit.step * g.unit * inverse(unit.step), low = fit.low * g.unit * inverse(unit.low);
  Lanes scale = least(most(rounded(step), all(1.0f)), all(255.0f)) * used;
  Lanes min = least(most(rounded(low), all(0.0f)), all(255.0f));
  best_bytes(g, unit, scale, min);
  store_plane(w.scales + at * GLM4_ROWS, scale);
  store_plane(w.mins + at * GLM4_ROWS, min);
  return {scale * unit.step, min * unit.low};
}

// out[c] -= the sum of by[i] * factors[i * stride + c], one product after the other; `width` is a multiple of kAtOnce.
GLM4_INLINE void subtract_products(float* out, int64_t width, const float* by, int64_t count, const float* factors,
                                   int64_t stride) {
  for (int64_t first = 0; first < width; first += kAtOnce) {
    Lanes sum[kAtOnce];
#pragma GCC unroll 16
    for (int c = 0; c < kAtOnce; ++c) sum[c] = load(out + (first + c) * GLM4_ROWS);
    for (int64_t i = 0; i < count; ++i) {
      const Lanes one = load(by + i * GLM4_ROWS);
      const float* factor = factors + i * stride + first;
#pragma GCC unroll 16
      for (int c = 0; c < kAtOnce; ++c) sum[c] -= one * all(factor[c]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < kAtOnce; ++c) store(out + (first + c) * GLM4_ROWS, sum[c]);
  }
}

// Rounds a group column by column: x becomes what its codes stand for, `lost` what that is less. The columns behind one
// in the group make up for it by `factors`, rows `stride` apart (null: they do not).
GLM4_INLINE void store_group(const glm4_weight& w, int64_t tile, int64_t first, const RowPair& group, float* x,
                             float* lost, const float* factors, int64_t stride) {
  const Lanes inv = inverse(group.step);
  const float top = static_cast<float>((1 << w.bits) - 1);
  Lanes q[GLM4_COLS];
  for (int i = 0; i < w.group; ++i) {
    const Lanes now = load(x + i * GLM4_ROWS), code = code_of(now, group.low, inv, top);
    const Lanes value = code * group.step - group.low, off = now - value;
    q[i % GLM4_COLS] = code;
    store(x + i * GLM4_ROWS, value);
    store(lost + i * GLM4_ROWS, off);
    if (factors)
      for (int c = i + 1; c < w.group; ++c) {
        float* behind = x + c * GLM4_ROWS;
        store(behind, load(behind) - off * all(factors[i * stride + c]));
      }
    if (i % GLM4_COLS + 1 == GLM4_COLS)
      store_codes(w.qweight + (tile * (w.k / GLM4_COLS) + (first + i) / GLM4_COLS) * (64 * w.bits), q, w.bits);
  }
}

// columns: [k][16], zeros past the weight's end; scratch: 16 * (block + rank) floats.
static void quantize_tile(const glm4_weight& w, int64_t tile, const float* columns, const glm4_inputs& inputs,
                          float* scratch) {
  float *x = scratch, *sums = scratch + inputs.block * GLM4_ROWS, lost[kMaxGroup * GLM4_ROWS];
  memset(sums, 0, sizeof(float) * inputs.rank * GLM4_ROWS);
  TileGroup g;
  g.size = w.group, g.top = static_cast<float>((1 << w.bits) - 1);
  const RowPair unit = row_units(g, w, tile, columns, inputs.importance);
  for (int64_t first = 0; first < w.k; first += inputs.block) {
    const int64_t size = w.k - first < inputs.block ? w.k - first : inputs.block;
    const float* source = columns + first * GLM4_ROWS;
    memcpy(x, source, sizeof(float) * size * GLM4_ROWS);
    subtract_products(x, size, sums, inputs.rank, inputs.onto + first * inputs.rank, size);
    for (int64_t at = 0; at < size; at += w.group) {
      const int64_t column = first + at, behind = at + w.group;
      const RowPair group = group_bytes(g, w, tile * (w.k / w.group) + column / w.group, unit, x + at * GLM4_ROWS,
                                        inputs.importance + column);
      const float* factors = inputs.within ? inputs.within + column * inputs.block : nullptr;
      store_group(w, tile, column, group, x + at * GLM4_ROWS, lost, factors ? factors + at : nullptr, inputs.block);
      if (factors) subtract_products(x + behind * GLM4_ROWS, size - behind, lost, w.group, factors + behind, inputs.block);
    }
    if (inputs.rank == 0) continue;
    for (int64_t i = 0; i < size * GLM4_ROWS; i += GLM4_ROWS) store(x + i, load(source + i) - load(x + i));
    subtract_products(sums, inputs.rank, x, size, inputs.into + first * inputs.rank, inputs.rank);
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
    const Lanes q = code_of(g.x[i], low, inv, g.top) - zero, vq = g.v[i] * q;
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

// columns: [k][16], zeros past the matrix' end; `rows` of them are written.
static void fit_tile(const glm4_grid& to, int64_t tile, int64_t rows, const float* columns, const float* importance) {
  const int64_t groups = to.k / to.group, n0 = tile * GLM4_ROWS;
  TileGroup g;
  g.size = to.group;
  g.top = 15.0f;
  for (int64_t j = 0; j < groups; ++j) {
    load_group(g, columns + j * to.group * GLM4_ROWS, importance ? importance + j * to.group : nullptr);
    WholeFit fit = search_whole(g, to);
    Lanes scale = held(fit.scale * g.unit, to.scale_type);
    const Lanes low = scale * fit.zero, inv = signed_inverse(scale);
    for (int r = 0; r < rows; ++r) {
      to.scale[(n0 + r) * groups + j] = scale[r];
      to.zero[(n0 + r) * groups + j] = fit.zero[r];
    }
    for (int64_t column = j * to.group; column < (j + 1) * to.group; ++column) {
      Lanes q = code_of(load(columns + column * GLM4_ROWS), low, inv, g.top);
      uint8_t* out = to.codes + n0 * to.k + column;
      for (int r = 0; r < rows; ++r) out[r * to.k] = static_cast<uint8_t>(static_cast<int32_t>(q[r]));
    }
  }
}

}  // namespace

#endif
