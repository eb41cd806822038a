// glm4_quantize and glm4_fit: the same bytes from every ISA, codes next to their weights, and refusals that name the place.
#include <float.h>
#include <math.h>

#include <algorithm>

#include "check.h"

namespace check {

namespace {

// How the scales are found: by the first `shares` cuts of the range, by the importance of each column, or by that and
// with the columns behind one making up for its error.
struct Method {
  const char* name;
  int shares;
  bool by_importance, feedback;
};

struct Shape {
  int64_t n, k;
  int bits, group;
};

struct Source {
  const glm4_matrix matrix;
  const glm4_inputs* inputs;
  int shares;
  int32_t quantize(const Weight& to, int isa, int threads, int64_t* place) const {
    const glm4_weight w = to.c();
    return glm4_quantize(&matrix, &w, inputs, shares, isa, threads, place);
  }
};

enum { kBlock = 128, kRank = 16 };

// Exactly as large as the interface says, so that a sanitizer sees what is read beyond.
struct Inputs {
  Exact<float> importance, within, onto, into;
  glm4_inputs c;
  Inputs(const Shape& s, bool feedback, Random& random)
      : importance(s.k), within(feedback ? s.k * kBlock : 0), onto(feedback ? s.k * kRank : 0), into(onto.size()) {
    for (int64_t i = 0; i < s.k; ++i) importance[i] = i % s.group ? random.real(0.0f, 1.0f) : 1.0f;
    for (int64_t i = 0; i < within.size(); ++i) within[i] = 0.1f * random.bell();
    for (int64_t i = 0; i < onto.size(); ++i) onto[i] = 0.02f * random.bell(), into[i] = random.bell();
    c = {importance.data(), nullptr, nullptr, nullptr, s.group, 0};
    if (feedback) c = {importance.data(), within.data(), onto.data(), into.data(), kBlock, kRank};
  }
};

bool equal(const Exact<float>& a, const Exact<float>& b) {  // 0 and -0 are
  for (int64_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

bool same(const Weight& a, const Weight& b) {
  return a.codes.same(b.codes) && a.scales.same(b.scales) && a.mins.same(b.mins) && equal(a.row_scale, b.row_scale) &&
         equal(a.row_min, b.row_min);
}

// No weight may be off by more than half a step and what is cut off its group's range (up to a third of it); a byte of
// scale and minimum adds a 255th of the row's largest.
void reconstructs(const Weight& w, const Exact<float>& source) {
  for (int64_t n = 0; n < w.n; ++n)
    for (int64_t first = 0; first < w.k; first += w.group) {
      double least = 0.0, most = 0.0, error = 0.0;
      for (int64_t k = first; k < first + w.group; ++k) {
        const double v = source[n * w.k + k];
        least = std::min(least, v), most = std::max(most, v);
        error = std::max(error, fabs(w.step(n, k) * w.code(n, k) - w.low(n, k) - v));
      }
      const double range = w.affine() ? most - least : std::max(most, -least);
      const double step = range / w.top();
      const double bytes = w.affine() ? w.row_scale[n] * (w.top() + 1) / 2 + w.row_min[n] * 0.5 : w.row_scale[n] * 0.5;
      const double allowed = 0.5 * step + (w.affine() ? 0.36 * range : 0.0) + bytes + 1e-6 * range + 1e-28;
      if (!(error <= allowed))
        fail("row %d, group %d is off by %g, allowed %g", static_cast<int>(n), static_cast<int>(first / w.group), error,
             allowed);
    }
}

void padding_is_zero(const Weight& w) {
  const int64_t last = (w.n - 1) / GLM4_ROWS;
  for (int64_t row = w.n; row < (last + 1) * GLM4_ROWS; ++row)
    for (int64_t k = 0; k < w.k; ++k)
      if (w.code(row, k) != 0 || w.scales[(last * (w.k / w.group) + k / w.group) * GLM4_ROWS + row % GLM4_ROWS] != 0)
        fail("row %d, which pads the last tile, is not zero", static_cast<int>(row));
}

void one_shape(const Shape& s, const Method& how, int isa, Random& random) {
  describe("quantizing %dx%d, int%d groups of %d, %s", static_cast<int>(s.n), static_cast<int>(s.k), s.bits, s.group,
           how.name);
  Exact<float> values(s.n * s.k);
  const Inputs inputs(s, how.feedback, random);
  for (int64_t r = 0; r < s.n; ++r) {
    const float size = r % 5 == 1 ? 0.0f : r % 5 == 2 ? 1e-40f : r % 5 == 3 ? 1e17f : 0.02f;
    for (int64_t i = 0; i < s.k; ++i) values[r * s.k + i] = random.bell() * size * (i / 32 % 2 ? 1.0f : 0.1f);
  }
  const glm4_matrix matrix{values.data(), s.n, s.k, GLM4_FLOAT32};
  const Source source{matrix, how.by_importance ? &inputs.c : nullptr, how.shares};
  Weight plain(s.n, s.k, s.bits, s.group), own(s.n, s.k, s.bits, s.group, 5);
  int64_t place[2] = {-1, -1};
  if (source.quantize(plain, GLM4_SCALAR, 1, place) != GLM4_OK) fail("refused");
  if (source.quantize(own, isa, static_cast<int>(random.whole(1, 4)), place) != GLM4_OK) fail("refused");
  if (!same(plain, own)) fail("another weight than scalar's");
  if (!how.feedback) reconstructs(own, values);
  padding_is_zero(own);
  const int64_t row = random.whole(0, s.n - 1), column = random.whole(0, s.k - 1);
  for (float bad : {NAN, INFINITY, -INFINITY, FLT_MAX}) {
    values[row * s.k + column] = bad;
    if (source.quantize(own, isa, 2, place) != GLM4_NOT_FINITE) fail("%g was taken", static_cast<double>(bad));
    if (place[0] != row || place[1] != column) fail("%g was named at another place", static_cast<double>(bad));
  }
}

struct Grid {
  Grid(int64_t n, int64_t k, int group, int type, int middle)
      : codes(n * k), scale(n * (k / group)), zero(n * (k / group)),
        c{codes.data(), scale.data(), zero.data(), k, group, type, middle} {}
  bool same(const Grid& o) const { return codes.same(o.codes) && equal(scale, o.scale) && equal(zero, o.zero); }
  Exact<uint8_t> codes;
  Exact<float> scale, zero;
  glm4_grid c;
};

void one_grid(int64_t n, int64_t k, int group, int type, int middle, bool by_importance, int isa, Random& random) {
  describe("fitting %dx%d, groups of %d, scales of type %d, %s", static_cast<int>(n), static_cast<int>(k), group, type,
           middle ? "zero is 8" : "any zero");
  Exact<float> values(n * k), importance(k);
  for (int64_t r = 0; r < n; ++r) {
    const float size = r % 5 == 1 ? 0.0f : r % 5 == 2 ? 1e-40f : r % 5 == 3 && type == GLM4_BFLOAT16 ? 1e17f : 0.02f;
    for (int64_t i = 0; i < k; ++i) values[r * k + i] = random.bell() * size;
  }
  for (int64_t i = 0; i < k; ++i) importance[i] = i % group ? random.real(0.0f, 1.0f) : 1.0f;
  const glm4_matrix matrix{values.data(), n, k, GLM4_FLOAT32};
  const float* counts = by_importance ? importance.data() : nullptr;
  Grid plain(n, k, group, type, middle), own(n, k, group, type, middle);
  int64_t place[2] = {-1, -1};
  if (glm4_fit(&matrix, &plain.c, counts, GLM4_SCALAR, 1, place) != GLM4_OK) fail("refused");
  if (glm4_fit(&matrix, &own.c, counts, isa, static_cast<int>(random.whole(1, 4)), place) != GLM4_OK) fail("refused");
  if (!plain.same(own)) fail("other codes than scalar's");
  for (int64_t r = 0; r < n; ++r)
    for (int64_t first = 0; first < k; first += group) {
      const int64_t at = r * (k / group) + first / group;
      double least = 0.0, most = 0.0, error = 0.0;
      for (int64_t i = first; i < first + group; ++i) {
        const double v = values[r * k + i];
        least = std::min(least, v), most = std::max(most, v);
        error = std::max(error, fabs((own.codes[r * k + i] - own.zero[at]) * static_cast<double>(own.scale[at]) - v));
      }
      const double range = middle ? 2 * std::max(most, -least) : most - least;
      if (!(error <= 0.5 * range + 1e-7)) fail("row %d is off by %g of %g", static_cast<int>(r), error, range);
      if (own.zero[at] < 0 || own.zero[at] > 15) fail("row %d has no zero", static_cast<int>(r));
    }
  const int64_t row = random.whole(0, n - 1), column = random.whole(0, k - 1);
  values[row * k + column] = NAN;
  if (glm4_fit(&matrix, &own.c, counts, isa, 2, place) != GLM4_NOT_FINITE) fail("NaN was taken");
  if (place[0] != row || place[1] != column) fail("NaN was named at another place");
}

}  // namespace

void check_quantizing(int isa) {
  Random random(2);
  for (int type : {GLM4_BFLOAT16, GLM4_FLOAT16})
    for (int middle : {0, 1})
      for (int group : {32, 64, 128}) {
        one_grid(1, group, group, type, middle, false, isa, random);
        one_grid(37, 3 * group, group, type, middle, true, isa, random);
      }
  const Method methods[] = {{"minimum and maximum", 1, false, false},
                            {"search", 5, false, false},
                            {"calibrated", 5, true, false},
                            {"calibrated with feedback", 5, true, true}};
  for (const Method& how : methods)
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (int group : {32, 64, 128}) {
        if (bits == 8 && how.shares == 1) continue;  // all the same there
        one_shape({1, group, bits, group}, how, isa, random);
        one_shape({37, 3 * group, bits, group}, how, isa, random);
        one_shape({150, 512, bits, group}, how, isa, random);
      }
}

}  // namespace check
