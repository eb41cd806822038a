// Which instruction sets this library and its host have.
#include "qgemm.h"

#if defined(GLM4LITE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

constexpr uint32_t bit(int i) { return 1u << i; }

#if defined(GLM4LITE_X86)
enum { EAX, EBX, ECX, EDX };

void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t* r) {
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(v[i]);
#else
  __cpuid_count(leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX]);
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

// A bit for each ISA.
uint32_t host_isas() {
  uint32_t r[4], isas = bit(GLM4_SCALAR);
  cpuid(0, 0, r);
  if (r[EAX] < 7) return isas;
  cpuid(1, 0, r);
  const uint32_t need = bit(27) | bit(28) | bit(12);  // OSXSAVE, AVX, FMA
  if ((r[ECX] & need) != need || (saved_state() & 6) != 6) return isas;
  cpuid(7, 0, r);
  if (!(r[EBX] & bit(5))) return isas;
  isas |= bit(GLM4_AVX2);
  const uint32_t avx512 = bit(16) | bit(17) | bit(30) | bit(31);  // F, DQ, BW, VL
  const bool vnni = (r[ECX] & bit(11)) != 0;
  if ((r[EBX] & avx512) == avx512 && vnni && (saved_state() & 0xE6) == 0xE6) isas |= bit(GLM4_AVX512VNNI);
#if defined(GLM4LITE_EVEX_VNNI)
  if (isas & bit(GLM4_AVX512VNNI)) return isas | bit(GLM4_AVXVNNI);
#endif
  if (r[EAX] < 1) return isas;  // no subleaf 1
  cpuid(7, 1, r);
  return r[EAX] & bit(4) ? isas | bit(GLM4_AVXVNNI) : isas;
}
#elif defined(__aarch64__) && defined(__linux__)
uint32_t host_isas() {  // bits of the kernel's asm/hwcap.h, whose older versions lack the second
  const bool dot = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
  return bit(GLM4_SCALAR) | (dot ? bit(GLM4_NEON) : 0) | (dot && i8mm ? bit(GLM4_NEONI8MM) : 0);
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

uint32_t host_isas() {
  const bool dot = has("hw.optional.arm.FEAT_DotProd"), i8mm = has("hw.optional.arm.FEAT_I8MM");
  return bit(GLM4_SCALAR) | (dot ? bit(GLM4_NEON) : 0) | (dot && i8mm ? bit(GLM4_NEONI8MM) : 0);
}
#else
uint32_t host_isas() { return bit(GLM4_SCALAR); }
#endif

constexpr glm4_isa kNone = {nullptr, nullptr, 0};

const glm4_isa kIsas[GLM4_ISAS] = {
    {glm4_tile_scalar, &glm4_rows_scalar, GLM4_SCALAR_WIDTH},
#if defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avx2, &glm4_rows_avx2, GLM4_AVX2_WIDTH},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_AVXVNNI) && defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avxvnni, &glm4_rows_avx2, GLM4_AVXVNNI_WIDTH},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_AVX512VNNI)
    {glm4_tile_avx512vnni, &glm4_rows_avx512, GLM4_AVX512VNNI_WIDTH},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_NEON)
    {glm4_tile_neon, &glm4_rows_neon, GLM4_NEON_WIDTH},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_NEONI8MM) && defined(GLM4LITE_HAVE_NEON)
    {glm4_tile_neoni8mm, &glm4_rows_neon, GLM4_NEONI8MM_WIDTH},
#else
    kNone,
#endif
};

}  // namespace

const glm4_isa* glm4_isa_of(int32_t isa) { return &kIsas[isa]; }

GLM4_API int32_t glm4_abi_version(void) { return 4; }

GLM4_API int32_t glm4_isa_available(int32_t isa) {
  static const uint32_t host = host_isas();
  return isa >= 0 && isa < GLM4_ISAS && (host & bit(isa)) && kIsas[isa].tile != nullptr;
}
