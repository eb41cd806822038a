// Which instruction sets this library and its host have.
#include "qgemm.h"

#if defined(GLM4LITE_X86)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace {

constexpr uint32_t bit(int i) { return 1u << i; }

#if defined(GLM4LITE_X86)
enum { EAX, EBX, ECX, EDX };

void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t* r) {
  __cpuid_count(leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX]);
}

// What registers the operating system saves: without it the instructions fault though the processor has them.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
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
#elif defined(__aarch64__)
#if defined(__linux__)  // bits of the kernel's asm/hwcap.h, whose older versions lack the second
bool has_dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_matrix_products() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
bool has_dot_products() { return true; }  // from the first, the M1, on; macOS 11 knows no name for it
bool has_matrix_products() {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value != 0;
}
#elif defined(_WIN32)  // numbers of the PF_ARM_V82_..._AVAILABLE that not every header has; an older Windows says no
bool has_dot_products() { return IsProcessorFeaturePresent(43); }
bool has_matrix_products() { return IsProcessorFeaturePresent(66); }
#else
bool has_dot_products() { return false; }
bool has_matrix_products() { return false; }
#endif

uint32_t host_isas() {
  if (!has_dot_products()) return bit(GLM4_SCALAR);
  return bit(GLM4_SCALAR) | bit(GLM4_NEON) | (has_matrix_products() ? bit(GLM4_NEONI8MM) : 0);
}
#else
uint32_t host_isas() { return bit(GLM4_SCALAR); }
#endif

constexpr glm4_isa kNone = {nullptr, nullptr, 0, 0};

const glm4_isa kIsas[GLM4_ISAS] = {
    {glm4_tile_scalar, &glm4_rows_scalar, GLM4_SCALAR_WIDTH, 0},
#if defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avx2, &glm4_rows_avx2, GLM4_AVX2_WIDTH, GLM4_256_FEW},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_AVXVNNI) && defined(GLM4LITE_HAVE_AVX2)
    {glm4_tile_avxvnni, &glm4_rows_avx2, GLM4_AVXVNNI_WIDTH, GLM4_256_FEW},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_AVX512VNNI)
    {glm4_tile_avx512vnni, &glm4_rows_avx512, GLM4_AVX512VNNI_WIDTH, 0},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_NEON)
    {glm4_tile_neon, &glm4_rows_neon, GLM4_NEON_WIDTH, 0},
#else
    kNone,
#endif
#if defined(GLM4LITE_HAVE_NEONI8MM) && defined(GLM4LITE_HAVE_NEON)
    {glm4_tile_neoni8mm, &glm4_rows_neon, GLM4_NEONI8MM_WIDTH, 0},
#else
    kNone,
#endif
};

}  // namespace

const glm4_isa* glm4_isa_of(int32_t isa) { return &kIsas[isa]; }

GLM4_API int32_t glm4_abi_version(void) { return 7; }

GLM4_API int32_t glm4_isa_available(int32_t isa) {
  static const uint32_t host = host_isas();
  return isa >= 0 && isa < GLM4_ISAS && (host & bit(isa)) && kIsas[isa].tile != nullptr;
}
