// What an ISA file needs beside its product: norms, SiLU, quantizing activations and attention, written once over
// vector.h and compiled for each ISA. rows_<isa>.cpp includes this file and names its table.
#ifndef GLM4LITE_ROWS_H
#define GLM4LITE_ROWS_H

#include <math.h>

#include "qgemm.h"
#include "vector.h"

namespace {

constexpr int kLanes = GLM4_LANES;

// Register blocks of attention: query rows whose sums stay in registers beside one vector of keys or values.
#if GLM4_LANES == 16 || defined(__aarch64__)
constexpr int kRowBlock = 16;
#else
constexpr int kRowBlock = 8;
#endif
constexpr int kTileTokens = 64;  // tokens whose scores are computed before their values are added
static_assert(kRowBlock <= GLM4_ATTENTION_ROWS && kTileTokens % GLM4_TOKENS == 0 && GLM4_BLOCK % kTileTokens == 0 &&
                  GLM4_RANGE % kTileTokens == 0,
              "blocks nest, and a tile lies in one block of the cache");

// 32 values -> int8 codes, their sum and the scale; NaN as the scale where a value is not finite.
inline void quantize_block(const float* v, int8_t* codes, float* scale, int32_t* sum) {
  constexpr int parts = GLM4_COLS / kLanes;
  Vec x[parts], top = all(0.0f), bad = all(0.0f), total = all(0.0f);
  for (int i = 0; i < parts; ++i) {
    x[i] = load(v + kLanes * i);
    top = larger(top, magnitude(x[i]));
    bad += x[i] * all(0.0f);
  }
  const float largest = largest_of(top);
  const bool finite = sum_of(bad) == 0.0f;
  *sum = 0;
  if (!finite || largest < 1e-30f) {
    memset(codes, 0, GLM4_COLS);
    *scale = finite ? 0.0f : NAN;
    return;
  }
  const Vec inverse = all(127.0f / largest), round = all(12582912.0f);  // 1.5 * 2^23: adding it rounds
  Ints whole[parts];
  for (int i = 0; i < parts; ++i) {
    const Vec shifted = x[i] * inverse + round;
    whole[i] = bits_of(shifted);  // of which the lowest byte is the code
    total += shifted - round;
  }
  narrow(whole, codes);
  *sum = static_cast<int32_t>(sum_of(total));
  *scale = largest / 127.0f;
}

void quantize_row(const float* x, int64_t k, int32_t group, const glm4_panel_column* to) {
  const int64_t blocks = k / GLM4_COLS, per_group = group / GLM4_COLS, width = to->width;
  float in_group = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    int8_t codes[GLM4_COLS];
    float scale;
    int32_t sum;
    quantize_block(x + b * GLM4_COLS, codes, &scale, &sum);
    memcpy(to->quads + b * width * 8, codes, GLM4_COLS);
    to->scale[b * width] = scale;
    to->sum[b * width] = sum;
    in_group += scale * static_cast<float>(sum);
    if ((b + 1) % per_group == 0) {
      to->group_sum[b / per_group * width] = in_group;
      in_group = 0.0f;
    }
  }
}

void remainder_row(const float* x, int64_t k, const glm4_panel_column* of, float* out) {
  for (int64_t b = 0; b < k / GLM4_COLS; ++b) {
    int8_t codes[GLM4_COLS];
    memcpy(codes, of->quads + b * of->width * 8, GLM4_COLS);
    const Vec scale = all(of->scale[b * of->width]);
    for (int i = 0; i < GLM4_COLS; i += kLanes)
      store(out + b * GLM4_COLS + i, load(x + b * GLM4_COLS + i) - widen(codes + i) * scale);
  }
}

