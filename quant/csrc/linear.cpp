// Quantizing activations, splitting the products among threads, writing the results.
#include "linear.h"

#include <string.h>

#include <algorithm>
#include <vector>

#include "thread_pool.h"

namespace {

using glm4::Sink;
using glm4::Source;

constexpr int64_t kChunkRows = 512;         // rows of x quantized at once: bounds the scratch
constexpr int64_t kCacheBytes = 256 << 10;  // activations that stay in the second-level cache over one item
constexpr int64_t kMaxColumns = 144;        // that one tile is multiplied with at once, and their panels
constexpr int64_t kMaxPanels = 36;
constexpr int64_t kMaxItemTiles = 8;        // several tiles use a panel of activations while it is in cache
constexpr int64_t kMaxItemTilesOfOne = 2;   // one panel stays there anyway: small items end at the same time
constexpr int64_t kSerialWork = 1 << 18;  // multiplications not worth waking a thread for

float from_bfloat16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bfloat16(float f) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Memory that a calling thread keeps from one product to the next: a token allocates nothing.
struct Buffers {
  std::vector<int32_t> quads, sum;
  std::vector<float> scale, group_sum, rows, kept, low;
  std::vector<const float*> places;

  static Buffers& of_thread() {
    static thread_local Buffers buffers;
    return buffers;
  }
};

template <class T>
T* room(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  return v.data();
}

// The quantized activations of up to kChunkRows rows, as panels of nearly equal width. A row is one column of a panel, or
// two next to each other.
class Activations {
 public:
  // keep: whether the rows are needed as they are, too (`row`).
  Activations(const Source& source, int32_t group, int64_t first, int64_t rows, int splits, bool keep,
              const glm4_isa& isa, int threads)
      : source_(source), isa_(isa), group_(group), splits_(splits), first_(first), rows_(rows),
        panels_(panels_of(rows * splits, isa)) {
    Buffers& buffers = Buffers::of_thread();
    const int64_t blocks = rows * splits * (source.k / GLM4_COLS);
    quads_ = room(buffers.quads, blocks * 8);
    scale_ = room(buffers.scale, blocks);
    sum_ = room(buffers.sum, blocks);
    group_sum_ = room(buffers.group_sum, rows * splits * (source.k / group));
    scratch_ = room(buffers.rows, 2 * source.k * threads);
    if (!keep) return;
    places_ = room(buffers.places, rows);
    kept_ = source.in_place() ? nullptr : room(buffers.kept, rows * source.k);
  }

  static int64_t panels_of(int64_t columns, const glm4_isa& isa) {
    const int64_t width = columns <= 2 * isa.few ? isa.few : isa.width;
    return (columns + width - 1) / width;
  }
  int64_t panels() const { return panels_; }
  int splits() const { return splits_; }
  const float* const* rows_from(int64_t r) const { return places_ + r; }  // within the chunk, once it is quantized
  int64_t start(int64_t panel) const { return rows_ * panel / panels_; }  // first row of a panel, within the chunk

  glm4_panel panel(int64_t p) const {
    const int64_t at = start(p) * splits_, blocks = source_.k / GLM4_COLS;
    return {quads_ + at * blocks * 8, scale_ + at * blocks, sum_ + at * blocks,
            group_sum_ + at * (source_.k / group_), static_cast<int32_t>(start(p + 1) * splits_ - at)};
  }

