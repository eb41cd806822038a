// The C interface of the kernels, and what the files of this folder share. Knows nothing of Python or torch.
//
// A weight [n, k] is tiled 16 rows x 32 columns; the tiles of one row block lie one after another along k:
//   8 bits: 512 bytes; vector j = 0..7 of 64 bytes, byte i of row r: w[r][4j+i], signed
//   fewer: planes of the code's binary digits, the lowest digits first; 64 bytes a digit. In byte i of row r lie
//     four digits, 256 bytes, vector j = 0..3: those of w[r][8j+i] and, in the high nibble, of w[r][8j+4+i]
//     two digits, 128 bytes, vector j = 0..1: those of w[r][16j+4f+i] at bit 2f, f = 0..3
//     one digit, 64 bytes: that of w[r][4f+i] at bit f, f = 0..7
//   2 bits are two; 3 are two and one; 4 are four; 5 are four and one; 6 are four and two. These codes are unsigned.
//   w = row_scale[n] * scales[n, g] * q - row_min[n] * mins[n, g], scales and mins stored [n / 16][k / group][16]
// Nothing but row_scale and row_min ends at n: the other planes are padded to whole tiles. No alignment is assumed.
#ifndef GLM4LITE_QGEMM_H
#define GLM4LITE_QGEMM_H

#include <stdint.h>

#if defined(_WIN32)
#define GLM4_API extern "C" __declspec(dllexport)
#else
#define GLM4_API extern "C" __attribute__((visibility("default")))
#endif

enum { GLM4_ROWS = 16, GLM4_COLS = 32 };
enum { GLM4_FLOAT32 = 0, GLM4_BFLOAT16 = 1, GLM4_INT8 = 2, GLM4_FLOAT16 = 3 };
enum { GLM4_SCALAR, GLM4_AVX2, GLM4_AVXVNNI, GLM4_AVX512VNNI, GLM4_NEON, GLM4_NEONI8MM, GLM4_ISAS };  // slowest first
enum { GLM4_OK = 0, GLM4_NOT_FINITE = 1, GLM4_NO_MEMORY = 2 };
// Tokens of keys that lie together, tokens of a cache's block, and tokens whose softmax is computed by itself: ranges are
// folded in their order, so that a row's bits depend on its position alone.
enum { GLM4_TOKENS = 16, GLM4_BLOCK = 64, GLM4_RANGE = 512 };

struct glm4_weight {
  uint8_t* qweight;
  uint8_t* scales;
  uint8_t* mins;  // null for 8 bits, and only there
  float* row_scale;
  float* row_min;  // null for 8 bits
  int64_t n, k;
  int32_t bits, group;
};

struct glm4_matrix {  // rows of float32 or bfloat16, stride in elements
  void* data;
  int64_t rows, stride;
  int32_t dtype;
};

// Codes 0 to 15 of a matrix [n, k] on another engine's grid, w = (code - zero) * scale with a whole zero, of groups of
// columns: codes [n][k], scale and zero [n][k / group]. `scale_type` is GLM4_BFLOAT16 or GLM4_FLOAT16, which hold every
// scale.
struct glm4_grid {
  uint8_t* codes;
  float* scale;
  float* zero;
  int64_t k;
  int32_t group, scale_type;
  int32_t middle;  // whether zero is always 8
};

// Keys and values of one sequence in one layer, in blocks of GLM4_BLOCK tokens that may lie anywhere: float32, or int8
// codes with one scale per head and token. The memory is a row of places for a head's token; `glm4_place` finds one.
// Values are [place][head_dim], scales [place], keys [place / 16][head_dim][16]. Strides are multiples of GLM4_TOKENS.
struct glm4_cache {
  void* keys;
  void* values;
  float* key_scale;  // null for float32
  float* value_scale;
  const int32_t* table;               // the number of each of its blocks; null: they lie in order
  int64_t block_stride, head_stride;  // places from a block to the next, and from a head to the next
  int64_t length;                     // tokens held
  int32_t type;                       // GLM4_FLOAT32 or GLM4_INT8
};

