// glm4_decoder_layers against the mathematics of Glm4DecoderLayer in float64, over caches of the exact size.
#include <math.h>

#include <algorithm>
#include <utility>

#include "check.h"

namespace check {

namespace {

using Rows = std::vector<double>;

struct Shape {
  int heads, kv_heads, head_dim, rotary_dim, hidden, inner, bits, group;
  bool sandwich, bias, int8;
  int splits = 1;  // of the input of q, k and v
};

// Everything one layer is made of.
struct Layer {
  Layer(const Shape& s, Random& random)
      : s(s), q(s.heads * s.head_dim, s.hidden, s.bits, s.group), k(s.kv_heads * s.head_dim, s.hidden, s.bits, s.group),
        v(s.kv_heads * s.head_dim, s.hidden, s.bits, s.group), o(s.hidden, s.heads * s.head_dim, s.bits, s.group),
        gate_up(2 * s.inner, s.hidden, s.bits, s.group), down(s.hidden, s.inner, s.bits, s.group), q_bias(q.n),
        k_bias(k.n), v_bias(v.n), norms{Exact<float>(s.hidden), Exact<float>(s.hidden), Exact<float>(s.hidden),
                                        Exact<float>(s.hidden)} {
    for (Weight* w : {&q, &k, &v, &o, &gate_up, &down}) center(*w, random);
    for (const auto* bias : {&q_bias, &k_bias, &v_bias}) random.fill(*bias, 0.2f);
    for (const auto& norm : norms)
      for (int i = 0; i < s.hidden; ++i) norm[i] = random.real(0.5f, 1.5f);
  }

  // Values around zero of a size that keeps the next stage's near one.
  static void center(Weight& w, Random& random) {
    w.randomize(random);
    const float size = 1.0f / sqrtf(static_cast<float>(w.k));
    const float codes = w.affine() ? 42.7f * w.top() : 9600.0f;
    for (int64_t i = 0; i < w.n; ++i) w.row_scale[i] = size * random.real(0.5f, 1.5f) / codes;
    for (int64_t i = 0; i < w.row_min.size(); ++i) w.row_min[i] = w.row_scale[i] * 0.5f * w.top();
    for (int64_t i = 0; i < w.scales.size(); ++i) w.scales[i] = static_cast<uint8_t>(random.whole(100, 156));
    for (int64_t i = 0; i < w.mins.size(); ++i) w.mins[i] = w.scales[i];
  }

  glm4_layer c() const {
    const auto bias = [&](const Exact<float>& b) { return s.bias ? b.data() : nullptr; };
    return {q.c(), k.c(), v.c(), o.c(), gate_up.c(), down.c(), bias(q_bias), bias(k_bias), bias(v_bias),
            norms[0].data(), s.sandwich ? norms[1].data() : nullptr, norms[2].data(),
            s.sandwich ? norms[3].data() : nullptr, 1e-5f, s.heads, s.kv_heads, s.head_dim, s.rotary_dim, s.splits};
  }

  Shape s;
  Weight q, k, v, o, gate_up, down;
  Exact<float> q_bias, k_bias, v_bias;
  Exact<float> norms[4];
};

// Room for `capacity` tokens and not one more; in one piece, or in blocks that lie in any order.
struct Cache {
  Cache(const Shape& s, int64_t capacity) : Cache(s, capacity, {}) {}
  static Cache in_blocks(const Shape& s, int64_t tokens, Random& random) {
    std::vector<int32_t> table((tokens + GLM4_BLOCK - 1) / GLM4_BLOCK);
    for (size_t i = 0; i < table.size(); ++i) {
      const size_t other = static_cast<size_t>(random.whole(0, static_cast<int64_t>(i)));
      table[i] = table[other], table[other] = static_cast<int32_t>(i);
    }
    return Cache(s, static_cast<int64_t>(table.size()) * GLM4_BLOCK, table);
  }