  void quantize(int64_t p, int slot) const {
    const int64_t at = start(p) * splits_, blocks = source_.k / GLM4_COLS, width = start(p + 1) * splits_ - at;
    float* scratch = scratch_ + 2 * slot * source_.k;
    for (int64_t c = 0; c < width; c += splits_) {
      glm4_panel_column column{quads_ + (at * blocks + c) * 8, scale_ + at * blocks + c, sum_ + at * blocks + c,
                               group_sum_ + at * (source_.k / group_) + c, width};
      const int64_t r = (at + c) / splits_;
      const float* row = source_.row(first_ + r, kept_ ? kept_ + r * source_.k : scratch);
      if (places_) places_[r] = row;
      isa_.rows->quantize(row, source_.k, group_, &column);
      if (splits_ == 1) continue;
      isa_.rows->remainder(row, source_.k, &column, scratch + source_.k);
      column.quads += 8, ++column.scale, ++column.sum, ++column.group_sum;
      isa_.rows->quantize(scratch + source_.k, source_.k, group_, &column);
    }
  }

 private:
  const Source& source_;
  const glm4_isa& isa_;
  int32_t group_;
  int splits_;
  int64_t first_, rows_, panels_;
  int32_t *quads_, *sum_;
  float *scale_, *group_sum_, *scratch_, *kept_ = nullptr;
  const float** places_ = nullptr;
};

int64_t tiles_of(const Sink& sink) {
  const int64_t tiles = (sink.w->n + GLM4_ROWS - 1) / GLM4_ROWS;
  return sink.swiglu ? tiles / 2 : tiles;
}

// One number for each row of a tile, 0 past the weight's end and where there are none.
struct OfRows {
  OfRows(const float* from, int64_t tile, int64_t n) {
    const int64_t first = tile * GLM4_ROWS, rows = std::min<int64_t>(GLM4_ROWS, n - first);
    if (from) memcpy(value, from + first, sizeof(float) * static_cast<size_t>(rows));
  }
  float value[GLM4_ROWS] = {};
};

// What the adapters' first factors make of the rows of a chunk: a x, for each sink and row.
class LowRank {
 public:
  LowRank(const Sink* sinks, int count, int64_t first, int64_t rows) : sinks_(sinks), first_(first), rows_(rows) {
    for (int s = 0; s < count; ++s)
      for (int64_t r = 0; r < rows; ++r)
        if (const glm4_lora* lora = of(sinks[s], r)) most_ = std::max(most_, lora->rank);
    low_ = room(Buffers::of_thread().low, count * rows * most_);
    blocks_ = (most_ + kBlock - 1) / kBlock;
    items_ = count * blocks_;
  }
  int64_t items() const { return items_; }

  // A few rows of one sink's factors with all rows of the chunk, so that they stay in the cache.
  void item(int64_t i, const Activations& x, int64_t k, const glm4_isa& isa) const {
    const int64_t s = i / blocks_, begin = i % blocks_ * kBlock;
    each(sinks_[s], 0, rows_, [&](const glm4_lora* lora, int64_t r, int64_t rows) {
      if (begin >= lora->rank) return;
      const int64_t count = std::min(kBlock, lora->rank - begin);
      float* to = low_ + (s * rows_ + r) * most_ + begin;
      isa.rows->dots(lora->a + begin * k, count, k, x.rows_from(r), rows, to, most_);
    });
  }

  // Adds to a tile's outputs of rows first..first + count - 1.
  void add(const Sink& sink, int64_t tile, int64_t first, int64_t count, float* out, const glm4_isa& isa) const {
    each(sink, first, first + count, [&](const glm4_lora* lora, int64_t r, int64_t rows) {
      const float* low = low_ + ((&sink - sinks_) * rows_ + r) * most_;
      isa.rows->adapt(lora, sink.w->n, tile * GLM4_ROWS, low, most_, rows, out + (r - first) * GLM4_ROWS);
    });
  }

 private:
  static constexpr int64_t kBlock = 4;
  // Rows next to each other that have the same adapter: work(adapter, the first of them, how many).
  template <class Work>
  void each(const Sink& sink, int64_t begin, int64_t end, const Work& work) const {
    for (int64_t r = begin, next; r < end; r = next) {
      const glm4_lora* lora = of(sink, r);
      for (next = r + 1; next < end && of(sink, next) == lora;) ++next;
      if (lora) work(lora, r, next - r);
    }
  }
  const glm4_lora* of(const Sink& sink, int64_t r) const { return sink.lora ? sink.lora[first_ + r] : nullptr; }