static inline int64_t glm4_place(const glm4_cache* c, int64_t head, int64_t token) {
  const int64_t block = token / GLM4_BLOCK;
  return (c->table ? c->table[block] : block) * c->block_stride + head * c->head_stride + token % GLM4_BLOCK;
}

// What an adapter adds to a linear [n, k]: y = gain * y + b (a x) + bias, in float32; b is padded to whole tiles of rows.
struct glm4_lora {
  const float* a;            // [rank][k]
  const float* b;            // [n / 16][rank][16]
  const float *gain, *bias;  // [n]; null: none
  int64_t rank;
};
enum { GLM4_LINEARS = 6 };  // of a layer: q, k, v, o, gate_up, down

// One sequence's part of a step: so many new tokens, its cache in each layer, and its adapter's part in each, which is
// GLM4_LINEARS or null. The array of those is null where there is no adapter.
struct glm4_span {
  int64_t rows;
  const glm4_cache* caches;
  const glm4_lora* const* lora;
};

// A decoder layer. Norm weights [hidden] are null where the architecture has no such norm, biases where it has none.
struct glm4_layer {
  glm4_weight q, k, v, o, gate_up, down;
  const float *q_bias, *k_bias, *v_bias;
  const float *input_norm, *post_self_attn_norm, *post_attention_norm, *post_mlp_norm;
  float eps;
  int32_t heads, kv_heads, head_dim, rotary_dim;
  int32_t qkv_splits;  // as `splits` of glm4_matmul
};

GLM4_API int32_t glm4_abi_version(void);
GLM4_API int32_t glm4_isa_available(int32_t isa);

// What calibration tells about the inputs of a weight [n, k].
struct glm4_inputs {
  const float* importance;  // [k]: how much an error in each column counts; the largest of each group is 1
  // How the columns behind make up for an error: those of its block of `block` columns (the last may be smaller) by
  // within [k][block], whose row is what an error of one in that column takes from each; those of later blocks by way of
  // `rank` sums, a multiple of 16, that each column's whole change adds `into` [k][rank] to, and that are taken from the
  // later ones as `onto` says, a matrix [rank][columns] for each block. Null, with blocks of a group and rank 0: not.
  const float *within, *onto, *into;
  int32_t block, rank;
};

// In every call below `isa` is one that is available and `threads` at least 1.
//
// y [m, n] = x [m, k] * w^T + bias (bias may be null). x is rounded to int8; with `splits` 2, what that left is rounded to
// int8 too and multiplied as well: 15 bits for twice the work.
GLM4_API int32_t glm4_matmul(const glm4_weight* w, const glm4_matrix* x, const float* bias, const glm4_matrix* y,
                             int32_t splits, int32_t isa, int32_t threads);
// x [rows, hidden], the float32 residual stream, goes through `count` layers in place: the rows of each span, one span
// behind the other. Their keys and values are written into the span's cache after the `length` that it holds. cos and
// sin: [rows, rotary_dim / 2]. A row's result depends on its own sequence alone, to the bit, however that is cut into calls.
GLM4_API int32_t glm4_decoder_layers(const glm4_layer* const* layers, int32_t count, const glm4_span* spans,
                                     int32_t span_count, float* x, const float* cos, const float* sin, int32_t isa,
                                     int32_t threads);
// Fills w from source [n, k]; GLM4_NOT_FINITE puts the first such row and column in place[0..1]. Below 8 bits codes are
// found for these inputs; where they are null, the first `shares` of GLM4_SHARES are tried. 8 bits need neither.
GLM4_API int32_t glm4_quantize(const glm4_matrix* source, const glm4_weight* w, const glm4_inputs* inputs,
                               int32_t shares, int32_t isa, int32_t threads, int64_t* place);
// Fills `to` from source [n, k], with the least error as glm4_quantize counts it, or, where `importance` is null, the
// least sum of squares. GLM4_NOT_FINITE as there.
GLM4_API int32_t glm4_fit(const glm4_matrix* source, const glm4_grid* to, const float* importance, int32_t isa,
                          int32_t threads, int64_t* place);
