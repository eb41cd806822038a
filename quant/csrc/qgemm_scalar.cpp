// The kernel in plain C++: any machine, and the shortest statement of what the others do.
#include <string.h>

#include "qgemm.h"

namespace {

// One tile -> int8 codes [16][32].
void unpack(const uint8_t* tile, int bits, int8_t* codes) {
  memset(codes, 0, GLM4_ROWS * GLM4_COLS);
  for (int digits = 8, at = 0; digits > 0; digits /= 2) {  // of each plane
    if (!(bits & digits)) continue;
    for (int quad = 0; quad < 8; ++quad) {
      const uint8_t* vector = tile + 64 * (quad * digits / 8);
      const int shift = quad * digits % 8, mask = (1 << digits) - 1;
      for (int r = 0; r < GLM4_ROWS; ++r)
        for (int i = 0; i < 4; ++i)
          codes[GLM4_COLS * r + 4 * quad + i] |= static_cast<int8_t>((vector[4 * r + i] >> shift & mask) << at);
    }
    tile += 64 * digits, at += digits;
  }
}

void multiply(const glm4_weight* w, int64_t tile, const glm4_panel* x, float* dot, float* min) {
  const int64_t blocks = w->k / GLM4_COLS, groups = w->k / w->group, per_group = w->group / GLM4_COLS;
  const int tile_bytes = 64 * w->bits, width = x->width;
  const uint8_t* codes = w->qweight + tile * blocks * tile_bytes;
  const uint8_t* scales = w->scales + tile * groups * GLM4_ROWS;
  memset(dot, 0, sizeof(float) * width * GLM4_ROWS);
  memset(min, 0, sizeof(float) * width * GLM4_ROWS);
  int8_t rows[GLM4_ROWS * GLM4_COLS];
  for (int64_t b = 0; b < blocks; ++b) {
    unpack(codes + b * tile_bytes, w->bits, rows);
    const uint8_t* s = scales + b / per_group * GLM4_ROWS;
    for (int c = 0; c < width; ++c) {
      const int8_t* a = reinterpret_cast<const int8_t*>(x->quads + (b * width + c) * 8);
      const float scale = x->scale[b * width + c];
      for (int r = 0; r < GLM4_ROWS; ++r) {
        int32_t sum = 0;
        for (int i = 0; i < GLM4_COLS; ++i) sum += rows[GLM4_COLS * r + i] * a[i];
        dot[GLM4_ROWS * c + r] += static_cast<float>(sum) * (static_cast<float>(s[r]) * scale);
      }
    }
  }
  if (!w->mins) return;
  const uint8_t* mins = w->mins + tile * groups * GLM4_ROWS;
  for (int64_t g = 0; g < groups; ++g)
    for (int c = 0; c < width; ++c)
      for (int r = 0; r < GLM4_ROWS; ++r)
        min[GLM4_ROWS * c + r] += static_cast<float>(mins[g * GLM4_ROWS + r]) * x->group_sum[g * width + c];
}

}  // namespace

void glm4_tile_scalar(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot, float* min) {
  for (; count > 0; dot += GLM4_ROWS * x->width, min += GLM4_ROWS * x->width, ++x, --count)
    multiply(w, tile, x, dot, min);
}
