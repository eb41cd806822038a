// glm4_matmul over random shapes, both input types, strides, unaligned planes, extreme values.
#include <float.h>
#include <math.h>

#include "check.h"

namespace check {

namespace {

struct Case {
  int64_t m, n, k;
  int bits, group, threads;
  bool bfloat16, bias;
  int splits;
};

// Activations in their own type, `gap` elements between the rows.
struct Input {
  Input(const Case& c, int64_t gap)
      : c(c), stride(c.k + gap), floats(c.bfloat16 ? 0 : room()), halves(c.bfloat16 ? room() : 0, 2) {}
  int64_t room() const { return c.m == 0 ? 0 : (c.m - 1) * stride + c.k; }
  void set(int64_t r, int64_t i, float v) const {
    if (!c.bfloat16) {
      floats[r * stride + i] = v;
      return;
    }
    uint32_t bits;
    memcpy(&bits, &v, 4);
    halves[r * stride + i] = static_cast<uint16_t>(bits >> 16);
  }
  float get(int64_t r, int64_t i) const {
    return c.bfloat16 ? from_bfloat16(halves[r * stride + i]) : floats[r * stride + i];
  }
  glm4_matrix matrix() const {
    void* data = c.bfloat16 ? static_cast<void*>(halves.data()) : floats.data();
    return {data, c.m, stride, c.bfloat16 ? GLM4_BFLOAT16 : GLM4_FLOAT32};
  }
  std::vector<double> dense() const {
    std::vector<double> out(c.m * c.k);
    for (int64_t r = 0; r < c.m; ++r)
      for (int64_t i = 0; i < c.k; ++i) out[r * c.k + i] = get(r, i);
    return out;
  }

  const Case& c;
  int64_t stride;
  Exact<float> floats;
  Exact<uint16_t> halves;
};

std::vector<float> multiply(const Case& c, const Weight& w, const Input& x, const float* bias, int isa) {
  Case shape = c;
  shape.k = c.n;
  const Input out(shape, 3);
  const glm4_weight weight = w.c();
  const glm4_matrix from = x.matrix(), to = out.matrix();
  if (glm4_matmul(&weight, &from, bias, &to, c.splits, isa, c.threads) != GLM4_OK) fail("glm4_matmul refused");
  std::vector<float> result(c.m * c.n);
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t i = 0; i < out.stride && r * out.stride + i < out.room(); ++i) {
      const float v = out.get(r, i), untouched = out.c.bfloat16 ? from_bfloat16(0x7f7f) : 3.3961514e38f;
      if (i < c.n) result[r * c.n + i] = v;
      if (i >= c.n && v != untouched) fail("row %d was written past its end", static_cast<int>(r));
    }
  return result;
}

void compare(const Case& c, const std::vector<float>& got, const Product& want) {
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const double tolerance = want.tolerance[i] + (c.bfloat16 ? fabs(want.y[i]) / 256 : 0.0);
    if (!(fabs(got[i] - want.y[i]) <= tolerance))
      fail("row %d, output %d is %.9g, not %.9g within %.2g", static_cast<int>(i / c.n), static_cast<int>(i % c.n),
           static_cast<double>(got[i]), want.y[i], tolerance);
  }
}

void announce(const Case& c, const char* what) {
  describe("%s, int%d groups of %d, %dx%d times %d rows of %s in %d splits, %d threads%s", what, c.bits, c.group,
           static_cast<int>(c.n), static_cast<int>(c.k), static_cast<int>(c.m), c.bfloat16 ? "bfloat16" : "float32",
           c.splits, c.threads, c.bias ? ", bias" : "");
}

void random_values(const Case& c, int isa, Random& random) {
  announce(c, "random values");
  Weight w(c.n, c.k, c.bits, c.group, random.whole(0, 7));
  w.randomize(random);
  const Input x(c, random.whole(0, 9));
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t i = 0; i < c.k; ++i) x.set(r, i, random.bell() * (i / 32 % 3 == 2 ? 40.0f : 1.0f));
  Exact<float> bias(c.n);
  random.fill(bias);
  const float* b = c.bias ? bias.data() : nullptr;
  compare(c, multiply(c, w, x, b, isa), product(x.dense(), c.m, w, b, c.splits));
}

