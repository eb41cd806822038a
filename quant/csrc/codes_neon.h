// A block's codes in NEON registers. Included by NEON files only; internal linkage: each has its own copy.
#ifndef GLM4LITE_CODES_NEON_H
#define GLM4LITE_CODES_NEON_H

#include <arm_neon.h>

#include "qgemm.h"

namespace {

// `Count` digits at bit `From` of each byte moved to bit 0.
template <int From, int Count>
inline uint8x16_t digits(uint8x16_t v) {
  if constexpr (From > 0) v = vshrq_n_u8(v, From);
  return From + Count == 8 ? v : vandq_u8(v, vdupq_n_u8((1 << Count) - 1));
}

// Codes of quad J of four rows, whose bytes begin at `rows`.
template <int Bits, int J>
inline int8x16_t codes_of(const uint8_t* rows) {
  if constexpr (Bits == 8) {
    return vreinterpretq_s8_u8(vld1q_u8(rows + 64 * J));
  } else {
    constexpr bool four = (Bits & 4) != 0, two = (Bits & 2) != 0, one = (Bits & 1) != 0;
    uint8x16_t w = vdupq_n_u8(0);
    if constexpr (four) w = digits<J % 2 * 4, 4>(vld1q_u8(rows + 64 * (J / 2)));
    if constexpr (two) {
      const uint8x16_t v = digits<J % 4 * 2, 2>(vld1q_u8(rows + (four ? 256 : 0) + 64 * (J / 4)));
      w = four ? vsliq_n_u8(w, v, 4) : v;
    }
    if constexpr (one) w = vsliq_n_u8(w, digits<J, 1>(vld1q_u8(rows + 64 * (Bits - 1))), Bits - 1);
    return vreinterpretq_s8_u8(w);
  }
}

}  // namespace

#endif