inline float inverse_rms(const float* x, int64_t k, float eps) {
  Vec squares[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
  for (int64_t i = 0; i < k; i += GLM4_COLS)
    for (int j = 0; j < GLM4_COLS / kLanes; ++j) {
      const Vec v = load(x + i + kLanes * j);
      squares[j % 4] += v * v;
    }
  const float total = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.0f / sqrtf(total / static_cast<float>(k) + eps);
}

void norm_row(const float* x, const float* weight, float eps, int64_t k, float* out) {
  const Vec scale = all(inverse_rms(x, k, eps));
  for (int64_t i = 0; i < k; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

// x += add, or += RMSNorm(add) where there is a weight.
void add_row(float* x, const float* add, const float* weight, float eps, int64_t k) {
  if (!weight) {
    for (int64_t i = 0; i < k; i += kLanes) store(x + i, load(x + i) + load(add + i));
    return;
  }
  const Vec scale = all(inverse_rms(add, k, eps));
  for (int64_t i = 0; i < k; i += kLanes) store(x + i, load(x + i) + load(add + i) * scale * load(weight + i));
}

void swiglu_row(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec g = load(gate + i);
    store(out + i, g / (all(1.0f) + exponential(all(0.0f) - g)) * load(up + i));
  }
}

// ---- adapters ----

constexpr int64_t kFar = 256;  // floats ahead that are asked for: these streams are too short for the processor's own

// Rows of x and of a whose sums stay in registers together, and rows of a tile's outputs.
#if GLM4_LANES == 16
constexpr int kDotRows = 2, kDotFactors = 4, kAdaptRows = 4;
#elif defined(__aarch64__)
constexpr int kDotRows = 2, kDotFactors = 4, kAdaptRows = 1;
#else
constexpr int kDotRows = 2, kDotFactors = 2, kAdaptRows = 1;
#endif

// Each sum is added in one order however many rows go together.
template <int X, int R>
inline void dot_rows(const float* a, int64_t k, const float* const* x, float* out, int64_t stride) {
  Vec sums[X][R][2];
  for (int m = 0; m < X; ++m)
    for (int r = 0; r < R; ++r) sums[m][r][0] = sums[m][r][1] = all(0.0f);
  for (int64_t i = 0; i < k; i += GLM4_COLS) {
    for (int r = 0; X == 1 && r < R; ++r) {  // of its row, and of that R rows further on where it ends
      const float* ahead = a + (i + kFar < k ? r : R - 1 + r) * k + i + kFar;
      for (int line = 0; line < GLM4_COLS; line += 16) __builtin_prefetch(ahead + line);
    }
    for (int j = 0; j < GLM4_COLS / kLanes; ++j) {
      Vec v[X];
      for (int m = 0; m < X; ++m) v[m] = load(x[m] + i + kLanes * j);
      for (int r = 0; r < R; ++r) {
        const Vec f = load(a + r * k + i + kLanes * j);
        for (int m = 0; m < X; ++m) sums[m][r][j % 2] += v[m] * f;
      }
    }
  }
  for (int m = 0; m < X; ++m)
    for (int r = 0; r < R; ++r) out[m * stride + r] = sum_of(sums[m][r][0] + sums[m][r][1]);
}

template <int X, int R>
inline void dot_block(const float* a, int64_t count, int64_t k, const float* const* x, float* out, int64_t stride) {
  int64_t r = 0;
  for (; r + R <= count; r += R) dot_rows<X, R>(a + r * k, k, x, out + r, stride);
  for (; r < count; ++r) dot_rows<X, 1>(a + r * k, k, x, out + r, stride);
}

void dots(const float* a, int64_t count, int64_t k, const float* const* x, int64_t rows, float* out, int64_t stride) {
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_block<kDotRows, kDotFactors>(a, count, k, x + m, out + m * stride, stride);
  for (; m < rows; ++m) dot_block<1, 4>(a, count, k, x + m, out + m * stride, stride);
}

// Of M rows, of a tile that lies wholly within the weight.
template <int M>
inline void adapt_rows(const glm4_lora* lora, int64_t first, const float* t, int64_t stride, float* out) {
  constexpr int parts = GLM4_ROWS / kLanes;
  const float* b = lora->b + first * lora->rank;
  Vec sums[M][4][parts];  // four, so that none waits for the one before
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < parts; ++p) {
      for (int i = 0; i < 4; ++i) sums[m][i][p] = all(0.0f);
      sums[m][0][p] = load(out + m * GLM4_ROWS + kLanes * p);
      if (lora->gain) sums[m][0][p] *= load(lora->gain + first + kLanes * p);
      if (lora->bias) sums[m][1][p] = load(lora->bias + first + kLanes * p);
    }
  int64_t r = 0;
  for (; r + 4 <= lora->rank; r += 4)
    for (int i = 0; i < 4; ++i)
      for (int p = 0; p < parts; ++p) {
        const Vec f = load(b + (r + i) * GLM4_ROWS + kLanes * p);
        for (int m = 0; m < M; ++m) sums[m][i][p] += all(t[m * stride + r + i]) * f;
      }
  for (; r < lora->rank; ++r)
    for (int p = 0; p < parts; ++p) {
      const Vec f = load(b + r * GLM4_ROWS + kLanes * p);
      for (int m = 0; m < M; ++m) sums[m][0][p] += all(t[m * stride + r]) * f;
    }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < parts; ++p)
      store(out + m * GLM4_ROWS + kLanes * p, (sums[m][0][p] + sums[m][1][p]) + (sums[m][2][p] + sums[m][3][p]));
}

