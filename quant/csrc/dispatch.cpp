// Which instruction sets this library and its host have.
#include "qgemm.h"

#if defined(GLM4LITE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace {

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

const glm4_isa kIsas[GLM4_ISAS] = {
    {glm4_tile_scalar, &glm4_rows_scalar, GLM4_SCALAR_WIDTH},
#if defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avx2, &glm4_rows_avx2, GLM4_AVX2_WIDTH},
#else
    {nullptr, nullptr, 0},
#endif
#if defined(GLM4LITE_HAVE_AVX512VNNI)
    {glm4_tile_avx512vnni, &glm4_rows_avx512, GLM4_AVX512VNNI_WIDTH},
#else
    {nullptr, nullptr, 0},
#endif
};

}  // namespace

const glm4_isa* glm4_isa_of(int32_t isa) { return &kIsas[isa]; }

GLM4_API int32_t glm4_abi_version(void) { return 3; }

GLM4_API int32_t glm4_isa_available(int32_t isa) {
  static const int host = host_isa();
  return isa >= 0 && isa <= host && kIsas[isa].tile != nullptr;
}