void extreme_values(const Case& c, int isa) {
  announce(c, "extreme values");
  Weight w(c.n, c.k, c.bits, c.group);
  for (int byte : {0x00, 0xff, 0x80, 0x7f, 0x81})
    for (float value : {127.0f, -127.0f, 0.0f, -0.0f, 1e-40f, 1e30f, -1e30f, 1e-29f}) {
      w.codes.fill(static_cast<uint8_t>(byte)), w.scales.fill(255), w.mins.fill(255);
      w.row_scale.fill(1e-3f), w.row_min.fill(1e-3f);
      const Input x(c, 0);
      for (int64_t r = 0; r < c.m; ++r)
        for (int64_t i = 0; i < c.k; ++i) x.set(r, i, r % 2 ? -value : value);
      compare(c, multiply(c, w, x, nullptr, isa), product(x.dense(), c.m, w, nullptr, c.splits));
    }
}

// A row has the same bits alone and among any others.
void alone_and_together(const Case& c, int isa, Random& random) {
  announce(c, "alone and together");
  Weight w(c.n, c.k, c.bits, c.group);
  w.randomize(random);
  const Input x(c, 1);
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t i = 0; i < c.k; ++i) x.set(r, i, random.bell());
  const std::vector<float> together = multiply(c, w, x, nullptr, isa);
  compare(c, together, product(x.dense(), c.m, w, nullptr, c.splits));
  Case one = c;
  one.m = 1;
  for (int64_t r = 0; r < c.m; ++r) {
    const Input row(one, 0);
    for (int64_t i = 0; i < c.k; ++i) row.set(0, i, x.get(r, i));
    const std::vector<float> alone = multiply(one, w, row, nullptr, isa);
    if (memcmp(alone.data(), together.data() + r * c.n, sizeof(float) * c.n) != 0) fail("row %d", static_cast<int>(r));
  }
}

// One activation that is no number, or too large for any sum, spoils its own row and no other bit.
void spoiled_row(const Case& c, int isa, Random& random) {
  announce(c, "a spoiled row");
  Weight w(c.n, c.k, c.bits, c.group);
  w.randomize(random);
  Input x(c, 1);
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t i = 0; i < c.k; ++i) x.set(r, i, random.bell());
  const std::vector<float> clean = multiply(c, w, x, nullptr, isa);
  for (float bad : {NAN, -NAN, INFINITY, -INFINITY, FLT_MAX}) {
    const int64_t row = random.whole(0, c.m - 1), column = random.whole(0, c.k - 1);
    const float kept = x.get(row, column);
    x.set(row, column, bad);
    const std::vector<float> got = multiply(c, w, x, nullptr, isa);
    x.set(row, column, kept);
    for (int64_t i = 0; i < c.m * c.n; ++i) {
      if (i / c.n == row && bad != FLT_MAX && !isnan(got[i])) fail("%g gave %g", bad, got[i]);
      if (i / c.n != row && memcmp(&got[i], &clean[i], sizeof(float)) != 0) fail("%g reached another row", bad);
    }
  }
}

}  // namespace

void check_products(int isa) {
  Random random(1);
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128}) {
      for (int m = 0; m <= 40; m += m < 14 ? 1 : 13)
        for (bool bfloat16 : {false, true}) {
          const int64_t n = random.whole(1, 70), k = group * random.whole(1, 256 / group + 1);
          const int threads = static_cast<int>(random.whole(1, 3));
          random_values({m, n, k, bits, group, threads, bfloat16, m % 2 == 0, 1 + m / 2 % 2},
                        isa, random);
        }
      random_values({261, 33, group, bits, group, 3, group == 64, true, bits < 8 ? 1 : 2}, isa, random);
      extreme_values({3, 17, 256, bits, group, 2, group == 64, false, 1}, isa);
      for (int m = 1; m <= 13; ++m) {  // and weights that are gone through in several pieces
        const int64_t k = group * random.whole(512 / group + 1, 1280 / group);
        alone_and_together({m, 37, k, bits, group, 2, false, false, 1 + m / 2 % 2}, isa, random);
      }
      alone_and_together({150, 17, 512 + group, bits, group, 3, false, false, 1}, isa, random);
      for (int m : {1, 2, 7, 13}) spoiled_row({m, 37, 128, bits, group, 2, m == 2, false, 1 + m / 2 % 2}, isa, random);
    }
  random_values({1100, 18, 32, 4, 32, 300, true, true, 2}, isa, random);  // more rows than are quantized at once
  random_values({2, 4100, 64, 4, 32, 300, false, true, 1}, isa, random);   // more threads than the pool has
  random_values({3, 700, 512, 8, 128, 2, false, false, 1}, isa, random);
}

}  // namespace check