void adapt(const glm4_lora* lora, int64_t n, int64_t first, const float* t, int64_t stride, int64_t rows, float* out) {
  const float* b = lora->b + first * lora->rank;
  for (int64_t r = 0; r < lora->rank; ++r) __builtin_prefetch(b + (lora->rank + r) * GLM4_ROWS);  // of the next tile
  int64_t m = 0;
  if (n - first < GLM4_ROWS) {
    for (; m < rows; ++m, t += stride, out += GLM4_ROWS)
      for (int64_t i = first; i < n; ++i) {
        float sum = out[i - first] * (lora->gain ? lora->gain[i] : 1.0f);
        for (int64_t r = 0; r < lora->rank; ++r) sum += t[r] * b[r * GLM4_ROWS + i - first];
        out[i - first] = lora->bias ? sum + lora->bias[i] : sum;
      }
    return;
  }
  for (; m + kAdaptRows <= rows; m += kAdaptRows)
    adapt_rows<kAdaptRows>(lora, first, t + m * stride, stride, out + m * GLM4_ROWS);
  for (; m < rows; ++m) adapt_rows<1>(lora, first, t + m * stride, stride, out + m * GLM4_ROWS);
}

// ---- attention ----

struct Tile {  // up to kTileTokens tokens as floats: keys [16 tokens together][dim][16], values [token][dim]
  const float* keys;
  const float* values;
  const float *key_scale, *value_scale;  // of int8 codes, else null
};

// Memory that will be read soon, asked for a line at a time between other work: with one token's queries attention waits
// for memory more than it computes.
struct Ahead {
  const char *keys, *values;
  int64_t bytes;  // of each
  void next() {
    if (bytes <= 0) return;
    __builtin_prefetch(keys);
    __builtin_prefetch(values);
    keys += 64, values += 64, bytes -= 64;
  }
};

int64_t tile_tokens(const glm4_attention* a, int64_t first) {
  return a->end - first < kTileTokens ? a->end - first : kTileTokens;
}

Ahead tile_ahead(const glm4_attention* a, int64_t first) {
  if (first >= a->end) return {};
  const glm4_cache* c = a->cache;
  const int64_t size = (c->type == GLM4_FLOAT32 ? sizeof(float) : 1) * a->head_dim;
  const int64_t at = glm4_place(c, a->head, first) * size, bytes = tile_tokens(a, first) * size;
  return {static_cast<const char*>(c->keys) + at, static_cast<const char*>(c->values) + at, bytes};
}

