// From TensorRT's descriptions of tensors to calls of the C interface.
#ifndef BILEVEL_TENSORRT_CALLS_H
#define BILEVEL_TENSORRT_CALLS_H

#include <cstdint>
#include <vector>

#include "NvInferRuntime.h"
#include "../gpu/bilevel_kernels.h"
#include "fields.h"

namespace bilevel {

using Shape = std::vector<int64_t>;

// Where the size of an output's axis comes from: an attribute's value where attribute >= 0, else an axis of an input.
struct Place {
  int32_t attribute = -1;
  int32_t input = 0, axis = 0;
};
Place place_of(const Op& op, const Dim& dim);

// The bilevel_dtype of a tensor, 0 for a type that no operator knows.
int32_t dtype_of(nvinfer1::DataType type);

// The model's float type among the inputs' types; 0 where the operator has none. Throws Refusal.
int32_t float_type(const Op& op, const nvinfer1::PluginTensorDesc* inputs);
int32_t float_type(const Op& op, const nvinfer1::DynamicPluginTensorDesc* inputs);

// The shapes of a profile's largest call. Bounds of axes that vary are computed one by one and need not agree: the largest
// counts. Throws Refusal where a rank is wrong or sizes that do not vary disagree.
std::vector<Shape> largest_shapes(const Op& op, const nvinfer1::DynamicPluginTensorDesc* inputs);

std::vector<Shape> split_dims(const Op& op, const std::vector<int64_t>& flat);
std::vector<int64_t> join_dims(const std::vector<Shape>& shapes);

// A bilevel_call and what it points to.
class Call {
 public:
  // Without tensors: of node.dtype, outputs shaped after the inputs.
  Call(const Node& node, const std::vector<Shape>& inputs);
  // Tensors as TensorRT describes them.
  Call(const Node& node, const nvinfer1::PluginTensorDesc* inputs, const void* const* input_data,
       const nvinfer1::PluginTensorDesc* outputs, void* const* output_data);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Bytes for this call and every smaller one, on any architecture of the library. Throws Refusal.
  size_t workspace_size() const;
  const bilevel_call* get() const { return &call_; }

 private:
  void finish(const Node& node);

  std::vector<bilevel_attribute> attributes_;
  std::vector<Shape> shapes_;
  std::vector<bilevel_tensor> tensors_;
  bilevel_call call_{};
};

}  // namespace bilevel
#endif