  int64_t places() const { return s.kv_heads * capacity; }
  int64_t place(int head, int64_t token) const {
    if (table.empty()) return head * capacity + token;
    const int64_t block = table[static_cast<size_t>(token / GLM4_BLOCK)];
    return (block * s.kv_heads + head) * GLM4_BLOCK + token % GLM4_BLOCK;
  }
  int64_t key_at(int head, int64_t token, int i) const {
    const int64_t at = place(head, token);
    return at / GLM4_TOKENS * GLM4_TOKENS * s.head_dim + i * GLM4_TOKENS + at % GLM4_TOKENS;
  }
  int64_t value_at(int head, int64_t token, int i) const { return place(head, token) * s.head_dim + i; }
  double key(int head, int64_t token, int i) const {
    const int64_t at = key_at(head, token, i);
    return s.int8 ? static_cast<double>(key_codes[at]) * key_scale[place(head, token)] : floats[at];
  }
  double value(int head, int64_t token, int i) const {
    const int64_t at = value_at(head, token, i);
    return s.int8 ? static_cast<double>(value_codes[at]) * value_scale[place(head, token)] : values[at];
  }
  // Past tokens out of nowhere; now and then one whose value outweighs all others, so that its loss shows.
  void invent(int64_t tokens, Random& random) {
    for (int h = 0; h < s.kv_heads; ++h)
      for (int64_t t = 0; t < tokens; ++t) {
        const bool loud = t == 0 || t == tokens - 1 || random.whole(0, 40) == 0;
        const float size = loud ? 30.0f : 1.0f;
        if (s.int8) key_scale[place(h, t)] = 0.02f, value_scale[place(h, t)] = size / 127;
        for (int i = 0; i < s.head_dim; ++i) {
          const float k = random.bell(), v = random.bell() * size;
          if (s.int8) {
            key_codes[key_at(h, t, i)] = static_cast<int8_t>(random.whole(-127, 127));
            value_codes[value_at(h, t, i)] = static_cast<int8_t>(random.whole(-127, 127));
          } else {
            floats[key_at(h, t, i)] = k, values[value_at(h, t, i)] = v;
          }
        }
      }
    length = tokens;
  }
  glm4_cache c() const {
    void* keys = s.int8 ? static_cast<void*>(key_codes.data()) : floats.data();
    void* of_values = s.int8 ? static_cast<void*>(value_codes.data()) : values.data();
    const bool whole = table.empty();
    return {keys, of_values, s.int8 ? key_scale.data() : nullptr, s.int8 ? value_scale.data() : nullptr,
            whole ? nullptr : table.data(), whole ? GLM4_BLOCK : s.kv_heads * GLM4_BLOCK,
            whole ? capacity : GLM4_BLOCK, length, s.int8 ? GLM4_INT8 : GLM4_FLOAT32};
  }

  Shape s;
  int64_t capacity, length = 0;
  std::vector<int32_t> table;
  Exact<float> floats, values;
  Exact<int8_t> key_codes, value_codes;
  Exact<float> key_scale, value_scale;

