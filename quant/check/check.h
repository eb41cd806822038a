// A program that holds every ISA's kernels to plain float64 arithmetic, without Python: for sanitizers and emulators.
// It stops at the first difference. Every buffer ends where its last element ends, so that AddressSanitizer sees a read
// beyond it.
#ifndef GLM4LITE_CHECK_H
#define GLM4LITE_CHECK_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "../csrc/qgemm.h"

namespace check {

// Prints the current ISA, the case that `describe` named last and this message; ends the program.
[[noreturn]] void fail(const char* format, ...);
void describe(const char* format, ...);

// `size` elements at the end of an allocation, `offset` bytes away from its start.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t size, int64_t offset = 0)
      : size_(size), offset_(offset),
        bytes_(static_cast<char*>(malloc(static_cast<size_t>(size * sizeof(T) + offset)))) {
    if (!bytes_) abort();
    memset(bytes_, 0x7f, static_cast<size_t>(size * sizeof(T) + offset));  // floats: 3.4e38
  }
  Exact(const Exact& o) : Exact(o.size_, o.offset_) { memcpy(bytes_, o.bytes_, size_ * sizeof(T) + offset_); }
  Exact& operator=(const Exact&) = delete;
  ~Exact() { free(bytes_); }

  T* data() const { return reinterpret_cast<T*>(bytes_ + offset_); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }
  bool same(const Exact& o) const { return memcmp(data(), o.data(), static_cast<size_t>(size_) * sizeof(T)) == 0; }
  void fill(T value) const {
    for (int64_t i = 0; i < size_; ++i) data()[i] = value;
  }

 private:
  int64_t size_, offset_;
  char* bytes_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t whole(int64_t low, int64_t high) {  // both ends included
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  float real(float low, float high) { return low + (high - low) * static_cast<float>(engine_() >> 11) * 0x1p-53f; }
  float bell() { return (real(-1, 1) + real(-1, 1)) + (real(-1, 1) + real(-1, 1)); }  // near enough
  void fill(const Exact<float>& to, float scale = 1.0f) {
    for (int64_t i = 0; i < to.size(); ++i) to[i] = bell() * scale;
  }

 private:
  std::mt19937_64 engine_;
};

// A weight with planes of its own; everything random unless it is changed afterwards.
struct Weight {
  Weight(int64_t n, int64_t k, int bits, int group, int64_t offset = 0);
  void randomize(Random& random);
  glm4_weight c() const;
  double step(int64_t n, int64_t k) const;  // w = step * code - low
  double low(int64_t n, int64_t k) const;
  int code(int64_t n, int64_t k) const;
  bool affine() const { return bits < 8; }
  int top() const { return affine() ? (1 << bits) - 1 : 127; }  // the largest code

  int64_t n, k;
  int bits, group;
  Exact<uint8_t> codes, scales, mins;
  Exact<float> row_scale, row_min;

 private:
  int64_t plane(int64_t n, int64_t k) const;
};

// y [m][n] = x * w^T + bias with each row of x rounded as the kernels do (int8 codes per 32 columns times their scale;
// with two parts what that leaves is rounded again), and by how much float32 sums and codes next to a half may be off.
struct Product {
  std::vector<double> y, tolerance;
};
Product product(const std::vector<double>& x, int64_t m, const Weight& w, const float* bias, int splits);

inline float from_bfloat16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

void check_products(int isa);
void check_layers(int isa);
void check_quantizing(int isa);
void check_threads(int isa);
void check_uneven_threads(int isa);

}  // namespace check

#endif
