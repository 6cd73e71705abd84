// Drives a kernel library's TensorRT plugins as TensorRT would, without TensorRT: tests/gpu/checks_plugins.py compiles it against
// NVIDIA's headers and calls it by ctypes. Every function that returns a plugin returns null where TensorRT would give up.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "NvInferRuntime.h"

using namespace nvinfer1;

namespace {

std::string heard;  // what the plugins logged since harness_log was last asked

class Logger final : public ILogger {
 public:
  void log(Severity, const AsciiChar* text) noexcept override { heard += std::string(text) + "\n"; }
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger_; }

 private:
  Logger logger_;
};

using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);

IPluginCreatorV3One* find_creator(void* get_creators, const char* op) {
  int32_t count = 0;
  IPluginCreatorInterface* const* list = reinterpret_cast<GetCreators>(get_creators)(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(list[i]);
    if (std::strcmp(creator->getPluginName(), op) == 0) return creator;
  }
  return nullptr;
}

template <typename Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

}  // namespace

extern "C" {

// kind: 0 int32, 1 float32, 2 characters. dtype: a bilevel_dtype.
struct Field {
  const char* name;
  int32_t kind, length;
  const void* data;
};
struct Tensor {
  int64_t dims[8];
  int32_t rank, dtype;
};

}  // extern "C"

namespace {

DataType data_type(int32_t dtype) {
  switch (dtype) {
    case 1: return DataType::kHALF;
    case 2: return DataType::kBF16;
    case 3: return DataType::kFLOAT;
    default: return DataType::kINT32;
  }
}

std::vector<PluginTensorDesc> describe(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> made(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    made[i].dims.nbDims = tensors[i].rank;
    for (int32_t axis = 0; axis < tensors[i].rank; ++axis) made[i].dims.d[axis] = tensors[i].dims[axis];
    made[i].type = data_type(tensors[i].dtype);
    made[i].format = TensorFormat::kLINEAR;
    made[i].scale = 1.0F;
  }
  return made;
}

// A profile whose smallest, usual and largest call are the same; the description leaves every axis open, as a dynamic one does.
std::vector<DynamicPluginTensorDesc> profile(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> made;
  for (const PluginTensorDesc& desc : describe(tensors, count)) {
    DynamicPluginTensorDesc one{};
    one.desc = desc;
    one.min = one.opt = one.max = desc.dims;
    for (int32_t axis = 0; axis < desc.dims.nbDims; ++axis) one.desc.dims.d[axis] = -1;
    made.push_back(one);
  }
  return made;
}

}  // namespace

extern "C" {

void harness_listen(void* set_logger_finder) {
  static Finder finder;
  reinterpret_cast<void (*)(ILoggerFinder*)>(set_logger_finder)(&finder);
}

// The lines logged since the last time.
const char* harness_log() {
  static std::string told;
  told = heard;
  heard.clear();
  return told.c_str();
}

// As the ONNX parser does, with a node's attributes.
void* harness_create(void* get_creators, const char* op, const Field* fields, int32_t count) {
  IPluginCreatorV3One* creator = find_creator(get_creators, op);
  if (creator == nullptr) return nullptr;
  std::vector<PluginField> given;
  for (int32_t i = 0; i < count; ++i) {
    const PluginFieldType type = fields[i].kind == 0   ? PluginFieldType::kINT32
                                 : fields[i].kind == 1 ? PluginFieldType::kFLOAT32
                                                       : PluginFieldType::kCHAR;
    given.emplace_back(fields[i].name, fields[i].data, type, fields[i].length);
  }
  const PluginFieldCollection collection{count, given.data()};
  return creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

// As the builder does: formats, types, the profile. 0 where the plugin agrees to all of it.
int32_t harness_configure(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs) {
  auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  if (build == nullptr || build->getNbOutputs() != num_outputs) return 1;
  const auto in = profile(inputs, num_inputs), out = profile(outputs, num_outputs);
  std::vector<DynamicPluginTensorDesc> all = in;
  all.insert(all.end(), out.begin(), out.end());
  for (int32_t i = 0; i < num_inputs + num_outputs; ++i) {
    if (!build->supportsFormatCombination(i, all.data(), num_inputs, num_outputs)) return 2;
  }
  std::vector<DataType> given, types(static_cast<size_t>(num_outputs));
  for (const DynamicPluginTensorDesc& one : in) given.push_back(one.desc.type);
  if (build->getOutputDataTypes(types.data(), num_outputs, given.data(), num_inputs) != 0) return 3;
  for (int32_t i = 0; i < num_outputs; ++i) {
    if (types[i] != out[i].desc.type) return 4;
  }
  return build->configurePlugin(in.data(), num_inputs, out.data(), num_outputs) == 0 ? 0 : 5;
}

size_t harness_workspace(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs) {
  auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  const auto in = profile(inputs, num_inputs), out = profile(outputs, num_outputs);
  return build->getWorkspaceSize(in.data(), num_inputs, out.data(), num_outputs);
}

// Written into a plan and read back, as the runtime does.
void* harness_reload(void* get_creators, const char* op, void* plugin) {
  const PluginFieldCollection* fields =
      capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  IPluginCreatorV3One* creator = find_creator(get_creators, op);
  if (fields == nullptr || creator == nullptr) return nullptr;
  return creator->createPlugin("node", fields, TensorRTPhase::kRUNTIME);
}

void* harness_attach(void* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
}

int32_t harness_shapes(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs) {
  auto* run = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  return run->onShapeChange(describe(inputs, num_inputs).data(), num_inputs, describe(outputs, num_outputs).data(), num_outputs);
}

int32_t harness_enqueue(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs,
                        const void* const* input_data, void* const* output_data, void* workspace, void* stream) {
  auto* run = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  return run->enqueue(describe(inputs, num_inputs).data(), describe(outputs, num_outputs).data(), input_data, output_data,
                      workspace, static_cast<cudaStream_t>(stream));
}

void harness_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

}  // extern "C"
