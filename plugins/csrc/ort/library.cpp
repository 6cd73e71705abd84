// The operators as an ONNX Runtime custom-op library: domain "bilevel", CPU, fp32.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "abi.h"
#include "context.h"

namespace {

using ort::Context;
using ort::require;

// past_len and new_len [B]: how many tokens each row's cache holds, and how many of the L tokens of this call are its own.
void require_lengths(const ort::Context& context, size_t first, int64_t batch, int64_t length, const int32_t*& past_len,
                     const int32_t*& new_len) {
  std::vector<int64_t> past, added;
  past_len = context.input<int32_t>(first, past);
  new_len = context.input<int32_t>(first + 1, added);
  require(past == std::vector<int64_t>{batch} && added == past, "past_len and new_len must be [B]; export the model anew");
  for (int64_t b = 0; b < batch; ++b)
    require(past_len[b] >= 0 && new_len[b] >= 0 && new_len[b] <= length,
            "past_len must be at least 0 and new_len lie between 0 and L; correct the lengths of the call");
}

struct Kernel {
  Kernel(const ort::Api& api, const ort::KernelInfo* info) : api(api), info(info) {}
  virtual ~Kernel() = default;
  virtual void compute(Context& context) const = 0;

  int64_t integer(const char* name, int64_t least = 0) const {
    int64_t value = 0;
    ort::check(api, api.call(ort::kKernelInfoGetAttributeInt64, info, name, &value));
    if (value < least || value > INT32_MAX)
      throw ort::Failure(std::string(name) + " is out of range; export the model anew");
    return value;
  }
  float number(const char* name) const {
    float value = 0;
    ort::check(api, api.call(ort::kKernelInfoGetAttributeFloat, info, name, &value));
    return value;
  }
  // Attributes that came later than their operator: an older graph, which has none, means `standard`.
  int64_t integer_or(const char* name, int64_t standard) const {
    if (ort::Status* absent = api.call(ort::kKernelInfoGetAttributeInt64, info, name, &standard))
      api.call<void>(ort::kReleaseStatus, absent);
    return standard;
  }
  float number_or(const char* name, float standard) const {
    if (ort::Status* absent = api.call(ort::kKernelInfoGetAttributeFloat, info, name, &standard))
      api.call<void>(ort::kReleaseStatus, absent);
    return standard;
  }
  std::string text(const char* name) const {
    size_t size = 0;  // with the closing zero
    ort::Status* too_small = api.call(ort::kKernelInfoGetAttributeString, info, name, static_cast<char*>(nullptr), &size);
    if (too_small) api.call<void>(ort::kReleaseStatus, too_small);
    std::string value(size, 0);
    ort::check(api, api.call(ort::kKernelInfoGetAttributeString, info, name, &value[0], &size));
    value.resize(std::strlen(value.c_str()));
    return value;
  }

  const ort::Api& api;
  const ort::KernelInfo* info;
  const bilevel::Kernels& kernels = bilevel::best_kernels();
};

struct Route : Kernel {
  Route(const ort::Api& api, const ort::KernelInfo* info, bool is_fine) : Kernel(api, info), is_fine(is_fine) {
    a.block_size = integer("block_size", 1);
    a.topk = a.scored_topk = integer("topk", 1);
    a.selection_heads = integer("num_selection_heads", 1);
    a.init_blocks = integer("init_blocks");
    a.local_blocks = integer("local_blocks");
    a.causal = integer("causal") != 0;
  }

  void compute(Context& context) const override {
    bilevel::RouteArguments call = a;
    std::vector<int64_t> query, keys, candidates;
    size_t next = 0;
    call.query = context.input<float>(next++, query);
    call.unit_key = context.input<float>(next++, keys);
    call.candidates = is_fine ? context.input<int32_t>(next++, candidates) : nullptr;
    require(query.size() == 4 && keys.size() == 4 && query[0] == keys[0] && query[3] == keys[3] && keys[1] > 0,
            "a route's query [B, Hr, L, Dr] and unit_key [B, Hk, U, Dr] do not fit together; export the model anew");
    call.batch = query[0], call.route_heads = query[1], call.length = query[2], call.width = query[3];
    call.key_heads = keys[1], call.units = keys[2];
    if (is_fine) {
      require(candidates.size() == 4 && candidates[0] == call.batch && candidates[1] > 0 && candidates[2] == call.length,
              "FineRoute's candidates [B, Hc, L, K1] do not fit its query; export the model anew");
      call.candidate_heads = candidates[1], call.candidates_kept = candidates[3];
      static const int32_t none = -1;
      if (!call.candidates) call.candidates = &none;  // an empty tensor; null would mean CoarseRoute
    }
    require_lengths(context, next, call.batch, call.length, call.past_len, call.new_len);
    call.routes = context.output<int32_t>(0, {call.batch, call.selection_heads, call.length, call.topk});
    kernels.route(call, context.parallel());
  }