 private:
  Cache(const Shape& s, int64_t capacity, std::vector<int32_t> table)
      : s(s), capacity(capacity), table(std::move(table)), floats(s.int8 ? 0 : places() * s.head_dim),
        values(floats.size()), key_codes(s.int8 ? places() * s.head_dim : 0), value_codes(key_codes.size()),
        key_scale(s.int8 ? places() : 0), value_scale(key_scale.size()) {}
};

// So many new tokens of one sequence.
struct Span {
  Cache* cache;
  int64_t tokens;
};

double largest(const Rows& v) {
  double top = 0.0;
  for (double x : v) top = std::max(top, fabs(x));
  return top;
}

// A code next to a half may round either way after a norm in float32, and all that follows from it with it.
void near(const char* what, double got, double want, double tolerance) {
  if (!(fabs(got - want) <= tolerance + 1e-6)) fail("%s is %.7g, not %.7g within %.2g", what, got, want, tolerance);
}

Rows normed(const Rows& x, const Exact<float>& weight, double eps) {
  const int64_t k = weight.size();
  Rows out(x.size());
  for (size_t r = 0; r < x.size() / k; ++r) {
    double squares = 0.0;
    for (int64_t i = 0; i < k; ++i) squares += x[r * k + i] * x[r * k + i];
    const double by = 1.0 / sqrt(squares / k + eps);
    for (int64_t i = 0; i < k; ++i) out[r * k + i] = x[r * k + i] * by * weight[i];
  }
  return out;
}

void add(Rows* x, const Rows& y, const Exact<float>* norm, double eps) {
  const Rows more = norm ? normed(y, *norm, eps) : y;
  for (size_t i = 0; i < x->size(); ++i) (*x)[i] += more[i];
}

struct Turn {  // cos and sin of each token's angles
  Exact<float> cos, sin;
  Turn(const Turn& whole, int64_t first, int64_t tokens, const Shape& s)
      : cos(tokens * (s.rotary_dim / 2)), sin(cos.size()) {
    for (int64_t i = 0; i < cos.size(); ++i) {
      cos[i] = whole.cos[first * (s.rotary_dim / 2) + i], sin[i] = whole.sin[first * (s.rotary_dim / 2) + i];
    }
  }
  Turn(int64_t tokens, const Shape& s, Random& random) : cos(tokens * (s.rotary_dim / 2)), sin(cos.size()) {
    for (int64_t i = 0; i < cos.size(); ++i) {
      const float angle = random.real(-3.0f, 3.0f);
      cos[i] = cosf(angle), sin[i] = sinf(angle);
    }
  }
};

void rotate(Rows* x, int heads, const Shape& s, const Turn& turn) {
  const int64_t half = s.rotary_dim / 2, tokens = static_cast<int64_t>(x->size()) / (heads * s.head_dim);
  for (int64_t t = 0; t < tokens; ++t)
    for (int h = 0; h < heads; ++h)
      for (int64_t i = 0; i < half; ++i) {
        double* pair = x->data() + (t * heads + h) * s.head_dim + 2 * i;
        const double even = pair[0], odd = pair[1], c = turn.cos[t * half + i], si = turn.sin[t * half + i];
        pair[0] = even * c - odd * si, pair[1] = odd * c + even * si;
      }
}

// The new tokens' entries are what they should be.
void compare_cache(const Cache& cache, int64_t past, const Rows& k, const Rows& v) {
  const Shape& s = cache.s;
  const double tolerance = s.int8 ? 8e-3 : 4e-3, of_keys = tolerance * largest(k), of_values = tolerance * largest(v);
  const int64_t tokens = static_cast<int64_t>(k.size()) / (s.kv_heads * s.head_dim);
  for (int64_t t = 0; t < tokens; ++t)
    for (int h = 0; h < s.kv_heads; ++h)
      for (int i = 0; i < s.head_dim; ++i) {
        const int64_t at = (t * s.kv_heads + h) * s.head_dim + i;
        near("a key", cache.key(h, past + t, i), k[at], of_keys);
        near("a value", cache.value(h, past + t, i), v[at], of_values);
      }
}

Rows attended(const Rows& q, const Cache& cache, int64_t past) {
  const Shape& s = cache.s;
  const int64_t tokens = static_cast<int64_t>(q.size()) / (s.heads * s.head_dim);
  Rows out(q.size(), 0.0), keys, values, p(past + tokens);
  for (int head = 0; head < s.kv_heads; ++head) {
    keys.clear(), values.clear();
    for (int64_t t = 0; t < past + tokens; ++t)
      for (int i = 0; i < s.head_dim; ++i)
        keys.push_back(cache.key(head, t, i)), values.push_back(cache.value(head, t, i));
    for (int64_t r = 0; r < tokens * s.heads; ++r) {
      if (r % s.heads / (s.heads / s.kv_heads) != head) continue;
      const int64_t seen = past + r / s.heads + 1;
      double top = -INFINITY, total = 0.0;
      for (int64_t t = 0; t < seen; ++t) {
        double sum = 0.0;
        for (int i = 0; i < s.head_dim; ++i) sum += q[r * s.head_dim + i] * keys[t * s.head_dim + i];
        p[t] = sum / sqrt(s.head_dim);
        top = std::max(top, p[t]);
      }
      for (int64_t t = 0; t < seen; ++t) total += p[t] = exp(p[t] - top);
      for (int64_t t = 0; t < seen; ++t)
        for (int i = 0; i < s.head_dim; ++i) out[r * s.head_dim + i] += p[t] / total * values[t * s.head_dim + i];
    }
  }
  return out;
}

// What the layer makes of x; the cache is as the library left it, for its codes are what its attention reads.
Rows oracle(const Layer& layer, const Rows& x, const Turn& turn, const Cache& cache, int64_t past) {
  const Shape& s = layer.s;
  const int64_t tokens = static_cast<int64_t>(x.size()) / s.hidden;
  const float eps = 1e-5f;
  const auto times = [&](const Rows& in, const Weight& w) { return product(in, tokens, w, nullptr, 1).y; };
  const auto biased = [&](const Rows& in, const Weight& w, const Exact<float>& bias) {
    return product(in, tokens, w, s.bias ? bias.data() : nullptr, s.splits).y;
  };
  const Rows h = normed(x, layer.norms[0], eps);
  Rows q = biased(h, layer.q, layer.q_bias), k = biased(h, layer.k, layer.k_bias);
  rotate(&q, s.heads, s, turn), rotate(&k, s.kv_heads, s, turn);
  compare_cache(cache, past, k, biased(h, layer.v, layer.v_bias));
  Rows out = x;
  add(&out, times(attended(q, cache, past), layer.o), s.sandwich ? &layer.norms[1] : nullptr, eps);
  const Rows both = times(normed(out, layer.norms[2], eps), layer.gate_up);
  Rows inner(tokens * s.inner);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < s.inner; ++i) {
      const double gate = both[t * 2 * s.inner + i];
      inner[t * s.inner + i] = gate / (1.0 + exp(-gate)) * both[t * 2 * s.inner + s.inner + i];
    }
  add(&out, times(inner, layer.down), s.sandwich ? &layer.norms[3] : nullptr, eps);
  return out;
}

void past_is_kept(const Cache& before, const Cache& after) {
  for (int h = 0; h < before.s.kv_heads; ++h)
    for (int64_t t = 0; t < before.length; ++t)
      for (int i = 0; i < before.s.head_dim; ++i)
        if (before.key(h, t, i) != after.key(h, t, i) || before.value(h, t, i) != after.value(h, t, i))
          fail("token %d of the past was changed", static_cast<int>(t));
}

void run(const Layer& layer, const std::vector<Span>& spans, const Exact<float>& x, const Turn& turn, int isa,
         int threads) {
  const glm4_layer described = layer.c(), *const pointer = &described;
  std::vector<glm4_cache> places;
  std::vector<glm4_span> rows;
  for (const Span& span : spans) places.push_back(span.cache->c());
  for (size_t i = 0; i < spans.size(); ++i) rows.push_back({spans[i].tokens, &places[i], nullptr});
  const int32_t count = static_cast<int32_t>(spans.size());
  const float *cos = turn.cos.data(), *sin = turn.sin.data();
  if (glm4_decoder_layers(&pointer, 1, rows.data(), count, x.data(), cos, sin, isa, threads) != GLM4_OK) fail("refused");
}

// What a span's rows became is what the mathematics say, and to the bit what they become alone on other threads.
void compare(const Layer& layer, const Span& span, const Cache& kept, const Exact<float>& before, const float* after,
             const Turn& turn, int isa, int threads) {
  past_is_kept(kept, *span.cache);
  const Rows x(before.data(), before.data() + before.size()), want = oracle(layer, x, turn, *span.cache, kept.length);
  Rows change(want.size());
  for (size_t i = 0; i < want.size(); ++i) change[i] = want[i] - x[i];
  const double top = largest(change);
  double off = 0.0, size = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = after[i] - x[i];
    near("an output", got, change[i], 0.03 * top);
    off += (got - change[i]) * (got - change[i]), size += change[i] * change[i];
  }
  near("the root of the mean squared error", sqrt(off), 0.0, 8e-3 * sqrt(size));
  Cache own = kept;
  run(layer, {{&own, span.tokens}}, before, turn, isa, 4 - threads);
  if (memcmp(before.data(), after, sizeof(float) * before.size()) != 0) fail("a row has other bits than alone");
}

