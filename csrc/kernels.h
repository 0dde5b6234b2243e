// What the kernels take and give: plain pointers, no torch. Definitions of the results: src/tokenselect/ops/reference.py.
//
// Every kernel file is compiled once per instruction set, into a namespace of its own, and must therefore hold nothing
// that the linker could share between them: no inline function of external linkage, no template of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenselect {

enum class DType : int32_t { f32, bf16, f16, i8 };
constexpr int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : type == DType::i8 ? 1 : 2; }

// Rows of a paged cache: the vector of token row r and KV head h begins at element r * row_stride + h * head_stride.
struct Rows {
  const void* data;
  int64_t count;  // rows
  int64_t row_stride;
  int64_t head_stride;
  DType dtype;
};

// Positions of a sequence to rows. Page j of sequence s holds the positions j * page_size ... of its padded tokens.
struct Pages {
  const int64_t* pages;  // [num_seqs, max_pages]
  int64_t max_pages;
  int64_t page_size;
  const int64_t* padding;  // [num_seqs]
};

// Rows of the positions from .. to - 1.
static inline void rows_of(const Pages& p, int64_t sequence, int64_t from, int64_t to, int64_t* rows) {
  const int64_t shift = p.padding[sequence];
  const int64_t* own = p.pages + sequence * p.max_pages;
  for (int64_t t = from + shift; t < to + shift;) {
    const int64_t page = p.max_pages == 1 ? 0 : t / p.page_size, first = own[page] * p.page_size - page * p.page_size;
    const int64_t border = p.max_pages == 1 ? to + shift : (page + 1) * p.page_size;
    for (const int64_t end = border < to + shift ? border : to + shift; t < end; t++) *rows++ = first + t;
  }
}

// Rotations that stand for distances: run r of block b is row run_start_loc[b] + r.
struct View {
  const float* cos;  // [runs, half]
  const float* sin;
  int64_t run_size;
  const int64_t* run_start_loc;  // [num_blocks + 1]
  const int64_t* alike;          // [num_blocks], how many of a block's first runs have the same rotation, or null
};

constexpr int kMaxViews = 2;

struct ScoreArgs {
  const float* queries;  // [num_blocks, num_q_heads, head_dim]
  int64_t num_blocks, num_q_heads, num_kv_heads, head_dim;
  Rows keys;
  Rows key_scales;  // [rows, num_kv_heads] floats of an int8 copy, or without data
  const float* key_center;  // [num_seqs, num_kv_heads, head_dim], what its keys are counted from, or null
  Pages pages;
  const int64_t* sequences;   // [num_blocks]
  const int64_t* candidates;  // [num_blocks, 2]
  const int64_t* context;     // [num_blocks, 2]
  View views[kMaxViews];
  int64_t num_views;
  int64_t half;  // rotated pairs per head
  bool interleaved;
  float scale;
  float horizon;  // half of a vote counts for a token so far before the last candidates; 0: all count alike
  float prior;    // added to a vote before it ages
  const int64_t* start_loc;  // [num_blocks + 1]
  float* votes;
};

struct TopkArgs {
  const float* votes;
  const int64_t* start_loc;  // [num_blocks + 1]
  int64_t num_blocks;
  int64_t k;
  int64_t* indices;  // [num_blocks, k]
};

struct AttentionArgs {
  const void* queries;  // [num_queries, num_q_heads, head_dim], contiguous
  void* out;            // like queries
  DType dtype;          // of queries and out
  int64_t num_blocks, num_q_heads, num_kv_heads, head_dim;
  Rows keys, values;
  const int64_t* query_start_loc;  // [num_blocks + 1]
  const int64_t* slots;
  const int64_t* slot_start_loc;  // [num_blocks + 1]
  const float* cos;               // [at least the most attended, half]
  const float* sin;
  int64_t half;
  bool interleaved;
  float scale;
  float softcap;             // 0: none
  const float* sink_logits;  // [num_q_heads], or null
};

struct PoolArgs {
  const void* queries;  // [num_queries, num_q_heads, head_dim], contiguous
  DType dtype;
  int64_t num_blocks, num_q_heads, head_dim;
  const int64_t* starts;  // [num_blocks], first query of each block
  const int64_t* counts;  // [num_blocks]
  const float* cos;       // [at least the largest count, half]
  const float* sin;
  int64_t half;
  bool interleaved;
  float* out;  // [num_blocks, num_q_heads, head_dim]
};

// A linear layer: weight [out_features, in_features], bias [out_features] or null, out [rows, out_features], contiguous.
struct LinearPart {
  const void* weight;
  const void* bias;
  void* out;
  int64_t out_features;
};

constexpr int kMostParts = 3;

// Layers of one input; all of one dtype.
struct LinearArgs {
  const void* input;  // [rows, in_features], contiguous
  DType dtype;
  int64_t rows, in_features;
  LinearPart parts[kMostParts];
  int64_t num_parts;
};

struct NormArgs {
  const void* input;   // [rows, size], contiguous
  const void* weight;  // [size]
  void* out;           // like input
  DType dtype;         // of all of them
  int64_t rows, size;
  float epsilon;
};

struct QuantizeArgs {
  Rows keys;  // [rows, num_heads, size]
  int64_t count, heads, size;
  const int64_t* tokens;  // [count], rows of `keys`, or null: all
  const float* centers;   // [centers, num_heads, size], or null
  const int64_t* owners;  // [count], which center; null: the first
  Rows out;               // int8, like `keys`
  Rows scales;            // float, like `keys` without its last dimension
  const int64_t* into;    // [count], rows of `out` and `scales`; null: one after the other
};

// New tokens' keys and values, each [count or more rows, num_heads, head_dim], into rows of their cache.
struct WriteArgs {
  Rows from[2], to[2];
  const int64_t* slots;  // [count], rows of the cache; negative: written nowhere
  int64_t count, num_heads, head_dim;
};

void store_rows(const WriteArgs&);

// Chosen positions as rows of the cache: those of block b go to slots[places[b]] and after it.
struct SlotsArgs {
  const int64_t *chosen, *sequences, *places;  // [num_blocks, k], [num_blocks], [num_blocks]
  int64_t num_blocks, k;
  Pages pages;
  int64_t* slots;
};

void store_slots(const SlotsArgs&);

// Ranges of positions as rows of the cache, one after the other.
struct RangesArgs {
  const int64_t* ranges;  // [num_ranges, 3]: sequence, or a negative number for zeros, from, to
  int64_t num_ranges;
  Pages pages;
  int64_t* slots;
};

void store_ranges(const RangesArgs&);

// One set per instruction set.
struct Kernels {
  const char* name;
  void (*score_tokens)(const ScoreArgs&);
  void (*topk_tokens)(const TopkArgs&);
  void (*sparse_attention)(const AttentionArgs&);
  void (*linear)(const LinearArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*quantize_rows)(const QuantizeArgs&);
  void (*pool_queries)(const PoolArgs&);
};

// The thread pool is PyTorch's. `body` gets ranges of 0 .. n - 1, each at least `grain` long but the last.
void parallel_ranges(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t num_threads();

// Memory of this thread, 64-byte aligned, kept from call to call; each `slot` is one buffer, at most kScratchSlots.
constexpr int kScratchSlots = 8;
void* scratch(int slot, size_t bytes);

}  // namespace tokenselect