// int8 codes become floats once per tile and serve all query rows; float32 is used in place.
Tile read_tile(const glm4_attention* a, int64_t first, int64_t tokens, float* scratch) {
  const glm4_cache* c = a->cache;
  const int64_t d = a->head_dim, at = glm4_place(c, a->head, first);
  if (c->type == GLM4_FLOAT32) {
    const float *keys = static_cast<const float*>(c->keys), *values = static_cast<const float*>(c->values);
    return {keys + at * d, values + at * d, nullptr, nullptr};
  }
  const int8_t* keys = static_cast<const int8_t*>(c->keys) + at * d;
  const int8_t* values = static_cast<const int8_t*>(c->values) + at * d;
  const int64_t padded = (tokens + GLM4_TOKENS - 1) / GLM4_TOKENS * GLM4_TOKENS;
  float* to = scratch + kTileTokens * d;
  for (int64_t i = 0; i < padded * d; i += kLanes) store(scratch + i, widen(keys + i));
  for (int64_t i = 0; i < tokens * d; i += kLanes) store(to + i, widen(values + i));
  return {scratch, to, c->key_scale + at, c->value_scale + at};
}

// scores[r][t] = query r . key t; queries are [dim][kRowBlock].
template <int R>
void block_scores(const float* q, const float* keys, int64_t d, int64_t tokens, float* scores, Ahead ahead) {
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const float* k = keys + t / GLM4_TOKENS * (GLM4_TOKENS * d) + t % GLM4_TOKENS;
    Vec sum[R];
    for (int r = 0; r < R; ++r) sum[r] = all(0.0f);
    for (int64_t i = 0; i < d; ++i) {
      const Vec v = load(k + i * GLM4_TOKENS);
      ahead.next();
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] += v * all(q[i * kRowBlock + r]);
    }
    for (int r = 0; r < R; ++r) store(scores + r * kTileTokens + t, sum[r]);
  }
}

// out[r] += sum over tokens of p[r][t] * value t.
template <int R>
void block_values(const float* p, const float* values, int64_t d, int64_t tokens, float* out) {
  for (int64_t i = 0; i < d; i += kLanes) {
    Vec sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(out + r * d + i);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec v = load(values + t * d + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] += v * all(p[r * kTileTokens + t]);
    }
    for (int r = 0; r < R; ++r) store(out + r * d + i, sum[r]);
  }
}

using ScoresOf = void (*)(const float*, const float*, int64_t, int64_t, float*, Ahead);
using ValuesOf = void (*)(const float*, const float*, int64_t, int64_t, float*);
constexpr ScoresOf kScores[4] = {block_scores<4>, block_scores<8>, block_scores<kRowBlock == 16 ? 12 : 8>,
                                 block_scores<kRowBlock>};
constexpr ValuesOf kValues[4] = {block_values<4>, block_values<8>, block_values<kRowBlock == 16 ? 12 : 8>,
                                 block_values<kRowBlock>};

// One row's scores become weights in place; its running maximum, sum and output follow. Scales are the tokens' own (int8)
// or null. Tokens from `visible` on do not count.
void soften(float* scores, int64_t tokens, int64_t visible, const float* key_scale, const float* value_scale, float* out,
            int64_t d, float* top, float* total) {
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  if (key_scale)
    for (int64_t t = 0; t < padded; t += kLanes) store(scores + t, load(scores + t) * load(key_scale + t));
  for (int64_t t = visible > 0 ? visible : 0; t < padded; ++t) scores[t] = -INFINITY;
  Vec highest = all(-INFINITY);
  for (int64_t t = 0; t < padded; t += kLanes) highest = larger(highest, load(scores + t));
  const float found = largest_of(highest), now = *top < found ? found : *top;
  if (now == -INFINITY) {  // nothing to be seen yet
    memset(scores, 0, sizeof(float) * padded);
    return;
  }
  if (now != *top) {
    float shrink[kLanes];
    store(shrink, exponential(all(*top - now)));
    for (int64_t i = 0; i < d; i += kLanes) store(out + i, load(out + i) * all(shrink[0]));
    *total *= shrink[0];
    *top = now;
  }
  Vec sum = all(0.0f);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Vec e = exponential(load(scores + t) - all(now));
    sum += e;
    store(scores + t, value_scale ? e * load(value_scale + t) : e);
  }
  *total += sum_of(sum);
}