// New tokens of several sequences go through the layer.
void step(const Layer& layer, const std::vector<Span>& spans, int isa, int threads, Random& random) {
  const Shape& s = layer.s;
  const Span& first = spans[0];
  int64_t tokens = 0;
  for (const Span& span : spans) tokens += span.tokens;
  describe("%d heads (%d kv) of %d, %d rotated, hidden %d, inner %d, int%d, %d threads, %d sequences of %d tokens; the "
           "first: %s cache of %d with %d, %d tokens",
           s.heads, s.kv_heads, s.head_dim, s.rotary_dim, s.hidden, s.inner, s.bits, threads,
           static_cast<int>(spans.size()), static_cast<int>(tokens), s.int8 ? "int8" : "float32",
           static_cast<int>(first.cache->capacity), static_cast<int>(first.cache->length),
           static_cast<int>(first.tokens));
  Exact<float> x(tokens * s.hidden);
  random.fill(x);
  const Exact<float> before(x);
  const Turn turn(tokens, s, random);
  std::vector<Cache> kept;
  for (const Span& span : spans) kept.push_back(*span.cache);
  run(layer, spans, x, turn, isa, threads);
  int64_t at = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    Exact<float> own(spans[i].tokens * s.hidden);
    memcpy(own.data(), before.data() + at * s.hidden, sizeof(float) * own.size());
    compare(layer, spans[i], kept[i], own, x.data() + at * s.hidden, Turn(turn, at, spans[i].tokens, s), isa, threads);
    spans[i].cache->length += spans[i].tokens;
    at += spans[i].tokens;
  }
}