  const Sink* sinks_;
  int64_t first_, rows_, most_ = 0, blocks_ = 0, items_ = 0;
  float* low_;
};

struct Product {
  const Sink* sinks;
  const glm4_isa& isa;
  const Activations& x;
  int64_t first;  // row of y that row 0 of the activations belongs to
  const LowRank& factors;

  // One tile times panels p0..p1 - 1 with row scales and bias: out [rows of x][16].
  void finish(const Sink& sink, int64_t tile, int64_t p0, int64_t p1, float* out) const {
    alignas(64) float min[kMaxColumns * GLM4_ROWS];  // the products write whole cache lines
    glm4_panel panels[kMaxPanels];
    for (int64_t p = p0; p < p1; ++p) panels[p - p0] = x.panel(p);
    isa.tile(sink.w, tile, panels, p1 - p0, out, min);
    const int64_t width = x.start(p1) - x.start(p0);
    if (x.splits() == 2) add_splits(width, out);
    if (x.splits() == 2 && sink.w->mins) add_splits(width, min);
    const OfRows scale(sink.w->row_scale, tile, sink.w->n), low(sink.w->row_min, tile, sink.w->n);
    const OfRows bias(sink.bias, tile, sink.w->n);
    for (int64_t c = 0; c < width; ++c) {
      float* to = out + GLM4_ROWS * c;
      for (int r = 0; r < GLM4_ROWS; ++r) to[r] *= scale.value[r];
      if (sink.w->row_min)
        for (int r = 0; r < GLM4_ROWS; ++r) to[r] -= min[GLM4_ROWS * c + r] * low.value[r];
      if (sink.bias)
        for (int r = 0; r < GLM4_ROWS; ++r) to[r] += bias.value[r];
    }
    if (sink.lora) factors.add(sink, tile, x.start(p0), width, out, isa);
  }

  static void add_splits(int64_t width, float* sums) {
    for (int64_t c = 0; c < width; ++c)
      for (int r = 0; r < GLM4_ROWS; ++r)
        sums[GLM4_ROWS * c + r] = sums[GLM4_ROWS * 2 * c + r] + sums[GLM4_ROWS * (2 * c + 1) + r];
  }

  void store(const Sink& sink, int64_t tile, int64_t row, int64_t width, const float* out) const {
    const int64_t n0 = tile * GLM4_ROWS;
    const int64_t whole = GLM4_ROWS, rows = sink.swiglu ? whole : std::min(whole, sink.w->n - n0);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t at = (first + row + c) * sink.y.stride + n0;
      const float* from = out + GLM4_ROWS * c;
      if (sink.y.dtype == GLM4_FLOAT32) {
        float* to = static_cast<float*>(sink.y.data) + at;
        if (rows == whole) {
          memcpy(to, from, sizeof(float) * GLM4_ROWS);  // in line
        } else {
          memcpy(to, from, sizeof(float) * static_cast<size_t>(rows));
        }
      } else {
        for (int64_t r = 0; r < rows; ++r) static_cast<uint16_t*>(sink.y.data)[at + r] = to_bfloat16(from[r]);
      }
    }
  }

  void tile(const Sink& sink, int64_t tile, int64_t p0, int64_t p1) const {
    alignas(64) float out[kMaxColumns * GLM4_ROWS];
    const int64_t width = x.start(p1) - x.start(p0);
    finish(sink, tile, p0, p1, out);
    if (sink.swiglu) {
      alignas(64) float up[kMaxColumns * GLM4_ROWS];
      finish(sink, tile + tiles_of(sink), p0, p1, up);
      isa.rows->swiglu(out, up, GLM4_ROWS * width, out);
    }
    store(sink, tile, x.start(p0), width, out);
  }

