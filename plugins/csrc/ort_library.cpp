// The operators as an ONNX Runtime custom-op library: domain "bilevel", CPU, fp32.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace {

// The best kernels that this CPU has, or those that BILEVEL_CPU_ISA names (for tests; ignored where the CPU lacks them).
const bilevel::Kernels& best_kernels() {
  const bilevel::Kernels* usable[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool is_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (is_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    usable[count++] = &bilevel::avx512::kernels;
  if (is_avx2) usable[count++] = &bilevel::avx2::kernels;
#endif
  usable[count++] = &bilevel::baseline::kernels;
  const char* wanted = std::getenv("BILEVEL_CPU_ISA");
  for (int i = 0; wanted && i < count; ++i)
    if (!std::strcmp(wanted, usable[i]->name)) return *usable[i];
  return *usable[0];
}

struct Failure : std::exception {
  explicit Failure(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

// One call's tensors.
class Context {
 public:
  Context(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  template <typename Element>
  const Element* input(size_t index, std::vector<int64_t>& shape) const {
    const ort::Value* value = nullptr;
    check(api_.call(ort::kKernelContextGetInput, const_cast<const ort::KernelContext*>(context_), index, &value));
    ort::TensorInfo* info = nullptr;
    check(api_.call(ort::kGetTensorTypeAndShape, value, &info));
    size_t rank = 0;
    check(api_.call(ort::kGetDimensionsCount, const_cast<const ort::TensorInfo*>(info), &rank));
    shape.resize(rank);
    check(api_.call(ort::kGetDimensions, const_cast<const ort::TensorInfo*>(info), shape.data(), rank));
    api_.call<void>(ort::kReleaseTensorInfo, info);
    void* data = nullptr;
    check(api_.call(ort::kGetTensorMutableData, const_cast<ort::Value*>(value), &data));
    return static_cast<const Element*>(data);
  }

  template <typename Element>
  Element* output(size_t index, const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(api_.call(ort::kKernelContextGetOutput, context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api_.call(ort::kGetTensorMutableData, value, &data));
    return static_cast<Element*>(data);
  }

  // ONNX Runtime's own threads.
  bilevel::Parallel parallel() {
    return {[](void* self, void (*function)(void*, size_t), size_t total, void* data) {
              auto* context = static_cast<Context*>(self);
              if (total == 1) return function(data, 0);
              check(context->api_.call(ort::kKernelContextParallelFor, const_cast<const ort::KernelContext*>(context->context_),
                                       function, total, size_t{0}, data));
            },
            this};
  }

  static void check(ort::Status* status) {
    if (status) throw Failure("ONNX Runtime refused a call of the bilevel library");
  }

 private:
  const ort::Api& api_;
  ort::KernelContext* context_;
};

void require(bool condition, const char* sentence) {
  if (!condition) throw Failure(sentence);
}

struct Kernel {
  Kernel(const ort::Api& api, const ort::KernelInfo* info) : api(api), info(info) {}
  virtual ~Kernel() = default;
  virtual void compute(Context& context) const = 0;

  int64_t integer(const char* name) const {
    int64_t value = 0;
    Context::check(api.call(ort::kKernelInfoGetAttributeInt64, info, name, &value));
    return value;
  }
  float number(const char* name) const {
    float value = 0;
    Context::check(api.call(ort::kKernelInfoGetAttributeFloat, info, name, &value));
    return value;
  }

  const ort::Api& api;
  const ort::KernelInfo* info;
  const bilevel::Kernels& kernels = best_kernels();
};

struct Route : Kernel {
  Route(const ort::Api& api, const ort::KernelInfo* info, bool is_fine) : Kernel(api, info), is_fine(is_fine) {
    a.block_size = integer("block_size");
    a.topk = integer("topk");
    a.selection_heads = integer("num_selection_heads");
    a.init_blocks = integer("init_blocks");
    a.local_blocks = integer("local_blocks");
    a.causal = integer("causal") != 0;
  }

  void compute(Context& context) const override {
    bilevel::RouteArguments call = a;
    std::vector<int64_t> query, keys, candidates, lengths;
    size_t next = 0;
    call.query = context.input<float>(next++, query);
    call.unit_key = context.input<float>(next++, keys);
    call.candidates = is_fine ? context.input<int32_t>(next++, candidates) : nullptr;
    call.past_len = context.input<int32_t>(next++, lengths);
    call.new_len = context.input<int32_t>(next++, lengths);
    require(query.size() == 4 && keys.size() == 4 && query[0] == keys[0] && query[3] == keys[3],
            "a route's query [B, Hr, L, Dr] and unit_key [B, Hk, U, Dr] do not fit together; export the model anew");
    call.batch = query[0], call.route_heads = query[1], call.length = query[2], call.width = query[3];
    call.key_heads = keys[1], call.units = keys[2];
    call.candidate_heads = is_fine ? candidates.at(1) : 1, call.candidates_kept = is_fine ? candidates.at(3) : 0;
    require(!is_fine || (candidates[0] == call.batch && candidates[2] == call.length),
            "FineRoute's candidates [B, Hc, L, K1] do not fit its query; export the model anew");
    call.routes = context.output<int32_t>(0, {call.batch, call.selection_heads, call.length, call.topk});
    kernels.route(call, context.parallel());
  }

  bilevel::RouteArguments a{};
  bool is_fine;
};

struct Attention : Kernel {
  Attention(const ort::Api& api, const ort::KernelInfo* info) : Kernel(api, info) {
    a.block_size = integer("block_size");
    a.causal = integer("causal") != 0;
    a.scale = number("scale");
  }

  void compute(Context& context) const override {
    bilevel::AttentionArguments call = a;
    std::vector<int64_t> q, k, v, routes, lengths;
    call.q = context.input<float>(0, q);
    call.k = context.input<float>(1, k);
    call.v = context.input<float>(2, v);
    call.routes = context.input<int32_t>(3, routes);
    call.past_len = context.input<int32_t>(4, lengths);
    call.new_len = context.input<int32_t>(5, lengths);
    require(q.size() == 4 && k.size() == 4 && k == v && routes.size() == 4 && q[0] == k[0] && q[3] == k[3] &&
                routes[0] == q[0] && routes[2] == q[2] && k[2] % call.block_size == 0,
            "RoutedAttention's q, k, v and routes do not fit together; export the model anew");
    call.batch = q[0], call.heads = q[1], call.length = q[2], call.width = q[3];
    call.kv_heads = k[1], call.capacity = k[2], call.selection_heads = routes[1], call.kept = routes[3];
    call.out = context.output<float>(0, q);
    kernels.attention(call, context.parallel());
  }

  bilevel::AttentionArguments a{};
};

enum class Operator { kCoarseRoute, kFineRoute, kRoutedAttention };

// An operator's declaration: "T" is fp32 here, 'i' int32.
struct Op : ort::CustomOp {
  Operator which;
  const char* title;
  const char* inputs;   // one letter per input: f or i
  const char* outputs;
};

const Op& self(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }
ort::ElementType element(char letter) { return letter == 'i' ? ort::kInt32 : ort::kFloat; }

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  try {
    std::unique_ptr<Kernel> made;
    if (self(op).which == Operator::kRoutedAttention)
      made = std::make_unique<Attention>(*api, info);
    else
      made = std::make_unique<Route>(*api, info, self(op).which == Operator::kFineRoute);
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
      declare(Operator::kRoutedAttention, "RoutedAttention", "fffiii", "f"),
  };
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (!api) return nullptr;  // older than 1.17: the graph's own bodies run
  static ort::Domain* domain = nullptr;  // lives as long as the process: sessions refer to it
  if (!domain) {
    if (ort::Status* status = api->call(ort::kCreateCustomOpDomain, "bilevel", &domain)) return status;
    for (const Op& op : operators)
      if (ort::Status* status = api->call(ort::kCustomOpDomainAdd, domain, static_cast<const ort::CustomOp*>(&op))) return status;
  }
  return api->call(ort::kAddCustomOpDomain, options, domain);
}

// The instruction set whose kernels this CPU gets: "avx512", "avx2" or "baseline".
__attribute__((visibility("default"))) const char* bilevel_instruction_set() { return best_kernels().name; }
}
