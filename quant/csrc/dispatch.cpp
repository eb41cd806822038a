// Which ISA runs, and what is the same for all: quantizing activations, splitting the work, writing the result.
#include <string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "qgemm.h"
#include "thread_pool.h"

#if defined(GLM4LITE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace {

constexpr int64_t kChunkRows = 1024;        // rows of x quantized at once: bounds the scratch
constexpr int64_t kCacheBytes = 256 << 10;  // activations that stay in the second-level cache over one item
constexpr int64_t kMaxItemTiles = 8;
constexpr int64_t kSerialWork = 1 << 18;  // multiplications not worth waking a thread for

// ---- the host ----

#if defined(GLM4LITE_X86)
void cpuid(uint32_t leaf, uint32_t* r) {
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), 0);
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(v[i]);
#else
  __cpuid_count(leaf, 0, r[0], r[1], r[2], r[3]);
#endif
}

// What registers the operating system saves: without it the instructions fault though the processor has them.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

int host_isa() {
  uint32_t r[4];
  cpuid(0, r);
  if (r[0] < 7) return GLM4_SCALAR;
  cpuid(1, r);
  const uint32_t need = (1u << 27) | (1u << 28) | (1u << 12);  // OSXSAVE, AVX, FMA
  if ((r[2] & need) != need || (saved_state() & 6) != 6) return GLM4_SCALAR;
  cpuid(7, r);
  if (!(r[1] & (1u << 5))) return GLM4_SCALAR;
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  const bool vnni = (r[2] & (1u << 11)) != 0;
  return (r[1] & avx512) == avx512 && vnni && (saved_state() & 0xE6) == 0xE6 ? GLM4_AVX512VNNI : GLM4_AVX2;
}
#else
int host_isa() { return GLM4_SCALAR; }
#endif

struct Isa {
  glm4_tile_kernel kernel;
  int width;
};

const Isa kIsas[GLM4_ISAS] = {
    {glm4_tile_scalar, GLM4_SCALAR_WIDTH},
#if defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avx2, GLM4_AVX2_WIDTH},
#else
    {nullptr, 0},
#endif
#if defined(GLM4LITE_HAVE_AVX512VNNI)
    {glm4_tile_avx512vnni, GLM4_AVX512VNNI_WIDTH},
#else
    {nullptr, 0},
#endif
};

// ---- numbers ----

