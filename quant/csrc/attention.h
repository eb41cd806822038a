// Causal attention of the rows of several sequences, each over its own cache.
#ifndef GLM4LITE_ATTENTION_H
#define GLM4LITE_ATTENTION_H

#include <vector>

#include "qgemm.h"

namespace glm4 {

// Rows of one sequence, one behind the other: rows first..first+rows-1 of all. They follow the cache's tokens, and their
// keys and values are there already when attention begins.
struct Part {
  glm4_cache cache;
  int64_t first, rows;
  const glm4_lora* lora;  // GLM4_LINEARS of them, or null
};

// q and out: [rows of all parts][heads * head_dim]. Throws std::bad_alloc.
void attention(const glm4_layer& layer, const std::vector<Part>& parts, const float* q, float* out, const glm4_isa& isa,
               int threads);

}  // namespace glm4

#endif
