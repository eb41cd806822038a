// The calibrated tile compiled for AVX2, and the search for one row's steps and minima in AVX2: quantize.cpp's `search`,
// operation for operation (no fused multiply-add), eight weights at a time.
#include <immintrin.h>

#include "qgemm.h"
#include "quantize_tile.h"

namespace {

// Lane i combined with lanes i + 4, then i + 2, then i + 1: the order of the reference's tree.
inline float add_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float min_lanes(__m256 v) {
  __m128 s = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_min_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
}

inline float max_lanes(__m256 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

template <int V>
inline float squared_error(const __m256* w, float most, float step, float low) {
  const __m256 inverse = _mm256_set1_ps(step > GLM4_TINY ? 1.0f / step : 0.0f);
  const __m256 s = _mm256_set1_ps(step), m = _mm256_set1_ps(low);
  const __m256 zero = _mm256_setzero_ps(), top = _mm256_set1_ps(most);
  __m256 e[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    __m256 q = _mm256_mul_ps(_mm256_add_ps(w[i], m), inverse);
    q = _mm256_round_ps(_mm256_min_ps(_mm256_max_ps(q, zero), top), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 off = _mm256_sub_ps(_mm256_sub_ps(_mm256_mul_ps(q, s), m), w[i]);
    e[i] = _mm256_mul_ps(off, off);
  }
#pragma GCC unroll 4
  for (int half = V / 2; half >= 1; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) e[i] = _mm256_add_ps(e[i], e[i + half]);
  return add_lanes(e[0]);
}

template <int V>
void search_row(const float* row, int64_t groups, int shares, float top, float* step, float* low) {
  const float per_code = static_cast<float>(1.0 / top);
  for (int64_t g = 0; g < groups; ++g, row += 8 * V) {
    __m256 w[V];
    for (int i = 0; i < V; ++i) w[i] = _mm256_loadu_ps(row + 8 * i);
    __m256 small = w[0], large = w[0];
    for (int i = 1; i < V; ++i) small = _mm256_min_ps(small, w[i]), large = _mm256_max_ps(large, w[i]);
    const float least = min_lanes(small), most = max_lanes(large), whole = 0.0f - (least < 0.0f ? least : 0.0f);
    float best = 3e38f;
    for (int i = 0; i < shares; ++i) {
      const float* share = GLM4_SHARES[i];
      const float m = whole * share[0], s = (most * share[1] + m) * per_code;
      const float error = squared_error<V>(w, top, s, m);
      if (error < best) best = error, step[g] = s, low[g] = m;
    }
  }
}

}  // namespace

void glm4_search_avx2(const float* row, int64_t k, int32_t group, int32_t shares, float top, float* step, float* low) {
  if (group == 32) return search_row<4>(row, k / 32, shares, top, step, low);
  if (group == 64) return search_row<8>(row, k / 64, shares, top, step, low);
  search_row<16>(row, k / 128, shares, top, step, low);
}

void glm4_quantize_tile_avx2(const glm4_weight* w, int64_t tile, const float* columns, const glm4_inputs* inputs,
                             float* scratch) {
  quantize_tile(*w, tile, columns, *inputs, scratch);
}

void glm4_fit_tile_avx2(const glm4_grid* to, int64_t tile, int64_t rows, const float* columns,
                        const float* importance) {
  fit_tile(*to, tile, rows, columns, importance);
}