float from_bfloat16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bfloat16(float f) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 32 values -> int8 codes, their sum and the scale; NaN as the scale where a value is not finite.
void quantize_block(const float* v, int8_t* codes, float* scale, int32_t* sum) {
  uint32_t top = 0;
  for (int i = 0; i < GLM4_COLS; ++i) {
    uint32_t bits;
    memcpy(&bits, v + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float largest;
  memcpy(&largest, &top, 4);
  *sum = 0;
  if (top >= 0x7f800000u || largest < 1e-30f) {
    memset(codes, 0, GLM4_COLS);
    *scale = top >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    return;
  }
  const float inverse = 127.0f / largest, round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  int32_t total = 0;
  for (int i = 0; i < GLM4_COLS; ++i) {
    const float shifted = v[i] * inverse + round;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    const int32_t code = bits - 0x4B400000;
    codes[i] = static_cast<int8_t>(code);
    total += code;
  }
  *sum = total;
  *scale = largest / 127.0f;
}

// ---- activations ----

// The quantized activations of up to kChunkRows rows, as panels of nearly equal width.
class Activations {
 public:
  Activations(const glm4_weight& w, const glm4_matrix& x, int64_t first, int64_t rows, int max_width)
      : w_(w), x_(x), first_(first), rows_(rows), panels_((rows + max_width - 1) / max_width) {
    const size_t blocks = static_cast<size_t>(rows * (w.k / GLM4_COLS));
    quads_.reset(new int32_t[blocks * 8]);
    scale_.reset(new float[blocks]);
    sum_.reset(new int32_t[blocks]);
    group_sum_.reset(new float[static_cast<size_t>(rows * (w.k / w.group))]);
  }

  int64_t panels() const { return panels_; }
  int64_t start(int64_t panel) const { return rows_ * panel / panels_; }  // first row of a panel, within the chunk

  glm4_panel panel(int64_t p) const {
    const int64_t at = start(p), blocks = w_.k / GLM4_COLS;
    return {quads_.get() + at * blocks * 8, scale_.get() + at * blocks, sum_.get() + at * blocks,
            group_sum_.get() + at * (w_.k / w_.group), static_cast<int32_t>(start(p + 1) - at)};
  }

  void quantize(int64_t p) {
    const int64_t at = start(p), blocks = w_.k / GLM4_COLS, per_group = w_.group / GLM4_COLS;
    const int64_t width = start(p + 1) - at;
    for (int64_t c = 0; c < width; ++c) {
      float* group_sum = group_sum_.get() + at * (w_.k / w_.group) + c;
      float in_group = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) {
        float v[GLM4_COLS];
        load(at + c, b, v);
        const int64_t to = at * blocks + b * width + c;
        quantize_block(v, reinterpret_cast<int8_t*>(quads_.get() + to * 8), &scale_[to], &sum_[to]);
        in_group += scale_[to] * static_cast<float>(sum_[to]);
        if ((b + 1) % per_group == 0) {
          group_sum[b / per_group * width] = in_group;
          in_group = 0.0f;
        }
      }
    }
  }

 private:
  void load(int64_t row, int64_t block, float* v) const {
    const int64_t from = (first_ + row) * x_.stride + block * GLM4_COLS;
    if (x_.dtype == GLM4_FLOAT32) {
      memcpy(v, static_cast<const float*>(x_.data) + from, sizeof(float) * GLM4_COLS);
      return;
    }
    const uint16_t* p = static_cast<const uint16_t*>(x_.data) + from;
    for (int i = 0; i < GLM4_COLS; ++i) v[i] = from_bfloat16(p[i]);
  }

  const glm4_weight& w_;
  const glm4_matrix& x_;
  int64_t first_, rows_, panels_;
  std::unique_ptr<int32_t[]> quads_, sum_;
  std::unique_ptr<float[]> scale_, group_sum_;
};

// ---- the product ----

struct Product {
  const glm4_weight& w;
  const float* bias;
  const glm4_matrix& y;
  const Isa& isa;
  const Activations& x;
  int64_t first;  // row of y that row 0 of the activations belongs to

  // Row scales, bias and the output type, for one tile and panel.
  void store(int64_t tile, int64_t row, int width, const float* dot, const float* min) const {
    const int64_t n0 = tile * GLM4_ROWS;
    const int rows = static_cast<int>(std::min<int64_t>(GLM4_ROWS, w.n - n0));
    for (int c = 0; c < width; ++c) {
      float out[GLM4_ROWS];
      for (int r = 0; r < rows; ++r) {
        out[r] = dot[GLM4_ROWS * c + r] * w.row_scale[n0 + r];
        if (w.row_min) out[r] -= min[GLM4_ROWS * c + r] * w.row_min[n0 + r];
        if (bias) out[r] += bias[n0 + r];
      }
      const int64_t at = (first + row + c) * y.stride + n0;
      if (y.dtype == GLM4_FLOAT32) {
        memcpy(static_cast<float*>(y.data) + at, out, sizeof(float) * rows);
      } else {
        for (int r = 0; r < rows; ++r) static_cast<uint16_t*>(y.data)[at + r] = to_bfloat16(out[r]);
      }
    }
  }

  // A few row tiles with all panels: as many panels as stay in cache are used by every tile before the next ones come.
  void tiles(int64_t begin, int64_t end) const {
    const int64_t in_cache = std::max<int64_t>(1, kCacheBytes / (w.k * isa.width));
    float dot[GLM4_MAX_WIDTH * GLM4_ROWS], min[GLM4_MAX_WIDTH * GLM4_ROWS];
    for (int64_t p0 = 0; p0 < x.panels(); p0 += in_cache)
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t p = p0; p < std::min(p0 + in_cache, x.panels()); ++p) {
          const glm4_panel panel = x.panel(p);
          isa.kernel(&w, tile, &panel, dot, min);
          store(tile, x.start(p), panel.width, dot, min);
        }
  }
};

void multiply(const glm4_weight& w, const glm4_matrix& x, const float* bias, const glm4_matrix& y, const Isa& isa,
              int threads) {
  const int64_t tiles = (w.n + GLM4_ROWS - 1) / GLM4_ROWS;
  for (int64_t first = 0; first < x.rows; first += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, x.rows - first);
    Activations act(w, x, first, rows, isa.width);
    auto prepare = [&](int64_t p, int) { act.quantize(p); };
    glm4::parallel_for(rows * w.k < kSerialWork ? 1 : threads, act.panels(), prepare);
    const Product product{w, bias, y, isa, act, first};
    const int64_t size = std::clamp<int64_t>(tiles / (threads * 8), 1, kMaxItemTiles);
    auto item = [&](int64_t i, int) { product.tiles(i * size, std::min(tiles, (i + 1) * size)); };
    glm4::parallel_for(rows * w.k * w.n < kSerialWork ? 1 : threads, (tiles + size - 1) / size, item);
  }
}

}  // namespace

GLM4_API int32_t glm4_abi_version(void) { return 1; }

GLM4_API int32_t glm4_isa_available(int32_t isa) {
  static const int host = host_isa();
  return isa >= 0 && isa <= host && kIsas[isa].kernel != nullptr;
}

GLM4_API int32_t glm4_matmul(const glm4_weight* w, const glm4_matrix* x, const float* bias, const glm4_matrix* y,
                             int32_t isa, int32_t threads) {
  try {
    multiply(*w, *x, bias, *y, kIsas[isa], threads);
    return GLM4_OK;
  } catch (const std::bad_alloc&) {
    return GLM4_NO_MEMORY;
  }
}
