// Attention as one list of items for the threads, whatever sequences they belong to. Each range of tokens is computed
// by itself and ranges are folded in their order, all by one thread or after several: a row's bits are the same.
#include "attention.h"

#include <math.h>

#include <algorithm>

#include "thread_pool.h"

namespace {

using glm4::parallel_for;
using glm4::Part;

constexpr int64_t kMostKept = 4 << 20;    // floats of ranges that wait to be folded (16 MB): bounds the scratch
constexpr int64_t kSerialWork = 1 << 18;  // multiplications not worth waking a thread for
constexpr int64_t kFewTokens = 8;

// The queries of some tokens, as many as one item may have, with one key/value head.
struct Group {
  const Part* part;
  int64_t first, tokens, head;  // the first of its tokens within the part
  int64_t seen;                 // tokens that the last of them sees
  int64_t kept;                 // where its ranges' sums are kept until they are folded; -1: one item is all of it
};

struct Item {
  int64_t group, begin, end;  // of the tokens that are seen
};

int64_t ranges_of(const Group& group) { return (group.seen + GLM4_RANGE - 1) / GLM4_RANGE; }

// Memory that a calling thread keeps from one call to the next.
struct Buffers {
  std::vector<float> kept, scratch;
  std::vector<Group> groups;
  std::vector<Item> items;

  static Buffers& of_thread() {
    static thread_local Buffers buffers;
    return buffers;
  }
};

float* room(std::vector<float>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  return v.data();
}

class Attention {
 public:
  Attention(const glm4_layer& l, const float* q, float* out, const glm4_isa& isa, Buffers& buffers)
      : l_(l), isa_(isa), q_(q), out_(out), per_token_(l.heads / l.kv_heads), row_size_(int64_t{l.heads} * l.head_dim),
        buffers_(buffers), groups_(buffers.groups), items_(buffers.items) {}

  void run(const std::vector<Part>& parts, int threads) {
    int64_t tokens = 0, work = 0;  // of each key/value head: query tokens times tokens seen
    for (const Part& part : parts) tokens += part.rows, work += part.rows * (part.cache.length + part.rows);
    cut(parts, work * l_.kv_heads / (4 * threads));
    kept_ = room(buffers_.kept, floats_);
    float* const scratch = room(buffers_.scratch, threads * scratch_size());

    auto compute = [&](int64_t i, int slot) { attend(items_[i], scratch + slot * scratch_size()); };
    const bool little = work * row_size_ < kSerialWork;
    parallel_for(little ? 1 : threads, static_cast<int64_t>(items_.size()), compute);
    auto fold_kept = [&](int64_t g, int) {
      if (groups_[g].kept >= 0) fold(groups_[g]);
    };
    if (floats_) parallel_for(tokens < kFewTokens ? 1 : threads, static_cast<int64_t>(groups_.size()), fold_kept);
  }

 private:
  // A group of more than `most` work is an item for each range, as far as there is memory for their sums.
  void cut(const std::vector<Part>& parts, int64_t most) {
    groups_.clear(), items_.clear();
    const int64_t item_tokens = std::max<int64_t>(1, GLM4_ATTENTION_ROWS / per_token_);
    for (const Part& part : parts)
      for (int64_t first = 0; first < part.rows; first += item_tokens)
        for (int64_t head = 0; head < l_.kv_heads; ++head) {
          const int64_t count = std::min(item_tokens, part.rows - first);
          Group group{&part, first, count, head, part.cache.length + first + count, -1};
          const int64_t need = ranges_of(group) * sums_size(count * per_token_);
          const int64_t number = static_cast<int64_t>(groups_.size());
          if (group.seen > GLM4_RANGE && count * group.seen > most && floats_ + need <= kMostKept) {
            group.kept = floats_;
            floats_ += need;
            for (int64_t begin = 0; begin < group.seen; begin += GLM4_RANGE)
              items_.push_back({number, begin, std::min<int64_t>(begin + GLM4_RANGE, group.seen)});
          } else {
            items_.push_back({number, 0, group.seen});
          }
          groups_.push_back(group);
        }
  }

  int64_t sums_size(int64_t rows) const { return rows * (l_.head_dim + 2); }
  int64_t scratch_size() const { return GLM4_ATTENTION_SCRATCH + sums_size(GLM4_ATTENTION_ROWS); }

  glm4_sums sums(float* at, int64_t rows) const {
    return {at, at + rows * l_.head_dim, at + rows * (l_.head_dim + 1)};
  }

  glm4_sums kept(const Group& group, int64_t range) const {
    const int64_t rows = group.tokens * per_token_;
    return sums(kept_ + group.kept + range * sums_size(rows), rows);
  }

  void attend(const Item& item, float* scratch) const {
    const Group& group = groups_[item.group];
    const int64_t d = l_.head_dim, rows = group.tokens * per_token_;
    glm4_attention a{};
    a.q = q_ + (group.part->first + group.first) * row_size_ + group.head * per_token_ * d;
    a.cache = &group.part->cache, a.head = group.head;
    a.q_stride = row_size_, a.rows = rows, a.per_token = per_token_, a.head_dim = d;
    a.begin = item.begin, a.end = item.end, a.visible = group.seen - group.tokens + 1;
    a.scale = 1.0f / sqrtf(static_cast<float>(d));
    a.to = group.kept < 0 ? sums(scratch + GLM4_ATTENTION_SCRATCH, rows) : kept(group, item.begin / GLM4_RANGE);
    isa_.rows->attend(&a, scratch);
    if (group.kept < 0) finish(group, a.to);
  }

  void fold(const Group& group) const {
    const glm4_sums first = kept(group, 0);
    for (int64_t range = 1; range < ranges_of(group); ++range) {
      const glm4_sums next = kept(group, range);
      isa_.rows->fold(&next, group.tokens * per_token_, l_.head_dim, &first);
    }
    finish(group, first);
  }

  // The weighted means of what the rows have seen.
  void finish(const Group& group, const glm4_sums& sums) const {
    const int64_t d = l_.head_dim;
    for (int64_t r = 0; r < group.tokens * per_token_; ++r) {
      float* to = out_ + (group.part->first + group.first + r / per_token_) * row_size_ +
                  (group.head * per_token_ + r % per_token_) * d;
      for (int64_t i = 0; i < d; ++i) to[i] = sums.out[r * d + i] / sums.total[r];
    }
  }

  const glm4_layer& l_;
  const glm4_isa& isa_;
  const float* q_;
  float* out_;
  int64_t per_token_, row_size_;
  Buffers& buffers_;
  std::vector<Group>& groups_;
  std::vector<Item>& items_;
  int64_t floats_ = 0;
  float* kept_ = nullptr;
};

}  // namespace

void glm4::attention(const glm4_layer& layer, const std::vector<Part>& parts, const float* q, float* out,
                     const glm4_isa& isa, int threads) {
  Attention(layer, q, out, isa, Buffers::of_thread()).run(parts, threads);
}