// Sum of the 64-bit words of `bytes` (whole multiples of 512; a rest is left out), as fast as memory gives them.
GLM4_API uint64_t glm4_read(const void* data, int64_t bytes, int32_t threads);

// Up to `width` columns of activations, quantized and interleaved so that one pointer walks all of them.
struct glm4_panel {
  const int32_t* quads;    // [k / 32][width][8]: int8 codes, four to a word
  const float* scale;      // [k / 32][width]: NaN where the activations are not finite
  const int32_t* sum;      // [k / 32][width]: sum of the block's codes
  const float* group_sum;  // [k / group][width]: sum of scale * sum over the group
  int32_t width;
};

// One column of a panel that is being written.
struct glm4_panel_column {
  int32_t* quads;
  float* scale;
  int32_t* sum;
  float* group_sum;
  int64_t width;
};

// One row tile times `count` panels, without row scales: dot[c][r] = sum of scales * q * x, and below 8 bits min[c][r] =
// sum of mins * x; c counts through the columns of all panels.
typedef void (*glm4_tile_kernel)(const glm4_weight* w, int64_t tile, const glm4_panel* x, int64_t count, float* dot,
                                 float* min);

// What rows have seen of the tokens: out [rows][head_dim] is the sum of exp(score - top) * value, total that of
// exp(score - top).
struct glm4_sums {
  float *out, *top, *total;
};

// Queries of one key/value head against its tokens begin..end-1 (begin a multiple of GLM4_RANGE). Row r is query head
// r % per_token of token r / per_token; row 0 sees `visible` tokens, each later token one more.
struct glm4_attention {
  const float* q;  // row r at r / per_token * q_stride + r % per_token * head_dim
  const glm4_cache* cache;
  int64_t head, q_stride, rows, per_token, head_dim, begin, end, visible;
  float scale;
  glm4_sums to;
};

// What surrounds the products; rows of float32, k a multiple of 32. See rows.h.
struct glm4_rows {
  void (*quantize)(const float* x, int64_t k, int32_t group, const glm4_panel_column* to);
  void (*remainder)(const float* x, int64_t k, const glm4_panel_column* of, float* out);  // x less what `of` holds of it
  void (*norm)(const float* x, const float* weight, float eps, int64_t k, float* out);
  void (*add)(float* x, const float* add, const float* weight, float eps, int64_t k);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // Of `count` rows of a with each of `rows` rows of x: out [rows][stride].
  void (*dots)(const float* a, int64_t count, int64_t k, const float* const* x, int64_t rows, float* out,
               int64_t stride);
  // A tile's outputs [rows][16], the first of which is row `first` of n: with what an adapter adds; t [rows][stride] is
  // a x.
  void (*adapt)(const glm4_lora* lora, int64_t n, int64_t first, const float* t, int64_t stride, int64_t rows,
                float* out);
  void (*attend)(const glm4_attention* a, float* scratch);
  void (*fold)(const glm4_sums* range, int64_t rows, int64_t head_dim, const glm4_sums* to);  // `to`: of those before it
};

// Most rows of a glm4_attention, and the floats of scratch it needs.
enum { GLM4_ATTENTION_ROWS = 128, GLM4_MAX_HEAD_DIM = 256 };
enum { GLM4_ATTENTION_SCRATCH = (2 * (GLM4_ATTENTION_ROWS + 16) + 2 * 64) * GLM4_MAX_HEAD_DIM + 16 * 64 };

struct glm4_isa {
  glm4_tile_kernel tile;
  const glm4_rows* rows;
  int32_t width;  // the widest panel its registers hold
  // Columns of a panel where there are at most twice as many in all; 0: `width` always. A kernel that has it goes through a
  // tile in pieces where there are more, by all panels, so that these may come from beyond the caches.
  int32_t few;
};
const glm4_isa* glm4_isa_of(int32_t isa);