  bilevel::RouteArguments a{};
  bool is_fine;
};

struct Select : Kernel {
  Select(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info) {
    a.block_size = integer("block_size", 1);
    a.topk = integer("topk", 1);
    a.scored_topk = integer("scored_topk");
    a.init_blocks = integer("init_blocks");
    a.local_blocks = integer("local_blocks");
    a.partial_block = static_cast<bilevel::PartialBlock>(integer("partial_block"));
    a.causal = integer("causal") != 0;
    require(a.partial_block <= bilevel::PartialBlock::kAlwaysKept, "partial_block is out of range; export the model anew");
  }

  void compute(Context& context) const override {
    bilevel::RouteArguments call = a;
    std::vector<int64_t> scores;
    call.scores = context.input<float>(0, scores);
    require(scores.size() == 4, "SelectBlocks' scores must be [B, Hs, L, U]; export the model anew");
    static const float none = 0;
    if (!call.scores) call.scores = &none;  // an empty tensor; null would mean CoarseRoute
    call.batch = scores[0], call.selection_heads = scores[1], call.length = scores[2], call.units = scores[3];
    require_lengths(context, 1, call.batch, call.length, call.past_len, call.new_len);
    call.routes = context.output<int32_t>(0, {call.batch, call.selection_heads, call.length, call.topk});
    kernels.route(call, context.parallel());
  }

  bilevel::RouteArguments a{};
};

struct Attention : Kernel {
  Attention(const ort::Api& api, const ort::KernelInfo* info, bool has_sinks) : Kernel(api, info), has_sinks(has_sinks) {
    a.block_size = integer("block_size", 1);
    a.causal = integer("causal") != 0;
    a.scale = number("scale");
  }

  void compute(Context& context) const override {
    bilevel::AttentionArguments call = a;
    std::vector<int64_t> q, k, v, routes;
    call.q = context.input<float>(0, q);
    require(q.size() == 4, "attention's q must be [B, Hq, L, D]; export the model anew");
    call.width = q[3];
    caches(context, call, k, v);
    call.routes = context.input<int32_t>(3, routes);
    require(k.size() == 4 && v.size() == 4 && k[0] == v[0] && k[1] == v[1] && k[2] == v[2] && routes.size() == 4 &&
                q[0] == k[0] && routes[0] == q[0] && routes[1] > 0 && routes[2] == q[2] && k[1] > 0 &&
                k[2] % call.block_size == 0,
            "RoutedAttention's q, k, v and routes do not fit together; export the model anew");
    call.batch = q[0], call.heads = q[1], call.length = q[2];
    call.kv_heads = k[1], call.capacity = k[2], call.selection_heads = routes[1], call.kept = routes[3];
    require_lengths(context, 4, call.batch, call.length, call.past_len, call.new_len);
    if (has_sinks) {
      std::vector<int64_t> sinks;
      call.sinks = context.input<float>(6, sinks);
      require(sinks == std::vector<int64_t>{call.heads}, "RoutedAttentionSinks' sinks must be [Hq]; export the model anew");
    }
    q[3] = call.value_width;
    call.out = context.output<float>(0, q);
    kernels.attention(call, context.parallel());
  }

  virtual void caches(Context& context, bilevel::AttentionArguments& call, std::vector<int64_t>& k,
                      std::vector<int64_t>& v) const {
    call.k = context.input<float>(1, k);
    call.v = context.input<float>(2, v);
    require(k.size() == 4 && v.size() == 4 && k[3] == call.width,
            "RoutedAttention's caches do not fit its q; export the model anew");
    call.value_width = v[3];
  }

  bilevel::AttentionArguments a{};
  bool has_sinks;
};

// What the operators of packed caches say of their rows.
bilevel::CacheRows rows_of(const Kernel& kernel) {
  bilevel::CacheRows rows{0, kernel.integer("bits", 4), kernel.integer("groups", 1)};
  require(rows.bits == 4 || rows.bits == 8, "a packed cache has 4 or 8 bits; export the model anew");
  return rows;
}

// The same for rows of `width` numbers in `bytes` bytes.
bilevel::CacheRows checked(bilevel::CacheRows rows, int64_t width, int64_t bytes) {
  rows.width = width;
  require(width % rows.groups == 0 && (rows.bits == 8 || width / rows.groups % 2 == 0) && rows.bytes() == bytes,
          "the rows of a packed cache do not fit the model's heads; export the model anew");
  return rows;
}

struct PackedAttention : Attention {
  PackedAttention(const ort::Api& api, const ort::KernelInfo* info) : Attention(api, info, false), rows(rows_of(*this)) {}

