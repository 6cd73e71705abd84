// The operators as TensorRT plugins, over the C interface of the same library. One class serves all of them: what it does
// follows from contract.h. It keeps to what TensorRT 10.0 to 11.x and TensorRT-RTX share: IPluginV3 and IPluginCreatorV3One,
// handed out by getCreators; the registry itself is never called. A GPU is asked for nothing before a plugin is attached to a
// context.
#include <atomic>
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <utility>

#include "NvInferRuntime.h"
#include "calls.h"
#include "log.h"

namespace bilevel {
namespace {

using namespace nvinfer1;

std::atomic<ILoggerFinder*> logger_finder{nullptr};

std::string timing_key(const Node& node) {
  std::ostringstream text;
  text << "bilevel." << node.op->name << "/" << node.op->version;
  for (int32_t i = 0; i < node.op->num_attributes; ++i) {
    const Value& value = node.values[i];
    text << ";" << node.op->attributes[i].name << "=";
    if (node.op->attributes[i].kind == AttributeKind::kString) {
      text << value.text;
    } else {
      text << std::hexfloat << value.number;
    }
  }
  return text.str();
}

// No header promises how a workspace is aligned: what it takes to round the address up is asked for on top.
constexpr uintptr_t kWorkspaceAlignment = 256;

void* aligned(void* workspace) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Node& node) : node_(node), timing_key_(timing_key(node)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    return guarded<IPluginV3*>(op().name, "cannot be copied", nullptr, [&] { return new Plugin(node_); });
  }

  const AsciiChar* getPluginName() const noexcept override { return op().name; }
  const AsciiChar* getPluginVersion() const noexcept override { return op().version; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kDomain; }

  // ---- build ------------------------------------------------------------------------------------------------------------

  int32_t getNbOutputs() const noexcept override { return op().num_outputs; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t num_outputs, const DataType* inputs,
                             int32_t num_inputs) const noexcept override {
    return guarded(op().name, "has no output types", 1, [&] {
      check_counts(num_inputs, num_outputs);
      for (int32_t i = 0; i < num_outputs; ++i) {
        const PortType type = op().outputs[i].type;
        outputs[i] = type == PortType::kInt32 ? DataType::kINT32 : DataType::kFLOAT;
        for (int32_t j = num_inputs - 1; type == PortType::kModelFloat && j >= 0; --j) {
          if (op().inputs[j].type == type) outputs[i] = inputs[j];
        }
      }
      return 0;
    });
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t num_inputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t num_outputs, IExprBuilder& builder) noexcept override {
    return guarded(op().name, "has no output shapes", 1, [&] {
      check_counts(num_inputs, num_outputs);
      for (int32_t i = 0; i < num_inputs; ++i) {
        const Port& port = op().inputs[i];
        if (inputs[i].nbDims == port.rank) continue;
        throw Refusal{std::string(port.name) + " must have rank " + std::to_string(port.rank) + ", not " +
                      std::to_string(inputs[i].nbDims)};
      }
      for (int32_t i = 0; i < num_outputs; ++i) {
        outputs[i].nbDims = op().outputs[i].rank;
        for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis) {
          const Place place = place_of(op(), op().outputs[i].dims[axis]);
          outputs[i].d[axis] = place.attribute < 0
                                   ? inputs[place.input].d[place.axis]
                                   : builder.constant(static_cast<int64_t>(node_.values[place.attribute].number));
        }
      }
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    return guarded(op().name, "supports no format", false, [&] {
      check_counts(num_inputs, num_outputs);
      const PluginTensorDesc& tensor = tensors[position].desc;
      if (tensor.format != TensorFormat::kLINEAR) return false;
      int32_t first = 0;  // the first port of the model's float type: all others of that type follow it
      while (first < num_inputs + num_outputs && port(first).type != PortType::kModelFloat) ++first;
      switch (port(position).type) {
        case PortType::kInt32: return tensor.type == DataType::kINT32;
        case PortType::kFloat32: return tensor.type == DataType::kFLOAT;
        default: break;
      }
      if (first < position) return tensor.type == tensors[first].desc.type;
      return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 || tensor.type == DataType::kFLOAT;
    });
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t num_inputs, const DynamicPluginTensorDesc*,
                          int32_t num_outputs) noexcept override {
    return guarded(op().name, "cannot be built", 1, [&] {
      check_counts(num_inputs, num_outputs);
      node_ = seen(inputs);
      // A library without kernels for this node shows here, not when the engine runs.
      Call(node_, split_dims(op(), node_.dims)).workspace_size();
      return 0;
    });
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs, const DynamicPluginTensorDesc*,
                          int32_t num_outputs) const noexcept override {
    return guarded<size_t>(op().name, "gets no workspace", 0, [&] {
      check_counts(num_inputs, num_outputs);
      const Node node = seen(inputs);
      const size_t bytes = Call(node, split_dims(op(), node.dims)).workspace_size();
      return bytes == 0 ? 0 : bytes + kWorkspaceAlignment - 1;
    });
  }

  const AsciiChar* getTimingCacheID() noexcept override { return timing_key_.c_str(); }

  // ---- run --------------------------------------------------------------------------------------------------------------

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    // Loading modules now lets the first enqueue be captured into a CUDA graph. Whatever fails here fails again, and is
    // reported, there.
    guarded(op().name, "is not prepared", 0, [&] {
      if (!node_.dims.empty()) bilevel_prepare(Call(node_, split_dims(op(), node_.dims)).get());
      return 0;
    });
    return clone();
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override {
    return guarded(op().name, "refuses these shapes", 1, [&] {
      check_counts(num_inputs, num_outputs);
      workspace_bytes_ = needed(inputs, outputs);
      return 0;
    });
  }

  int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(op().name, "was not run", 1, [&] {
      // TensorRT does not say how large the workspace is: what calls of these shapes need is within what it was asked for.
      if (!workspace_bytes_) workspace_bytes_ = needed(input_desc, output_desc);
      const Call call(node_, input_desc, inputs, output_desc, outputs);
      if (op().in_place && inputs[0] != outputs[0]) tell_of_copies();
      if (bilevel_launch(call.get(), aligned(workspace), *workspace_bytes_, stream) != BILEVEL_OK) throw Refusal{bilevel_last_error()};
      return 0;
    });
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const PluginFieldCollection*>(op().name, "cannot be written", nullptr, [&] {
      fields_ = std::make_unique<PlanFields>(node_);
      return fields_->get();
    });
  }

