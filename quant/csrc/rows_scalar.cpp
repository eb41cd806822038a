// The row functions for any machine.
#include "rows.h"

extern const glm4_rows glm4_rows_scalar = {quantize_row, remainder_row, norm_row, add_row, swiglu_row, dots, adapt, attend, fold};
