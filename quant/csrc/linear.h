// One input, several quantized weights: y_i = x * w_i^T + bias_i. The input is normed (where it is) and quantized once.
#ifndef GLM4LITE_LINEAR_H
#define GLM4LITE_LINEAR_H

#include "qgemm.h"

namespace glm4 {

// Rows of float32 that are to be multiplied; made one by one, by any thread.
class Source {
 public:
  Source(int64_t rows, int64_t k) : rows(rows), k(k) {}
  virtual ~Source() = default;
  // Row r: a place of its own, or `scratch` (k floats) filled with it. Called once for each row.
  virtual const float* row(int64_t r, float* scratch) const = 0;
  // Whether every row has a place of its own.
  virtual bool in_place() const { return false; }
  const int64_t rows, k;
};

struct Sink {
  const glm4_weight* w;
  const float* bias;  // null: none
  glm4_matrix y;
  // The rows of w are a gate's and then as many of an up projection: y [m, n / 2] = silu(gate) * up.
  bool swiglu = false;
  // The adapter of each row of the source, null for a row that has none; null: none has.
  const glm4_lora* const* lora = nullptr;
};

// All weights have the source's k; those of fewer than 8 bits share one group size. `splits` is 1, or 2: what rounding
// the input to int8 left is a second input of int8, and their products are added. Throws std::bad_alloc.
void linear(const Source& source, const Sink* sinks, int count, int splits, const glm4_isa& isa, int threads);

}  // namespace glm4

#endif