  void caches(Context& context, bilevel::AttentionArguments& call, std::vector<int64_t>& k,
              std::vector<int64_t>& v) const override {
    call.packed_k = context.input<uint8_t>(1, k);
    call.packed_v = context.input<uint8_t>(2, v);
    require(k.size() == 4 && k == v, "RoutedAttentionQuantized's caches must be [B, Hkv, M, C]; export the model anew");
    call.value_width = call.width;
    call.rows = checked(rows, call.width, k[3]);
  }

  bilevel::CacheRows rows;
};

struct CacheWrite : Kernel {
  CacheWrite(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info), rows(rows_of(*this)) {}

  void compute(Context& context) const override {
    bilevel::CacheWriteArguments call{};
    std::vector<int64_t> update, cache, start;
    call.update = context.input<float>(0, update);
    const uint8_t* before = context.input<uint8_t>(1, cache);
    call.start = context.input<int32_t>(2, start);
    require(update.size() == 4 && cache.size() == 4 && update[0] == cache[0] && update[1] == cache[1] &&
                start == std::vector<int64_t>{cache[0]},
            "WriteCacheQuantized's update, cache and start do not fit together; export the model anew");
    call.batch = cache[0], call.heads = cache[1], call.capacity = cache[2], call.length = update[2];
    call.rows = checked(rows, update[3], cache[3]);
    for (int64_t b = 0; b < call.batch; ++b)
      require(call.start[b] >= 0 && call.start[b] + call.length <= call.capacity,
              "WriteCacheQuantized's update does not fit into the cache; correct the lengths of the call");
    call.cache = context.output<uint8_t>(0, cache);
    // The runtime gives both one buffer.
    if (call.cache != before) std::copy(before, before + cache[0] * cache[1] * cache[2] * cache[3], call.cache);
    kernels.write_cache(call, context.parallel());
  }

  bilevel::CacheRows rows;
};

struct CacheRead : Kernel {
  CacheRead(const ort::Api& api, const ort::KernelInfo* info)
      : Kernel(api, info), width(integer("width", 1)), rows(rows_of(*this)) {}

  void compute(Context& context) const override {
    bilevel::CacheReadArguments call{};
    std::vector<int64_t> shape;
    call.packed = context.input<uint8_t>(0, shape);
    require(shape.size() == 5, "UnpackCache's rows must be [B, H, U, S, C]; export the model anew");
    call.rows = checked(rows, width, shape[4]);
    call.count = shape[0] * shape[1] * shape[2] * shape[3], shape[4] = width;
    call.out = context.output<float>(0, shape);
    kernels.read_cache(call, context.parallel());
  }

  int64_t width;
  bilevel::CacheRows rows;
};

struct ExpertRoute : Kernel {
  ExpertRoute(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info) {
    a.top_k = integer("top_k");
    a.topk_group = integer("topk_group");
    a.normalize = integer("normalize") != 0;
    a.scale = number("scale");
    a.norm_floor = number_or("norm_floor", 0.0f);
    a.zero_fill = integer_or("zero_fill", 0) != 0;
    const std::string scores = text("score_func");
    a.score_func = scores == "softmax"        ? bilevel::ScoreFunc::kSoftmax
                   : scores == "sqrtsoftplus" ? bilevel::ScoreFunc::kSqrtSoftplus
                                              : bilevel::ScoreFunc::kSigmoid;
    require(a.score_func != bilevel::ScoreFunc::kSigmoid || scores == "sigmoid",
            "ExpertRoute has a score_func that this library does not know; install the bilevel that exported the model");
    const std::string group = text("group_score");
    a.group_score = group == "max"        ? bilevel::GroupScore::kMax
                    : group == "top2_sum" ? bilevel::GroupScore::kTop2Sum
                                          : bilevel::GroupScore::kExternal;
  }

  void compute(Context& context) const override {
    bilevel::ExpertRouteArguments call = a;
    std::vector<int64_t> logits, groups, bias;
    call.logits = context.input<float>(0, logits);
    call.group_logits = context.input<float>(1, groups);
    call.select_bias = context.input<float>(2, bias);
    require(logits.size() == 2 && groups.size() == 2 && bias.size() == 1 && bias[0] == logits[1] && groups[0] == logits[0] &&
                groups[1] > 0 && logits[1] % groups[1] == 0,
            "ExpertRoute's logits [T, E], group_logits [T, Gp] and select_bias [E] do not fit together; export the model anew");
    call.tokens = logits[0], call.experts = logits[1], call.groups = groups[1];
    call.ids = context.output<int32_t>(0, {call.tokens, call.top_k});
    call.weights = context.output<float>(1, {call.tokens, call.top_k});
    kernels.expert_route(call, context.parallel());
  }