  // A few row tiles with all panels: as many panels as stay in cache are used by every tile before the next ones come.
  void tiles(int64_t begin, int64_t end) const {
    const Sink* sink = sinks;
    const int64_t most = std::min(kMaxPanels, kMaxColumns / isa.width);
    while (begin >= tiles_of(*sink)) begin -= tiles_of(*sink), end -= tiles_of(*sink), ++sink;
    while (begin < end) {
      const int64_t stop = std::min(end, tiles_of(*sink));
      const int64_t in_cache = std::clamp<int64_t>(kCacheBytes / (sink->w->k * isa.width), 1, most);
      const int64_t at_once = isa.few ? most : in_cache, turns = (x.panels() + at_once - 1) / at_once;
      for (int64_t i = 0; i < turns; ++i)
        for (int64_t t = begin; t < stop; ++t) tile(*sink, t, x.panels() * i / turns, x.panels() * (i + 1) / turns);
      end -= tiles_of(*sink), begin = 0, ++sink;
    }
  }
};

// Rows as a caller has them: float32 in place, bfloat16 widened.
class MatrixSource : public Source {
 public:
  MatrixSource(const glm4_matrix& x, int64_t k) : Source(x.rows, k), x_(x) {}
  const float* row(int64_t r, float* scratch) const override {
    if (x_.dtype == GLM4_FLOAT32) return static_cast<const float*>(x_.data) + r * x_.stride;
    const uint16_t* from = static_cast<const uint16_t*>(x_.data) + r * x_.stride;
    for (int64_t i = 0; i < k; ++i) scratch[i] = from_bfloat16(from[i]);
    return scratch;
  }

 private:
  const glm4_matrix& x_;
};

}  // namespace

void glm4::linear(const Source& source, const Sink* sinks, int count, int splits, const glm4_isa& isa, int threads) {
  int64_t tiles = 0, outputs = 0;
  int32_t group = sinks[0].w->group;
  bool adapted = false;
  for (int i = 0; i < count; ++i) {
    tiles += tiles_of(sinks[i]), outputs += sinks[i].w->n;
    if (sinks[i].w->mins) group = sinks[i].w->group;
    adapted = adapted || sinks[i].lora;
  }
  for (int64_t first = 0; first < source.rows; first += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, source.rows - first);
    const Activations act(source, group, first, rows, splits, adapted, isa, threads);
    auto prepare = [&](int64_t p, int slot) { act.quantize(p, slot); };
    parallel_for(rows * source.k < kSerialWork ? 1 : threads, act.panels(), prepare);
    const LowRank low(sinks, count, first, rows);
    auto factors = [&](int64_t i, int) { low.item(i, act, source.k, isa); };
    if (low.items()) parallel_for(rows * source.k * low.items() < kSerialWork / 8 ? 1 : threads, low.items(), factors);
    const Product product{sinks, isa, act, first, low};
    const int64_t most = act.panels() == 1 ? kMaxItemTilesOfOne : kMaxItemTiles;
    const int64_t size = std::clamp<int64_t>(tiles / (threads * 8), 1, most);
    auto item = [&](int64_t i, int) { product.tiles(i * size, std::min(tiles, (i + 1) * size)); };
    parallel_for(rows * source.k * outputs < kSerialWork ? 1 : threads, (tiles + size - 1) / size, item);
  }
}

GLM4_API int32_t glm4_matmul(const glm4_weight* w, const glm4_matrix* x, const float* bias, const glm4_matrix* y,
                             int32_t splits, int32_t isa, int32_t threads) {
  try {
    const Sink sink{w, bias, *y};
    glm4::linear(MatrixSource(*x, w->k), &sink, 1, splits, *glm4_isa_of(isa), threads);
    return GLM4_OK;
  } catch (...) {  // std::bad_alloc, maybe of another copy of the C++ library, whose type would not be ours
    return GLM4_NO_MEMORY;
  }
}