void step(const Layer& layer, Cache* cache, int64_t tokens, int isa, int threads, Random& random) {
  step(layer, {{cache, tokens}}, isa, threads, random);
}

int64_t whole_blocks(int64_t tokens) { return (tokens + GLM4_TOKENS - 1) / GLM4_TOKENS * GLM4_TOKENS; }

void conversation(const Shape& s, int isa, Random& random) {
  const Layer layer(s, random);
  Cache cache(s, whole_blocks(29));
  for (int tokens : {5, 1, 0, 1, 17, 1, 4}) step(layer, &cache, tokens, isa, 1 + tokens % 3, random);
}

// Sequences that join and leave, some with pasts of several ranges, in one piece and in blocks.
void company(const Shape& s, int isa, Random& random) {
  const Layer layer(s, random);
  Cache fresh(s, whole_blocks(40)), old(s, whole_blocks(1100)), blocks = Cache::in_blocks(s, 70, random);
  Cache old_blocks = Cache::in_blocks(s, 600, random);
  old.invent(1020, random), old_blocks.invent(500, random);
  step(layer, {{&fresh, 30}, {&blocks, 1}}, isa, 2, random);
  step(layer, {{&old_blocks, 1}, {&fresh, 1}, {&old, 1}, {&blocks, 1}}, isa, 2, random);
  step(layer, {{&old, 70}, {&blocks, 65}, {&old_blocks, 20}}, isa, 3, random);
  step(layer, {{&old_blocks, 60}, {&old, 3}, {&fresh, 0}}, isa, 1, random);
}

