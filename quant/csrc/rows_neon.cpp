// The row functions with 4 lanes and fused multiply-adds.
#include "rows.h"

extern const glm4_rows glm4_rows_neon = {quantize_row, remainder_row, norm_row, add_row, swiglu_row, dots, adapt, attend, fold};
