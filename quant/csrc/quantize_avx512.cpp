// The calibrated tile compiled for AVX-512: one register holds a column of all 16 rows.
#include "quantize_tile.h"

void glm4_quantize_tile_avx512(const glm4_weight* w, int64_t tile, const float* columns, const glm4_inputs* inputs,
                               float* scratch) {
  quantize_tile(*w, tile, columns, *inputs, scratch);
}

void glm4_fit_tile_avx512(const glm4_grid* to, int64_t tile, int64_t rows, const float* columns,
                          const float* importance) {
  fit_tile(*to, tile, rows, columns, importance);
}