// No code is shared between the files of different ISAs: the linker keeps one copy. Widths are even, for inputs in two
// parts.
enum { GLM4_SCALAR_WIDTH = 4, GLM4_AVX2_WIDTH = 6, GLM4_AVXVNNI_WIDTH = 6, GLM4_AVX512VNNI_WIDTH = 12 };
enum { GLM4_256_FEW = 4, GLM4_NEON_WIDTH = 6, GLM4_NEONI8MM_WIDTH = 6, GLM4_MAX_WIDTH = 12 };
void glm4_tile_scalar(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
void glm4_tile_avx2(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
void glm4_tile_avxvnni(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
void glm4_tile_avx512vnni(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
void glm4_tile_neon(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
void glm4_mins_neon(const glm4_weight*, int64_t, const glm4_panel*, float*);  // of glm4_tile_neon alone
void glm4_tile_neoni8mm(const glm4_weight*, int64_t, const glm4_panel*, int64_t, float*, float*);
extern const glm4_rows glm4_rows_scalar;
extern const glm4_rows glm4_rows_avx2;
extern const glm4_rows glm4_rows_avx512;
extern const glm4_rows glm4_rows_neon;

// Steps and minima of one row's groups for codes of at most `top`, with the least squared error over the first `shares`
// of GLM4_SHARES of each group's (minimum, maximum). Every version does the reference's float operations in its order.
typedef void (*glm4_search)(const float* row, int64_t k, int32_t group, int32_t shares, float top, float* step,
                            float* low);
void glm4_search_avx2(const float* row, int64_t k, int32_t group, int32_t shares, float top, float* step, float* low);
enum { GLM4_ALL_SHARES = 5 };
static const float GLM4_SHARES[GLM4_ALL_SHARES][2] = {
    {1.0f, 1.0f}, {0.9f, 1.0f}, {1.0f, 0.9f}, {0.9f, 0.9f}, {0.82f, 0.82f}};
static const float GLM4_TINY = 1e-30f;  // a step below this is zero

// One calibrated tile: columns [k][16], zeros past the weight's end; scratch holds 16 * (block + rank) floats.
typedef void (*glm4_tile_quantizer)(const glm4_weight* w, int64_t tile, const float* columns, const glm4_inputs* inputs,
                                    float* scratch);
void glm4_quantize_tile_scalar(const glm4_weight*, int64_t, const float*, const glm4_inputs*, float*);
void glm4_quantize_tile_avx2(const glm4_weight*, int64_t, const float*, const glm4_inputs*, float*);
void glm4_quantize_tile_avx512(const glm4_weight*, int64_t, const float*, const glm4_inputs*, float*);
// Where the calibrated search starts, and how often the best is rounded and fitted again.
static const float GLM4_STARTS[][2] = {{1.0f, 1.0f},  {0.93f, 1.0f},  {1.0f, 0.93f},  {0.93f, 0.93f}, {0.86f, 1.0f},
                                       {1.0f, 0.86f}, {0.86f, 0.86f}, {0.86f, 0.93f}, {0.93f, 0.86f}, {0.75f, 0.75f},
                                       {0.75f, 1.0f}, {1.0f, 0.75f},  {0.6f, 0.6f},   {1.07f, 1.07f}};
enum { GLM4_REFITS = 3 };

// One tile on a grid: columns [k][16], zeros past the matrix' end; `rows` of them are written.
typedef void (*glm4_tile_fitter)(const glm4_grid* to, int64_t tile, int64_t rows, const float* columns,
                                 const float* importance);
void glm4_fit_tile_scalar(const glm4_grid*, int64_t, int64_t, const float*, const float*);
void glm4_fit_tile_avx2(const glm4_grid*, int64_t, int64_t, const float*, const float*);
void glm4_fit_tile_avx512(const glm4_grid*, int64_t, int64_t, const float*, const float*);
// Where it starts: shares of a group's range, of its largest magnitude where zero is 8; then what the best is times.
static const float GLM4_RANGE_SHARES[] = {1.0f, 0.9f, 0.8f, 0.7f};
static const float GLM4_TOP_SHARES[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f, 1.08f};
static const float GLM4_POLISH[] = {1.0f, 0.92f, 0.96f, 1.04f, 1.08f, 1.0f};

#endif