 private:
  const Op& op() const { return *node_.op; }
  const Port& port(int32_t position) const {
    return position < op().num_inputs ? op().inputs[position] : op().outputs[position - op().num_inputs];
  }

  void tell_of_copies() const {
    static std::atomic<bool> is_told{false};
    if (is_told.exchange(true)) return;
    write_log(ILogger::Severity::kWARNING, op().name, "copies its cache",
              "TensorRT gave input and output different addresses, so that every call copies the whole cache; report this");
  }

  void check_counts(int32_t num_inputs, int32_t num_outputs) const {
    if (num_inputs == op().num_inputs && num_outputs == op().num_outputs) return;
    throw Refusal{"takes " + std::to_string(op().num_inputs) + " inputs and gives " + std::to_string(op().num_outputs) +
                  " outputs, not " + std::to_string(num_inputs) + " and " + std::to_string(num_outputs)};
  }

  // The node with what a profile says of its inputs.
  Node seen(const DynamicPluginTensorDesc* inputs) const {
    Node node = node_;
    node.dtype = float_type(op(), inputs);
    node.dims = join_dims(largest_shapes(op(), inputs));
    return node;
  }

  size_t needed(const PluginTensorDesc* inputs, const PluginTensorDesc* outputs) const {
    const std::vector<const void*> no_inputs(static_cast<size_t>(op().num_inputs));
    const std::vector<void*> no_outputs(static_cast<size_t>(op().num_outputs));
    return Call(node_, inputs, no_inputs.data(), outputs, no_outputs.data()).workspace_size();
  }

  Node node_;
  std::string timing_key_;
  std::optional<size_t> workspace_bytes_;
  std::unique_ptr<PlanFields> fields_;
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const Op& op) : op_(op) {
    for (int32_t i = 0; i < op.num_attributes; ++i) {
      fields_.emplace_back(op.attributes[i].name, nullptr, field_type(op.attributes[i].kind), 1);
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields, TensorRTPhase phase) noexcept override {
    return guarded<IPluginV3*>(op_.name, name == nullptr ? "" : name, nullptr, [&] {
      const bool from_plan = phase == TensorRTPhase::kRUNTIME;
      const Node node = read_fields(op_, fields, from_plan);
      // The library may be another one than that which the engine was built with.
      if (!node.dims.empty()) Call(node, split_dims(op_, node.dims)).workspace_size();
      return new Plugin(node);
    });
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const AsciiChar* getPluginName() const noexcept override { return op_.name; }
  const AsciiChar* getPluginVersion() const noexcept override { return op_.version; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  const Op& op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace

void set_logger_finder(ILoggerFinder* finder) noexcept { logger_finder = finder; }

void write_log(ILogger::Severity severity, const char* op, const char* what, const char* sentence) noexcept {
  char text[1024];
  std::snprintf(text, sizeof text, "bilevel.%s %s: %s", op, what, sentence);
  ILoggerFinder* finder = logger_finder;
  ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(severity, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

// One creator for every operator.
template <size_t... Index>
nvinfer1::IPluginCreatorInterface* const* creators_of(std::index_sequence<Index...>) {
  static Creator creators[] = {Creator(kOps[Index])...};
  static nvinfer1::IPluginCreatorInterface* const list[] = {&creators[Index]...};
  return list;
}

}  // namespace bilevel

extern "C" BILEVEL_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { bilevel::set_logger_finder(finder); }

extern "C" BILEVEL_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  count = bilevel::kNumOps;
  return bilevel::creators_of(std::make_index_sequence<bilevel::kNumOps>());
}
