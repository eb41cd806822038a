// The format and the product, as qgemm.h states them, in the plainest way.
#include <math.h>

#include <algorithm>

#include "check.h"

namespace check {

namespace {
int64_t tiles(int64_t n) { return (n + GLM4_ROWS - 1) / GLM4_ROWS; }

// A row in its int8 codes, and what each may be off by: a step where it lies within `margin` of a half.
struct Rounded {
  std::vector<double> x, doubt;
};

Rounded round_once(const double* x, int64_t k, double margin) {
  Rounded out{std::vector<double>(k), std::vector<double>(k, 0.0)};
  for (int64_t b = 0; b < k; b += GLM4_COLS) {
    double top = 0.0;
    for (int64_t i = b; i < b + GLM4_COLS; ++i) top = std::max(top, fabs(x[i]));
    for (int64_t i = b; i < b + GLM4_COLS; ++i) {
      const double code = top < 1e-30 ? 0.0 : x[i] * (127.0 / top);
      out.x[i] = nearbyint(code) * top / 127.0;
      if (fabs(fabs(code - floor(code)) - 0.5) < margin) out.doubt[i] = top / 127.0;
    }
  }
  return out;
}

// The second part takes up what the first one rounded, either way; its own codes come from a difference of float32.
Rounded round_twice(const double* x, int64_t k) {
  const Rounded first = round_once(x, k, 1e-4);
  std::vector<double> rest(k);
  for (int64_t i = 0; i < k; ++i) rest[i] = x[i] - first.x[i];
  Rounded out = round_once(rest.data(), k, 0.02);
  for (int64_t i = 0; i < k; ++i) out.x[i] += first.x[i], out.doubt[i] += first.doubt[i] / 100;
  return out;
}
}  // namespace

Weight::Weight(int64_t n, int64_t k, int bits, int group, int64_t offset)
    : n(n), k(k), bits(bits), group(group), codes(tiles(n) * (k / GLM4_COLS) * 64 * bits, offset),
      scales(tiles(n) * (k / group) * GLM4_ROWS, offset), mins(affine() ? scales.size() : 0, offset),
      row_scale(n, offset / 4 * 4), row_min(affine() ? n : 0, offset / 4 * 4) {}

void Weight::randomize(Random& random) {
  for (const auto* plane : {&codes, &scales, &mins})
    for (int64_t i = 0; i < plane->size(); ++i) (*plane)[i] = static_cast<uint8_t>(random.whole(0, 255));
  for (int64_t i = 0; i < n; ++i) row_scale[i] = random.real(1e-5f, 1e-4f);
  for (int64_t i = 0; i < row_min.size(); ++i) row_min[i] = random.real(1e-4f, 1e-3f);
}

glm4_weight Weight::c() const {
  return {codes.data(), scales.data(), affine() ? mins.data() : nullptr, row_scale.data(),
          affine() ? row_min.data() : nullptr, n, k, bits, group};
}

int64_t Weight::plane(int64_t row, int64_t column) const {
  return (row / GLM4_ROWS * (k / group) + column / group) * GLM4_ROWS + row % GLM4_ROWS;
}

double Weight::step(int64_t row, int64_t column) const {
  return static_cast<double>(row_scale[row]) * scales[plane(row, column)];
}

double Weight::low(int64_t row, int64_t column) const {
  return affine() ? static_cast<double>(row_min[row]) * mins[plane(row, column)] : 0.0;
}

int Weight::code(int64_t row, int64_t column) const {
  const int64_t tile = row / GLM4_ROWS * (k / GLM4_COLS) + column / GLM4_COLS, r = row % GLM4_ROWS;
  const int64_t quad = column % GLM4_COLS / 4, byte = tile * 64 * bits + r * 4 + column % 4;
  switch (bits) {
    case 2: return codes[byte + quad / 4 * 64] >> quad % 4 * 2 & 3;
    case 3: return (codes[byte + quad / 4 * 64] >> quad % 4 * 2 & 3) | (codes[byte + 128] >> quad & 1) << 2;
    case 8: return static_cast<int8_t>(codes[byte + quad * 64]);
  }
  const int low = codes[byte + quad / 2 * 64] >> quad % 2 * 4 & 15;
  if (bits == 5) return low | (codes[byte + 256] >> quad & 1) << 4;
  if (bits == 6) return low | (codes[byte + 256 + quad / 4 * 64] >> quad % 4 * 2 & 3) << 4;
  return low;
}

Product product(const std::vector<double>& x, int64_t m, const Weight& w, const float* bias, int splits) {
  std::vector<double> q(w.n * w.k), low(w.n * w.k);
  for (int64_t n = 0; n < w.n; ++n)
    for (int64_t k = 0; k < w.k; ++k)
      q[n * w.k + k] = w.step(n, k) * w.code(n, k), low[n * w.k + k] = w.low(n, k);
  Product out{std::vector<double>(m * w.n), std::vector<double>(m * w.n)};
  for (int64_t r = 0; r < m; ++r) {
    const double* row = x.data() + r * w.k;
    const Rounded a = splits == 2 ? round_twice(row, w.k) : round_once(row, w.k, 1e-4);
    for (int64_t n = 0; n < w.n; ++n) {
      const double *wq = q.data() + n * w.k, *wl = low.data() + n * w.k;
      double y = bias ? bias[n] : 0.0, size = fabs(y), off = 0.0;
      for (int64_t k = 0; k < w.k; ++k) {
        y += (wq[k] - wl[k]) * a.x[k];
        size += (fabs(wq[k]) + wl[k]) * fabs(a.x[k]);
        off += fabs(wq[k] - wl[k]) * a.doubt[k];
      }
      out.y[r * w.n + n] = y;
      out.tolerance[r * w.n + n] = 1.01 * off + 1e-6 * size + 1e-36;
    }
  }
  return out;
}

}  // namespace check
