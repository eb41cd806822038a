// Decoder layers over float32 activations: norms, rotary embedding, cache, attention and the products between them.
// The residual stream stays float32. Source of the mathematics: Glm4DecoderLayer of Transformers, and glm4lite/model/layers.py.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "thread_pool.h"

namespace {

using glm4::parallel_for;
using glm4::Part;
using glm4::Sink;
using glm4::Source;

constexpr int64_t kChunkRows = 512;  // a longer input goes through in parts: bounds the scratch

class Layer {
 public:
  Layer(const glm4_layer& l, const glm4_isa& isa, int threads)
      : l_(l), isa_(isa), threads_(threads), hidden_(l.q.k), q_size_(int64_t{l.heads} * l.head_dim),
        kv_size_(int64_t{l.kv_heads} * l.head_dim) {}

  // x, cos and sin: the rows of all parts.
  void run(float* x, const std::vector<Part>& parts, const float* cos, const float* sin) {
    static thread_local std::vector<float> kept;
    const int64_t tokens = parts.back().first + parts.back().rows;
    const int64_t inner = l_.down.k;
    const int64_t need = tokens * (2 * q_size_ + 2 * kv_size_ + hidden_ + inner);
    if (static_cast<int64_t>(kept.size()) < need) kept.resize(static_cast<size_t>(need));
    float *q = kept.data(), *k = q + tokens * q_size_, *v = k + tokens * kv_size_, *attended = v + tokens * kv_size_;
    float *out = attended + tokens * q_size_, *h = out + tokens * hidden_;

    const Adapted adapted(parts, tokens);
    const Sink qkv[3] = {{&l_.q, l_.q_bias, matrix(q, tokens, q_size_), false, adapted.of(0)},
                         {&l_.k, l_.k_bias, matrix(k, tokens, kv_size_), false, adapted.of(1)},
                         {&l_.v, l_.v_bias, matrix(v, tokens, kv_size_), false, adapted.of(2)}};
    multiply(Normed(*this, x, nullptr, nullptr, l_.input_norm, tokens), qkv, 3, l_.qkv_splits);
    place(q, k, v, parts, tokens, cos, sin);
    glm4::attention(l_, parts, q, attended, isa_, threads_);
    const Sink o{&l_.o, nullptr, matrix(out, tokens, hidden_), false, adapted.of(3)};
    multiply(Plain(attended, tokens, q_size_), &o, 1);
    const Sink gate_up{&l_.gate_up, nullptr, matrix(h, tokens, inner), true, adapted.of(4)};
    multiply(Normed(*this, x, out, l_.post_self_attn_norm, l_.post_attention_norm, tokens), &gate_up, 1);
    const Sink down{&l_.down, nullptr, matrix(out, tokens, hidden_), false, adapted.of(5)};
    multiply(Plain(h, tokens, inner), &down, 1);
    auto add = [&](int64_t t, int) {
      isa_.rows->add(x + t * hidden_, out + t * hidden_, l_.post_mlp_norm, l_.eps, hidden_);
    };
    parallel_for(few(tokens) ? 1 : threads_, tokens, add);
  }

 private:
  // The adapter of each row, for each of the layer's linears.
  class Adapted {
   public:
    Adapted(const std::vector<Part>& parts, int64_t tokens) : tokens_(tokens) {
      static thread_local std::vector<const glm4_lora*> kept;
      if (std::none_of(parts.begin(), parts.end(), [](const Part& part) { return part.lora; })) return;
      kept.assign(static_cast<size_t>(GLM4_LINEARS * tokens), nullptr);
      for (const Part& part : parts)
        for (int64_t t = part.first; part.lora && t < part.first + part.rows; ++t)
          for (int linear = 0; linear < GLM4_LINEARS; ++linear) kept[linear * tokens + t] = part.lora + linear;
      rows_ = kept.data();
    }
    const glm4_lora* const* of(int linear) const { return rows_ ? rows_ + linear * tokens_ : nullptr; }

   private:
    const glm4_lora* const* rows_ = nullptr;
    int64_t tokens_;
  };

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
    bool in_place() const override { return true; }

   private:
    const float* x_;
  };

  static glm4_matrix matrix(float* data, int64_t rows, int64_t columns) { return {data, rows, columns, GLM4_FLOAT32}; }
  static bool few(int64_t tokens) { return tokens < 8; }

  void multiply(const Source& source, const Sink* sinks, int count, int splits = 1) const {
    glm4::linear(source, sinks, count, splits, isa_, threads_);
  }

  // Rotates queries in place, and keys on their way into the cache; values go there too.
  void place(float* q, float* k, const float* v, const std::vector<Part>& parts, int64_t tokens, const float* cos,
             const float* sin) const {
    auto token = [&](int64_t t, int) {
      const float *c = cos + t * (l_.rotary_dim / 2), *s = sin + t * (l_.rotary_dim / 2);
      const Part& part = *std::find_if(parts.begin(), parts.end(), [t](const Part& p) { return t < p.first + p.rows; });
      for (int h = 0; h < l_.heads; ++h) rotate(q + t * q_size_ + h * l_.head_dim, c, s);
      for (int h = 0; h < l_.kv_heads; ++h) {
        float* key = k + t * kv_size_ + h * l_.head_dim;
        rotate(key, c, s);
        keep(part.cache, h, part.cache.length + t - part.first, key, v + t * kv_size_ + h * l_.head_dim);
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
    const int64_t d = l_.head_dim, place = glm4_place(&cache, head, at);
    const int64_t block = place / GLM4_TOKENS * GLM4_TOKENS * d + place % GLM4_TOKENS;
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

  const glm4_layer& l_;
  const glm4_isa& isa_;
  int threads_;
  int64_t hidden_, q_size_, kv_size_;
};

// What rows first..first+count-1 of a step are parts of, with their caches in one layer.
const std::vector<Part>& cut(const glm4_span* spans, int32_t span_count, int32_t layer, int64_t first, int64_t count) {
  static thread_local std::vector<Part> parts;
  int64_t begin = 0;
  parts.clear();
  for (const glm4_span* span = spans; span < spans + span_count; begin += span->rows, ++span) {
    const int64_t from = std::max(begin, first), to = std::min(begin + span->rows, first + count);
    if (from >= to) continue;
    parts.push_back({span->caches[layer], from - first, to - from, span->lora ? span->lora[layer] : nullptr});
    parts.back().cache.length += from - begin;
  }
  return parts;
}

}  // namespace

GLM4_API int32_t glm4_decoder_layers(const glm4_layer* const* layers, int32_t count, const glm4_span* spans,
                                     int32_t span_count, float* x, const float* cos, const float* sin, int32_t isa,
                                     int32_t threads) {
  try {
    int64_t rows = 0;
    for (int32_t i = 0; i < span_count; ++i) rows += spans[i].rows;
    for (int32_t i = 0; i < count; ++i) {
      Layer layer(*layers[i], *glm4_isa_of(isa), threads);
      for (int64_t first = 0; first < rows; first += kChunkRows) {
        const int64_t part = std::min(kChunkRows, rows - first), turn = first * (layers[i]->rotary_dim / 2);
        layer.run(x + first * layers[i]->q.k, cut(spans, span_count, i, first, part), cos + turn, sin + turn);
      }
    }
    return GLM4_OK;
  } catch (...) {  // std::bad_alloc, maybe of another copy of the C++ library, whose type would not be ours
    return GLM4_NO_MEMORY;
  }
}