  bilevel::ExpertRouteArguments a{};
};

struct Experts : Kernel {
  Experts(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info) {
    a.gate_scale = number_or("gate_scale", 1.0f);
    a.up_shift = number_or("up_shift", 0.0f);
    const float limit = number_or("limit", 0.0f);
    if (limit > 0.0f) a.limit = limit;
  }

  void compute(Context& context) const override {
    bilevel::ExpertsArguments call = a;
    std::vector<int64_t> x, ids, weights, gate_up, down;
    call.x = context.input<float>(0, x);
    call.ids = context.input<int32_t>(1, ids);
    call.weights = context.input<float>(2, weights);
    call.gate_up = context.input<float>(3, gate_up);
    call.down = context.input<float>(4, down);
    require(x.size() == 2 && ids.size() == 2 && ids == weights && gate_up.size() == 3 && down.size() == 3 && ids[0] == x[0] &&
                gate_up[0] == down[0] && gate_up[2] == x[1] && down[1] == x[1] && gate_up[1] == 2 * down[2],
            "RoutedExperts' x, ids, weights, gate_up and down do not fit together; export the model anew");
    call.tokens = x[0], call.width = x[1], call.kept = ids[1], call.experts = down[0], call.hidden = down[2];
    call.out = context.output<float>(0, x);
    kernels.experts(call, context.parallel());
  }

  bilevel::ExpertsArguments a{};
};

// RoutedExpertsQuantized.
struct PackedExperts : Kernel {
  PackedExperts(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info) {
    bits = integer("bits", 4);
    block = integer("block_size", 32);
    require((bits == 4 || bits == 8) && (block == 32 || block == 64 || block == 128),
            "RoutedExpertsQuantized takes bits of 4 or 8 and a block_size of 32, 64 or 128; export the model anew");
  }

  // The matrix in the inputs [first, first + 3), which must be [experts, rows, depth].
  bilevel::PackedRows matrix(Context& context, size_t first, int64_t experts, int64_t rows, int64_t depth) const {
    bilevel::PackedRows made{};
    std::vector<int64_t> codes, scales, zeros;
    made.codes = context.input<uint8_t>(first, codes);
    made.scales = context.input<float>(first + 1, scales);
    made.zeros = context.input<uint8_t>(first + 2, zeros);
    made.block = block, made.bits = bits, made.blocks = (depth + block - 1) / block;
    require(codes == std::vector<int64_t>{experts, rows, made.blocks * block * bits / 8} &&
                scales == std::vector<int64_t>{experts, rows, made.blocks} && zeros == scales,
            "RoutedExpertsQuantized's packed weights do not fit its x and one another; export the model anew");
    return made;
  }

  void compute(Context& context) const override {
    bilevel::ExpertsArguments call{};
    std::vector<int64_t> x, ids, weights, gate_up;
    call.x = context.input<float>(0, x);
    call.ids = context.input<int32_t>(1, ids);
    call.weights = context.input<float>(2, weights);
    context.input<uint8_t>(3, gate_up);
    require(x.size() == 2 && ids.size() == 2 && ids == weights && ids[0] == x[0] && gate_up.size() == 3 && gate_up[1] % 2 == 0,
            "RoutedExpertsQuantized's x, ids, weights and gate_up_codes do not fit together; export the model anew");
    call.tokens = x[0], call.width = x[1], call.kept = ids[1], call.experts = gate_up[0], call.hidden = gate_up[1] / 2;
    call.packed_gate_up = matrix(context, 3, call.experts, gate_up[1], call.width);
    call.packed_down = matrix(context, 6, call.experts, call.width, call.hidden);
    call.out = context.output<float>(0, x);
    kernels.experts(call, context.parallel());
  }

