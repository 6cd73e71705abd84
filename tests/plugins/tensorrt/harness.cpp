// TensorRT's side of a plugin, as plain C functions: a test makes a plugin, configures it, writes it, reads it back and runs it.
#include <cstring>
#include <string>
#include <vector>

#include "NvInferRuntime.h"

using namespace nvinfer1;

// A tensor as a test describes it. dims: -1 where a size varies up to that in most.
struct Tensor {
  int32_t rank, type;
  int64_t dims[8], most[8];
  void* data;
};

namespace {

struct RecordingLogger : ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) said += std::string(text) + "\n";
  }
  std::string said;
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

PluginTensorDesc describe(const Tensor& tensor, const int64_t* sizes) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = tensor.rank;
  for (int32_t i = 0; i < tensor.rank; ++i) desc.dims.d[i] = sizes[i];
  desc.type = static_cast<DataType>(tensor.type);
  desc.format = TensorFormat::kLINEAR;
  return desc;
}

std::vector<PluginTensorDesc> exact(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> found;
  for (int32_t i = 0; i < count; ++i) found.push_back(describe(tensors[i], tensors[i].most));
  return found;
}

std::vector<DynamicPluginTensorDesc> dynamic(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> found;
  for (int32_t i = 0; i < count; ++i) {
    DynamicPluginTensorDesc one{};
    one.desc = describe(tensors[i], tensors[i].dims);
    one.max = describe(tensors[i], tensors[i].most).dims;
    found.push_back(one);
  }
  return found;
}

template <typename Capability>
Capability* as(void* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild* build_of(void* plugin) { return as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime_of(void* plugin) { return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME); }

}  // namespace

extern "C" {

using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
using SetLoggerFinder = void (*)(ILoggerFinder*);

void harness_listen(SetLoggerFinder set, int on) { set(on ? &finder : nullptr); }

const char* harness_said() {
  static std::string said;
  said.swap(logger.said);
  logger.said.clear();
  return said.c_str();
}

void* harness_make(GetCreators get, const char* op, const PluginField* fields, int32_t count, int from_plan) {
  int32_t creators = 0;
  IPluginCreatorInterface* const* list = get(creators);
  const PluginFieldCollection collection{count, fields};
  for (int32_t i = 0; i < creators; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(list[i]);
    if (std::strcmp(creator->getPluginName(), op) != 0) continue;
    return creator->createPlugin("layer", fields == nullptr ? nullptr : &collection,
                                 from_plan ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
  }
  return nullptr;
}

int harness_configure(void* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  auto in = dynamic(tensors, inputs), out = dynamic(tensors + inputs, outputs);
  return build_of(plugin)->configurePlugin(in.data(), inputs, out.data(), outputs);
}

size_t harness_workspace(void* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  auto in = dynamic(tensors, inputs), out = dynamic(tensors + inputs, outputs);
  return build_of(plugin)->getWorkspaceSize(in.data(), inputs, out.data(), outputs);
}

int harness_supports(void* plugin, int32_t position, const Tensor* tensors, int32_t inputs, int32_t outputs, int is_packed) {
  auto all = dynamic(tensors, inputs + outputs);
  if (is_packed) all[position].desc.format = TensorFormat::kCHW4;
  return build_of(plugin)->supportsFormatCombination(position, all.data(), inputs, outputs);
}

int harness_output_types(void* plugin, const int32_t* inputs, int32_t num_inputs, int32_t* outputs, int32_t num_outputs) {
  return build_of(plugin)->getOutputDataTypes(reinterpret_cast<DataType*>(outputs), num_outputs,
                                              reinterpret_cast<const DataType*>(inputs), num_inputs);
}

const char* harness_timing_key(void* plugin) { return build_of(plugin)->getTimingCacheID(); }

const PluginFieldCollection* harness_fields(void* plugin) { return runtime_of(plugin)->getFieldsToSerialize(); }

void* harness_attach(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

int harness_shape_change(void* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  auto in = exact(tensors, inputs), out = exact(tensors + inputs, outputs);
  return runtime_of(plugin)->onShapeChange(in.data(), inputs, out.data(), outputs);
}

int harness_enqueue(void* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs, void* workspace) {
  auto in = exact(tensors, inputs), out = exact(tensors + inputs, outputs);
  std::vector<const void*> from;
  std::vector<void*> to;
  for (int32_t i = 0; i < inputs; ++i) from.push_back(tensors[i].data);
  for (int32_t i = 0; i < outputs; ++i) to.push_back(tensors[inputs + i].data);
  return runtime_of(plugin)->enqueue(in.data(), out.data(), from.data(), to.data(), workspace, nullptr);
}

void harness_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }
}
