// Decoder layers over float32 activations: norms, rotary embedding, cache, attention and the products between them.
// The residual stream stays float32. Source of the mathematics: Glm4DecoderLayer of Transformers, and glm4lite/model/layers.py.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "linear.h"
#include "thread_pool.h"

namespace {

using glm4::parallel_for;
using glm4::Sink;
using glm4::Source;

constexpr int64_t kChunkTokens = 512;  // a longer input goes through in parts: bounds the scratch
constexpr int64_t kSplitTokens = 512;  // fewest cached tokens worth an item of their own
constexpr int64_t kStepTokens = 8;     // so few are drafts that are verified, or a batch: each has the bits it has alone

class Layer {
 public:
  Layer(const glm4_layer& l, const glm4_isa& isa, int threads)
      : l_(l), isa_(isa), threads_(threads), hidden_(l.q.k), q_size_(int64_t{l.heads} * l.head_dim),
        kv_size_(int64_t{l.kv_heads} * l.head_dim) {}

  void run(float* x, int64_t tokens, const float* cos, const float* sin, const glm4_cache& cache) {
    static thread_local std::vector<float> kept;
    const int64_t inner = l_.down.k;
    const int64_t need = tokens * (2 * q_size_ + 2 * kv_size_ + hidden_ + inner);
    if (static_cast<int64_t>(kept.size()) < need) kept.resize(static_cast<size_t>(need));
    float *q = kept.data(), *k = q + tokens * q_size_, *v = k + tokens * kv_size_, *attended = v + tokens * kv_size_;
    float *out = attended + tokens * q_size_, *h = out + tokens * hidden_;

    const Sink qkv[3] = {{&l_.q, l_.q_bias, matrix(q, tokens, q_size_)},
                         {&l_.k, l_.k_bias, matrix(k, tokens, kv_size_)},
                         {&l_.v, l_.v_bias, matrix(v, tokens, kv_size_)}};
    multiply(Normed(*this, x, nullptr, nullptr, l_.input_norm, tokens), qkv, 3, l_.qkv_splits);
    place(q, k, v, tokens, cos, sin, cache);
    attention(q, tokens, cache, attended);
    const Sink o{&l_.o, nullptr, matrix(out, tokens, hidden_)};
    multiply(Plain(attended, tokens, q_size_), &o, 1);
    const Sink gate_up{&l_.gate_up, nullptr, matrix(h, tokens, inner), true};
    multiply(Normed(*this, x, out, l_.post_self_attn_norm, l_.post_attention_norm, tokens), &gate_up, 1);
    const Sink down{&l_.down, nullptr, matrix(out, tokens, hidden_)};
    multiply(Plain(h, tokens, inner), &down, 1);
    auto add = [&](int64_t t, int) {
      isa_.rows->add(x + t * hidden_, out + t * hidden_, l_.post_mlp_norm, l_.eps, hidden_);
    };
    parallel_for(few(tokens) ? 1 : threads_, tokens, add);
  }

 private:
  // Rows of the residual stream: something is added to it first (if it is, normed first), then it is normed.
  class Normed : public Source {
   public:
    Normed(const Layer& layer, float* x, const float* add, const float* add_norm, const float* norm, int64_t rows)
        : Source(rows, layer.hidden_), layer_(layer), x_(x), add_(add), add_norm_(add_norm), norm_(norm) {}
    const float* row(int64_t r, float* scratch) const override {
      const glm4_rows& rows = *layer_.isa_.rows;
      if (add_) rows.add(x_ + r * k, add_ + r * k, add_norm_, layer_.l_.eps, k);
      rows.norm(x_ + r * k, norm_, layer_.l_.eps, k, scratch);
      return scratch;
    }

   private:
    const Layer& layer_;
    float* x_;
    const float *add_, *add_norm_, *norm_;
  };

  class Plain : public Source {
   public:
    Plain(const float* x, int64_t rows, int64_t k) : Source(rows, k), x_(x) {}
    const float* row(int64_t r, float*) const override { return x_ + r * k; }

   private:
    const float* x_;
  };

  static glm4_matrix matrix(float* data, int64_t rows, int64_t columns) { return {data, rows, columns, GLM4_FLOAT32}; }
  static bool few(int64_t tokens) { return tokens < 8; }