  int64_t bits, block;
};

enum class Operator { kCoarseRoute, kFineRoute, kSelectBlocks, kRoutedAttention, kRoutedAttentionSinks, kExpertRoute,
                      kRoutedExperts, kRoutedExpertsQuantized, kRoutedAttentionQuantized, kWriteCacheQuantized, kUnpackCache };

// An operator's declaration: "T" is fp32 here, 'i' int32.
struct Op : ort::CustomOp {
  Operator which;
  const char* title;
  const char* inputs;   // one letter per input: f, i or u (uint8)
  const char* outputs;
};

const Op& self(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }
ort::ElementType element(char letter) {
  return letter == 'i' ? ort::kInt32 : letter == 'u' ? ort::kUInt8 : ort::kFloat;
}

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  try {
    std::unique_ptr<Kernel> made;
    switch (self(op).which) {
      case Operator::kCoarseRoute: made = std::make_unique<Route>(*api, info, false); break;
      case Operator::kFineRoute: made = std::make_unique<Route>(*api, info, true); break;
      case Operator::kSelectBlocks: made = std::make_unique<Select>(*api, info); break;
      case Operator::kRoutedAttention: made = std::make_unique<Attention>(*api, info, false); break;
      case Operator::kRoutedAttentionSinks: made = std::make_unique<Attention>(*api, info, true); break;
      case Operator::kExpertRoute: made = std::make_unique<ExpertRoute>(*api, info); break;
      case Operator::kRoutedExperts: made = std::make_unique<Experts>(*api, info); break;
      case Operator::kRoutedExpertsQuantized: made = std::make_unique<PackedExperts>(*api, info); break;
      case Operator::kRoutedAttentionQuantized: made = std::make_unique<PackedAttention>(*api, info); break;
      case Operator::kWriteCacheQuantized: made = std::make_unique<CacheWrite>(*api, info); break;
      case Operator::kUnpackCache: made = std::make_unique<CacheRead>(*api, info); break;
    }
    *kernel = made.release();
    return nullptr;
  } catch (const std::exception& error) {
    return api->call(ort::kCreateStatus, ort::kInvalidArgument, error.what());
  }
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  const auto& made = *static_cast<const Kernel*>(kernel);
  try {
    Context call(made.api, context);
    made.compute(call);
    return nullptr;
  } catch (const std::exception& error) {
    return made.api.call(ort::kCreateStatus, ort::kFail, error.what());
  }
}

Op declare(Operator which, const char* title, const char* inputs, const char* outputs) {
  Op op{};
  op.version = ort::kApiVersion;
  op.which = which, op.title = title, op.inputs = inputs, op.outputs = outputs;
  op.name = [](const ort::CustomOp* o) { return self(o).title; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.input_type = [](const ort::CustomOp* o, size_t i) { return element(self(o).inputs[i]); };
  op.input_count = [](const ort::CustomOp* o) { return std::string(self(o).inputs).size(); };
  op.output_type = [](const ort::CustomOp* o, size_t i) { return element(self(o).outputs[i]); };
  op.output_count = [](const ort::CustomOp* o) { return std::string(self(o).outputs).size(); };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.create_v2 = create;
  op.compute_v2 = compute;
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 1; };
  return op;
}

}  // namespace

extern "C" {

// ONNX Runtime calls this from SessionOptions.register_custom_ops_library.
__attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  static const Op operators[] = {
      declare(Operator::kCoarseRoute, "CoarseRoute", "ffii", "i"),
      declare(Operator::kFineRoute, "FineRoute", "ffiii", "i"),
      declare(Operator::kSelectBlocks, "SelectBlocks", "fii", "i"),
      declare(Operator::kRoutedAttention, "RoutedAttention", "fffiii", "f"),
      declare(Operator::kRoutedAttentionSinks, "RoutedAttentionSinks", "fffiiif", "f"),
      declare(Operator::kExpertRoute, "ExpertRoute", "fff", "if"),
      declare(Operator::kRoutedExperts, "RoutedExperts", "fifff", "f"),
      declare(Operator::kRoutedExpertsQuantized, "RoutedExpertsQuantized", "fifufuufu", "f"),
      declare(Operator::kRoutedAttentionQuantized, "RoutedAttentionQuantized", "fuuiii", "f"),
      declare(Operator::kWriteCacheQuantized, "WriteCacheQuantized", "fui", "u"),
      declare(Operator::kUnpackCache, "UnpackCache", "u", "f"),
  };
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (!api) return nullptr;  // older than 1.17: the graph's own bodies run
  static std::mutex mutex;  // sessions may be opened by several threads at once
  const std::lock_guard<std::mutex> lock(mutex);
  static ort::Domain* domain = nullptr;  // lives as long as the library: sessions refer to it
  if (!domain) {
    ort::Domain* made = nullptr;
    if (ort::Status* status = api->call(ort::kCreateCustomOpDomain, "bilevel", &made)) return status;
    for (const Op& op : operators)
      if (ort::Status* status = api->call(ort::kCustomOpDomainAdd, made, static_cast<const ort::CustomOp*>(&op))) return status;
    domain = made;
  }
  return api->call(ort::kAddCustomOpDomain, options, domain);
}
}
