// The row functions with 8 lanes.
#include "rows.h"

extern const glm4_rows glm4_rows_avx2 = {quantize_row, remainder_row, norm_row, add_row, swiglu_row, dots, adapt, attend, fold};