  void multiply(const Source& source, const Sink* sinks, int count, int splits = 1) const {
    glm4::linear(source, sinks, count, splits, isa_, threads_);
  }

  // Rotates queries in place, and keys on their way into the cache; values go there too.
  void place(float* q, float* k, const float* v, int64_t tokens, const float* cos, const float* sin,
             const glm4_cache& cache) const {
    auto token = [&](int64_t t, int) {
      const float *c = cos + t * (l_.rotary_dim / 2), *s = sin + t * (l_.rotary_dim / 2);
      for (int h = 0; h < l_.heads; ++h) rotate(q + t * q_size_ + h * l_.head_dim, c, s);
      for (int h = 0; h < l_.kv_heads; ++h) {
        float* key = k + t * kv_size_ + h * l_.head_dim;
        rotate(key, c, s);
        keep(cache, h, cache.length + t, key, v + t * kv_size_ + h * l_.head_dim);
      }
    };
    parallel_for(few(tokens) ? 1 : threads_, tokens, token);
  }

  void rotate(float* head, const float* cos, const float* sin) const {
    for (int i = 0; i < l_.rotary_dim / 2; ++i) {
      const float even = head[2 * i], odd = head[2 * i + 1];
      head[2 * i] = even * cos[i] - odd * sin[i];
      head[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
  }

  void keep(const glm4_cache& cache, int head, int64_t at, const float* key, const float* value) const {
    const int64_t d = l_.head_dim, place = head * cache.capacity + at;
    const int64_t block = (head * cache.capacity + at / GLM4_TOKENS * GLM4_TOKENS) * d + at % GLM4_TOKENS;
    if (cache.type == GLM4_FLOAT32) {
      float* keys = static_cast<float*>(cache.keys) + block;
      for (int64_t i = 0; i < d; ++i) keys[i * GLM4_TOKENS] = key[i];
      memcpy(static_cast<float*>(cache.values) + place * d, value, sizeof(float) * d);
      return;
    }
    int8_t* keys = static_cast<int8_t*>(cache.keys) + block;
    cache.key_scale[place] = codes(key, d, keys, GLM4_TOKENS);
    cache.value_scale[place] = codes(value, d, static_cast<int8_t*>(cache.values) + place * d, 1);
  }

  // int8 codes of one head's vector, `step` bytes apart; their scale, NaN where a value is not finite.
  static float codes(const float* v, int64_t d, int8_t* to, int64_t step) {
    float top = 0.0f, bad = 0.0f;
    for (int64_t i = 0; i < d; ++i) {
      top = std::max(top, fabsf(v[i]));
      bad += v[i] * 0.0f;
    }
    const bool some = bad == 0.0f && top >= 1e-30f;  // the inverse of less may be infinite
    const float inverse = some ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < d; ++i) to[i * step] = static_cast<int8_t>(some ? lrintf(v[i] * inverse) : 0);
    return bad == 0.0f ? top / 127.0f : NAN;
  }

  // Items: key/value heads x groups of query tokens x ranges of cached tokens, whose results are merged. Where there are
  // few queries, as in decoding, the ranges are the same for however many; many need several ranges only for the threads.
  void attention(const float* q, int64_t tokens, const glm4_cache& cache, float* attended) const {
    const int64_t per_token = l_.heads / l_.kv_heads, total = cache.length + tokens;
    const int64_t item_tokens = std::max<int64_t>(1, GLM4_ATTENTION_ROWS / per_token);
    const int64_t parts = (tokens + item_tokens - 1) / item_tokens, pairs = parts * l_.kv_heads;
    const int64_t most = std::max<int64_t>(1, (4 * threads_ + pairs - 1) / pairs);
    const bool step = tokens <= kStepTokens;
    const int64_t splits =
        step ? (total + kSplitTokens - 1) / kSplitTokens : std::clamp<int64_t>(total / kSplitTokens, 1, most);
    const int64_t range =
        step ? kSplitTokens : (total + splits * GLM4_TOKENS - 1) / (splits * GLM4_TOKENS) * GLM4_TOKENS;
    const int64_t rows = std::min(tokens, item_tokens) * per_token, d = l_.head_dim;
    static thread_local std::vector<float> kept, scratch;
    const int64_t result = rows * (d + 2);
    const auto fit = [](std::vector<float>& v, int64_t n) {
      if (static_cast<int64_t>(v.size()) < n) v.resize(static_cast<size_t>(n));
      return v.data();
    };
    float* results = fit(kept, pairs * splits * result);
    float* scratches = fit(scratch, int64_t{threads_} * GLM4_ATTENTION_SCRATCH);
    auto item = [&](int64_t i, int slot) {
      const int64_t pair = i / splits, first = pair / l_.kv_heads * item_tokens, head = pair % l_.kv_heads;
      const int64_t count = std::min(item_tokens, tokens - first), visible = cache.length + first + 1;
      float* out = results + i * result;
      glm4_attention a{};
      a.q = q + first * q_size_ + head * per_token * d;
      head_of(cache, head, &a);
      a.q_stride = q_size_, a.rows = count * per_token, a.per_token = per_token, a.head_dim = d;
      a.begin = i % splits * range;
      a.end = std::min(a.begin + range, visible + count - 1);
      a.visible = visible, a.scale = 1.0f / sqrtf(static_cast<float>(d));
      a.out = out, a.top = out + rows * d, a.total = a.top + rows;
      isa_.rows->attend(&a, scratches + int64_t{slot} * GLM4_ATTENTION_SCRATCH);
    };
    parallel_for(tokens * total * q_size_ < (1 << 18) ? 1 : threads_, pairs * splits, item);
    auto merge = [&](int64_t pair, int) {
      const int64_t first = pair / l_.kv_heads * item_tokens, head = pair % l_.kv_heads;
      for (int64_t r = 0; r < std::min(item_tokens, tokens - first) * per_token; ++r)
        merge_row(results + pair * splits * result, splits, result, rows, r,
                  attended + (first + r / per_token) * q_size_ + (head * per_token + r % per_token) * d);
    };
    parallel_for(few(tokens) ? 1 : threads_, pairs, merge);
  }

  void head_of(const glm4_cache& cache, int64_t head, glm4_attention* a) const {
    const int64_t at = head * cache.capacity, size = cache.type == GLM4_FLOAT32 ? sizeof(float) : 1;
    a->keys = static_cast<const char*>(cache.keys) + at * l_.head_dim * size;
    a->values = static_cast<const char*>(cache.values) + at * l_.head_dim * size;
    a->key_scale = cache.key_scale ? cache.key_scale + at : nullptr;
    a->value_scale = cache.value_scale ? cache.value_scale + at : nullptr;
    a->kv_type = cache.type;
  }

  // One row's ranges, each a sum of exp(score - top) * value, to the weighted mean over all of them.
  void merge_row(const float* results, int64_t splits, int64_t result, int64_t rows, int64_t r, float* to) const {
    const int64_t d = l_.head_dim;
    float top = -INFINITY, total = 0.0f;
    for (int64_t s = 0; s < splits; ++s) top = std::max(top, results[s * result + rows * d + r]);
    for (int64_t i = 0; i < d; ++i) to[i] = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      const float* from = results + s * result;
      if (from[rows * d + r] == -INFINITY) continue;
      const float share = expf(from[rows * d + r] - top);
      total += share * from[rows * d + rows + r];
      for (int64_t i = 0; i < d; ++i) to[i] += share * from[r * d + i];
    }
    for (int64_t i = 0; i < d; ++i) to[i] /= total;
  }

  const glm4_layer& l_;
  const glm4_isa& isa_;
  int threads_;
  int64_t hidden_, q_size_, kv_size_;
};

}  // namespace

GLM4_API int32_t glm4_decoder_layers(const glm4_layer* const* layers, const glm4_cache* caches, int32_t count, float* x,
                                     int64_t tokens, const float* cos, const float* sin, int32_t isa,
                                     int32_t threads) {
  try {
    for (int32_t i = 0; i < count; ++i) {
      Layer layer(*layers[i], *glm4_isa_of(isa), threads);
      glm4_cache at = caches[i];
      for (int64_t first = 0; first < tokens; first += kChunkTokens) {
        const int64_t part = std::min(kChunkTokens, tokens - first), turn = first * (layers[i]->rotary_dim / 2);
        layer.run(x + first * layers[i]->q.k, part, cos + turn, sin + turn, at);
        at.length += part;
      }
    }
    return GLM4_OK;
  } catch (...) {  // std::bad_alloc, maybe of another copy of the C++ library, whose type would not be ours
    return GLM4_NO_MEMORY;
  }
}