void long_past(const Shape& s, int64_t past, int64_t tokens, int isa, int threads, Random& random) {
  const Layer layer(s, random);
  Cache cache(s, whole_blocks(past + tokens));
  cache.invent(past, random);
  step(layer, &cache, tokens, isa, threads, random);
}

// A token that is no number ends in NaN and in no crash; those before it, in another block of scores, are as they were.
void spoiled_token(const Shape& s, int isa, Random& random) {
  describe("a token that is no number, %s cache", s.int8 ? "int8" : "float32");
  const Layer layer(s, random);
  Cache cache(s, 96);
  Exact<float> x(90 * s.hidden);
  random.fill(x);
  Exact<float> clean(x);
  const Turn turn(90, s, random);
  run(layer, {{&cache, 90}}, clean, turn, isa, 2);
  x[70 * s.hidden + 3] = NAN, x[80 * s.hidden] = INFINITY;
  run(layer, {{&cache, 90}}, x, turn, isa, 2);
  for (int64_t t : {70, 75, 80, 89})
    for (int i = 0; i < s.hidden; ++i)
      if (const float v = x[t * s.hidden + i]; !isnan(v))
        fail("token %d is %g", static_cast<int>(t), static_cast<double>(v));
  if (memcmp(x.data(), clean.data(), sizeof(float) * 64 * s.hidden) != 0) fail("it reached the tokens before it");
}

// Keys and values smaller than any scale can hold become zeros, and their tokens a harmless mean of nothing.
void tiny_keys(Shape s, int isa, Random& random) {
  const Layer layer(s, random);
  for (const Weight* w : {&layer.k, &layer.v}) w->row_scale.fill(1e-43f), w->row_min.fill(0.0f);
  Cache cache(s, 16);
  step(layer, &cache, 3, isa, 1, random);
  for (int h = 0; h < s.kv_heads; ++h)
    for (int64_t t = 0; t < 3; ++t)
      if (!(fabs(cache.key(h, t, 0)) < 1e-30 && fabs(cache.value(h, t, 0)) < 1e-30)) fail("a tiny key has grown");
}

}  // namespace

void check_layers(int isa) {
  Random random(3);
  for (bool int8 : {false, true}) {
    conversation({2, 2, 16, 16, 64, 96, 4, 32, true, false, int8}, isa, random);
    conversation({6, 2, 64, 32, 96, 160, 8, 32, false, true, int8, 2}, isa, random);
    conversation({16, 1, 16, 8, 128, 128, 4, 64, true, true, int8}, isa, random);
    conversation({48, 2, 16, 6, 128, 256, 4, 128, false, false, int8, 2}, isa, random);
    conversation({2, 1, 256, 128, 32, 64, 4, 32, true, true, int8}, isa, random);
    conversation({128, 1, 16, 0, 32, 32, 8, 32, false, false, int8}, isa, random);
    for (int64_t past : {1023, 1040, 1539, 2600})
      long_past({16, 1, 16, 8, 64, 64, 4, 32, false, true, int8}, past, past == 1040 ? 3 : 1, isa, 2, random);
    long_past({6, 2, 32, 16, 64, 64, 8, 64, true, false, int8}, 1100, 1, isa, 3, random);
    long_past({2, 2, 16, 16, 32, 32, 4, 32, true, false, int8}, 20, 515, isa, 2, random);  // more than one chunk
    company({6, 2, 32, 16, 64, 96, 4, 32, true, false, int8}, isa, random);
    company({32, 1, 16, 16, 32, 32, 8, 32, false, true, int8, 2}, isa, random);
    tiny_keys({4, 2, 32, 16, 64, 64, 4, 32, true, false, int8}, isa, random);
    spoiled_token({4, 2, 32, 16, 64, 64, 4, 32, true, true, int8, 2}, isa, random);
  }
}

}  // namespace check
