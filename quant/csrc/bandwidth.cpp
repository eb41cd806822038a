// How fast this machine reads memory: a buffer summed on the kernels' own threads, the bound of one-token products.
#include <string.h>

#include <algorithm>
#include <atomic>

#include "qgemm.h"
#include "thread_pool.h"

// Narrow loads reach four fifths of what wide ones do.
#if defined(GLM4LITE_X86)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 8 << 20;  // read by one thread: long enough for the prefetcher
constexpr int64_t kStep = 512;

using Sum = uint64_t (*)(const unsigned char* data, int64_t steps);

uint64_t sum_portable(const unsigned char* data, int64_t steps) {
  constexpr int kLanes = kStep / 8;  // sums kept apart, so that no addition waits for the one before
  uint64_t lanes[kLanes] = {}, words[kLanes], total = 0;
  for (; steps > 0; --steps, data += kStep) {
    memcpy(words, data, sizeof words);
    for (int i = 0; i < kLanes; ++i) lanes[i] += words[i];
  }
  for (uint64_t lane : lanes) total += lane;
  return total;
}

#if defined(GLM4LITE_X86)
__attribute__((target("avx2"))) uint64_t sum_avx2(const unsigned char* data, int64_t steps) {
  __m256i lanes[8], total = _mm256_setzero_si256();
  for (__m256i& lane : lanes) lane = _mm256_setzero_si256();
  for (; steps > 0; --steps, data += kStep)
    for (int i = 0; i < 16; ++i)
      lanes[i % 8] = _mm256_add_epi64(lanes[i % 8], _mm256_loadu_si256((const __m256i*)(data + 32 * i)));
  for (const __m256i& lane : lanes) total = _mm256_add_epi64(total, lane);
  uint64_t words[4];
  memcpy(words, &total, sizeof words);
  return words[0] + words[1] + words[2] + words[3];
}

__attribute__((target("avx512f"))) uint64_t sum_avx512(const unsigned char* data, int64_t steps) {
  __m512i lanes[8], total = _mm512_setzero_si512();
  for (__m512i& lane : lanes) lane = _mm512_setzero_si512();
  for (; steps > 0; --steps, data += kStep)
    for (int i = 0; i < 8; ++i) lanes[i] = _mm512_add_epi64(lanes[i], _mm512_loadu_si512(data + 64 * i));
  for (const __m512i& lane : lanes) total = _mm512_add_epi64(total, lane);
  uint64_t words[8], sum = 0;
  memcpy(words, &total, sizeof words);
  for (uint64_t word : words) sum += word;
  return sum;
}
#endif

Sum best_sum() {
#if defined(GLM4LITE_X86)
  if (glm4_isa_available(GLM4_AVX512VNNI)) return sum_avx512;
  if (glm4_isa_available(GLM4_AVX2)) return sum_avx2;
#endif
  return sum_portable;
}

}  // namespace

GLM4_API uint64_t glm4_read(const void* data, int64_t bytes, int32_t threads) {
  static const Sum sum = best_sum();
  std::atomic<uint64_t> total{0};
  auto item = [&](int64_t i, int) {
    const int64_t begin = i * kBlock;
    total += sum(static_cast<const unsigned char*>(data) + begin, std::min(kBlock, bytes - begin) / kStep);
  };
  glm4::parallel_for(threads, (bytes + kBlock - 1) / kBlock, item);
  return total;
}