// Called from here and from other files, and never inlined: every row's sums are added by the same instructions.
__attribute__((noinline)) void fold(const glm4_sums* range, int64_t rows, int64_t d, const glm4_sums* to) {
  for (int64_t r = 0; r < rows; ++r) {
    if (range->top[r] == -INFINITY) continue;  // the row sees nothing of the range
    const float now = to->top[r] < range->top[r] ? range->top[r] : to->top[r];
    const Vec old = exponential(all(to->top[r] - now)), fresh = exponential(all(range->top[r] - now));
    float* out = to->out + r * d;
    for (int64_t i = 0; i < d; i += kLanes) store(out + i, load(out + i) * old + load(range->out + r * d + i) * fresh);
    to->total[r] = to->total[r] * old[0] + range->total[r] * fresh[0];
    to->top[r] = now;
  }
}

void nothing_seen(const glm4_sums& sums, int64_t rows, int64_t d) {
  memset(sums.out, 0, sizeof(float) * rows * d);
  for (int64_t r = 0; r < rows; ++r) sums.top[r] = -INFINITY, sums.total[r] = 0.0f;
}

// One range of tokens; `scratch` has room for a block's scores and a tile.
void attend_range(const glm4_attention* a, int64_t begin, int64_t end, const float* queries, float* scratch,
                  const glm4_sums& to) {
  const int64_t d = a->head_dim, blocks = (a->rows + kRowBlock - 1) / kRowBlock;
  float *scores = scratch, *tile_scratch = scores + kRowBlock * kTileTokens;
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int64_t tokens = tile_tokens(a, first);
    const Tile tile = read_tile(a, first, tokens, tile_scratch);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * kRowBlock, rows = a->rows - row < kRowBlock ? a->rows - row : kRowBlock;
      const int64_t last = row + rows - 1;
      if (a->visible + last / a->per_token <= first) continue;  // all of it lies ahead of these queries
      const int kind = rows == kRowBlock ? 3 : static_cast<int>((rows - 1) / 4);
      kScores[kind](queries + row * d, tile.keys, d, tokens, scores, b == 0 ? tile_ahead(a, first + kTileTokens) : Ahead{});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = a->visible + (row + r) / a->per_token - first;
        soften(scores + r * kTileTokens, tokens, seen < tokens ? seen : tokens, tile.key_scale, tile.value_scale,
               to.out + (row + r) * d, d, to.top + row + r, to.total + row + r);
      }
      kValues[kind](scores, tile.values, d, tokens, to.out + row * d);
    }
  }
}

void attend(const glm4_attention* a, float* scratch) {
  const int64_t d = a->head_dim, padded = (a->rows + kRowBlock - 1) / kRowBlock * kRowBlock;
  float top[GLM4_ATTENTION_ROWS], total[GLM4_ATTENTION_ROWS];
  float *queries = scratch, *rest = queries + 2 * padded * d;
  const glm4_sums range{queries + padded * d, top, total};
  memset(queries, 0, sizeof(float) * padded * d);
  memset(rest, 0, sizeof(float) * kRowBlock * kTileTokens);
  for (int64_t r = 0; r < a->rows; ++r) {
    const float* from = a->q + r / a->per_token * a->q_stride + r % a->per_token * d;
    float* to = queries + r / kRowBlock * (kRowBlock * d) + r % kRowBlock;
    for (int64_t i = 0; i < d; ++i) to[i * kRowBlock] = from[i] * a->scale;
  }
  nothing_seen(a->to, a->rows, d);
  for (int64_t begin = a->begin; begin < a->end; begin += GLM4_RANGE) {
    memset(range.out + a->rows * d, 0, sizeof(float) * (padded - a->rows) * d);
    nothing_seen(range, a->rows, d);
    attend_range(a, begin, a->end - begin < GLM4_RANGE ? a->end : begin + GLM4_RANGE, queries, rest, range);
    fold(&range, a->rows, d, &a->to);
  }
}

}  // namespace

#endif
