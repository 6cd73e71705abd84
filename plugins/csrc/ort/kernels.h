// The routing operators on a CPU, fp32: what the kernels take. Letters and semantics: bilevel/contract.py, bilevel/operators/reference.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace bilevel {

// Runs fn(data, i) for every i in [0, total), possibly at the same time.
struct Parallel {
  void (*run)(void* context, void (*fn)(void*, size_t), size_t total, void* data);
  void* context;

  template <typename Function>
  void each(size_t total, const Function& function) const {
    run(context, [](void* data, size_t i) { (*static_cast<const Function*>(data))(i); }, total,
        const_cast<void*>(static_cast<const void*>(&function)));
  }
};

// What becomes of the block of which only first tokens are visible.
enum class PartialBlock : int64_t { kNeverScored, kScored, kAlwaysKept };

// SelectBlocks (scores given), CoarseRoute (candidates null) and FineRoute.
struct RouteArguments {
  const float* scores;        // [B, Hs, L, U] or null: then the two below
  const float* query;         // [B, Hr, L, Dr]
  const float* unit_key;      // [B, Hk, U, Dr]
  const int32_t* candidates;  // [B, Hc, L, K1] or null
  const int32_t* past_len;    // [B]
  const int32_t* new_len;     // [B]
  int32_t* routes;            // [B, Hs, L, K]
  int64_t batch, route_heads, length, width, key_heads, units, candidate_heads, candidates_kept;
  int64_t selection_heads, block_size, topk, scored_topk, init_blocks, local_blocks;
  PartialBlock partial_block;
  bool causal;
};

// Rows of a packed cache: `width` numbers in 8 or 4 bits, in groups with scales of their own (bilevel/bundle/cache_rows.py).
struct CacheRows {
  int64_t width, bits, groups;

  int64_t code_bytes() const { return width * bits / 8; }
  int64_t bytes() const { return code_bytes() + 2 * groups; }
};

// RoutedAttention, and RoutedAttentionQuantized, whose caches are packed_k and packed_v.
struct AttentionArguments {
  const float* q;           // [B, Hq, L, D]
  const float* k;           // [B, Hkv, M, D] or null
  const float* v;           // [B, Hkv, M, Dv] or null
  const uint8_t* packed_k;  // [B, Hkv, M, C] or null
  const uint8_t* packed_v;  // [B, Hkv, M, C] or null
  CacheRows rows;           // of packed caches
  const int32_t* routes;    // [B, Hs, L, K]
  const int32_t* past_len;  // [B]
  const int32_t* new_len;   // [B]
  const float* sinks;       // [Hq] or null
  float* out;               // [B, Hq, L, Dv]
  int64_t batch, heads, length, width, value_width, kv_heads, capacity, selection_heads, kept, block_size;
  bool causal;
  float scale;
};

// RoutedAttention for training: values of a width of their own, and gradients where grad_out is given.
struct TrainingArguments {
  AttentionArguments call;   // v: [B, Hkv, M, E], out: [B, Hq, L, E]
  float* lse;                // [B, Hq, L], natural logarithm; -inf of a row that reads nothing
  const float* grad_out;     // [B, Hq, L, E], or null: forward
  float* grad_q;             // [B, Hq, L, D]
  float *grad_k, *grad_v;    // [pieces, B, Hkv, M, D or E], zeros: what each piece of the tokens adds
  int64_t value_width, pieces;
};

// WriteCacheQuantized: update [B, H, L, D] into the rows of cache [B, H, M, C] from start [B] on.
struct CacheWriteArguments {
  const float* update;
  const int32_t* start;
  uint8_t* cache;
  CacheRows rows;
  int64_t batch, heads, length, capacity;
};

// UnpackCache: `count` rows as numbers [count, D].
struct CacheReadArguments {
  const uint8_t* packed;
  float* out;
  CacheRows rows;
  int64_t count;
};

enum class ScoreFunc { kSigmoid, kSoftmax, kSqrtSoftplus };
enum class GroupScore { kMax, kTop2Sum, kExternal };

struct ExpertRouteArguments {
  const float* logits;        // [T, E]
  const float* group_logits;  // [T, Gp]
  const float* select_bias;   // [E]
  int32_t* ids;               // [T, k]
  float* weights;             // [T, k]
  int64_t tokens, experts, groups, top_k, topk_group;
  bool normalize, zero_fill;
  ScoreFunc score_func;
  GroupScore group_score;
  float scale, norm_floor;
};

// Rows in 4 or 8 bits: (code - zero) * scale. 8 bits: a byte is a code. 4 bits: byte i of a block holds code i in its lower half
// and code i + block/2 in its upper half. Rows are padded to whole blocks of 32, 64 or 128.
struct PackedRows {
  const uint8_t* codes;  // [E, rows, blocks * block * bits / 8]
  const float* scales;   // [E, rows, blocks]
  const uint8_t* zeros;  // [E, rows, blocks]
  int64_t blocks, block, bits;
};

// RoutedExperts, and RoutedExpertsQuantized, whose weights are packed_gate_up and packed_down.
struct ExpertsArguments {
  const float* x;        // [T, d]
  const int32_t* ids;    // [T, k]
  const float* weights;  // [T, k]
  const float* gate_up;  // [E, 2f, d] or null
  const float* down;     // [E, d, f] or null
  PackedRows packed_gate_up, packed_down;
  float* out;            // [T, d]
  int64_t tokens, kept, experts, width, hidden;
  float gate_scale = 1.0f, limit = INFINITY, up_shift = 0.0f;  // limit: infinite where there is none
};

// One implementation per instruction set; the library takes the best one that this CPU has.
struct Kernels {
  const char* name;
  void (*route)(const RouteArguments&, const Parallel&);
  void (*attention)(const AttentionArguments&, const Parallel&);
  void (*train_attention)(const TrainingArguments&, const Parallel&);
  void (*expert_route)(const ExpertRouteArguments&, const Parallel&);
  void (*experts)(const ExpertsArguments&, const Parallel&);
  void (*write_cache)(const CacheWriteArguments&, const Parallel&);
  void (*read_cache)(const CacheReadArguments&, const Parallel&);
};

#if defined(__x86_64__)
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

// The best kernels that this CPU has, or those that BILEVEL_CPU_ISA names (for tests; ignored where the CPU lacks them).
const Kernels& best_kernels();

}  // namespace bilevel
