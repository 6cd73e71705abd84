// A plugin's attributes: from the ONNX parser, into a plan, and back (plugins/tensorrt/fields.py describes the fields).
#ifndef BILEVEL_TENSORRT_FIELDS_H
#define BILEVEL_TENSORRT_FIELDS_H

#include <cstdint>
#include <string>
#include <vector>

#include "NvInferRuntime.h"
#include "../gpu/contract.h"

namespace bilevel {

// The value of an attribute: `number` of those of kind int and float, else `text`.
struct Value {
  double number = 0;
  std::string text;
};

// One plugin: its operator, its attributes in the contract's order, and what an optimisation profile said of its inputs.
// dtype: a bilevel_dtype, 0 where unknown or not used. dims: the largest size of every axis of every input, empty if unknown.
struct Node {
  const Op* op = nullptr;
  std::vector<Value> values;
  int32_t dtype = 0;
  std::vector<int64_t> dims;
};

nvinfer1::PluginFieldType field_type(AttributeKind kind);

// from_plan: what PlanFields wrote, else what the parser gave. Throws Refusal.
Node read_fields(const Op& op, const nvinfer1::PluginFieldCollection* fields, bool from_plan);

// The fields that go into a plan. TensorRT reads them after the call that asked for them, so that they live here.
class PlanFields {
 public:
  explicit PlanFields(const Node& node);
  PlanFields(const PlanFields&) = delete;
  PlanFields& operator=(const PlanFields&) = delete;
  const nvinfer1::PluginFieldCollection* get() const { return &collection_; }

 private:
  Node node_;
  std::vector<int32_t> ints_;
  std::vector<float> floats_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace bilevel
#endif
