#include "calls.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "log.h"

namespace bilevel {
namespace {

int32_t port_dtype(const Port& port, int32_t model_float) {
  switch (port.type) {
    case PortType::kInt32: return BILEVEL_INT32;
    case PortType::kFloat32: return BILEVEL_FLOAT32;
    default: return model_float;
  }
}

template <typename TypeOf>
int32_t first_float(const Op& op, TypeOf type_of) {
  for (int32_t i = 0; i < op.num_inputs; ++i) {
    if (op.inputs[i].type != PortType::kModelFloat) continue;
    const int32_t dtype = dtype_of(type_of(i));
    if (dtype == 0 || dtype == BILEVEL_INT32) throw Refusal{std::string(op.inputs[i].name) + " must be fp16, bf16 or fp32"};
    return dtype;
  }
  return 0;
}

std::string text_of(const nvinfer1::Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(static_cast<int64_t>(dims.d[i]));
  return text + "]";
}

struct Size {
  int64_t value = 0;
  bool is_fixed = false;
};

void add_axis(std::map<std::string, Size>& sizes, const Port& port, const Dim& dim, int64_t size, bool is_fixed) {
  const auto [known, is_new] = sizes.try_emplace(dim.symbol, Size{size / dim.factor, is_fixed});
  Size& found = known->second;
  if (size < 0 || size % dim.factor != 0 || (is_fixed && found.is_fixed && found.value * dim.factor != size)) {
    throw Refusal{std::string(port.name) + " has " + (dim.factor > 1 ? std::to_string(dim.factor) : "") + dim.symbol + "=" +
                  std::to_string(size) + ", but an earlier input has " + dim.symbol + "=" + std::to_string(found.value)};
  }
  found = Size{std::max(found.value, size / dim.factor), found.is_fixed && is_fixed};
}

}  // namespace

Place place_of(const Op& op, const Dim& dim) {
  Place place;
  for (int32_t i = 0; dim.sized_by == nullptr && i < op.num_inputs; ++i) {
    for (int32_t axis = 0; axis < op.inputs[i].rank; ++axis) {
      const Dim& other = op.inputs[i].dims[axis];
      if (std::strcmp(other.symbol, dim.symbol) == 0 && other.factor == dim.factor) return Place{-1, i, axis};
    }
  }
  for (int32_t i = 0; dim.sized_by != nullptr && i < op.num_attributes; ++i) {
    if (std::strcmp(op.attributes[i].name, dim.sized_by) == 0) return Place{i, 0, 0};
  }
  throw Refusal{std::string("the contract does not say where ") + dim.symbol + " comes from"};
}

int32_t dtype_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF: return BILEVEL_FLOAT16;
    case nvinfer1::DataType::kBF16: return BILEVEL_BFLOAT16;
    case nvinfer1::DataType::kFLOAT: return BILEVEL_FLOAT32;
    case nvinfer1::DataType::kINT32: return BILEVEL_INT32;
    default: return 0;
  }
}

int32_t float_type(const Op& op, const nvinfer1::PluginTensorDesc* inputs) {
  return first_float(op, [&](int32_t i) { return inputs[i].type; });
}

int32_t float_type(const Op& op, const nvinfer1::DynamicPluginTensorDesc* inputs) {
  return first_float(op, [&](int32_t i) { return inputs[i].desc.type; });
}

std::vector<Shape> largest_shapes(const Op& op, const nvinfer1::DynamicPluginTensorDesc* inputs) {
  std::map<std::string, Size> sizes;
  for (int32_t i = 0; i < op.num_inputs; ++i) {
    const Port& port = op.inputs[i];
    const nvinfer1::Dims &given = inputs[i].desc.dims, &most = inputs[i].max;
    if (given.nbDims != port.rank || most.nbDims != port.rank) {
      throw Refusal{std::string(port.name) + " must have rank " + std::to_string(port.rank) + ", got " + text_of(given)};
    }
    for (int32_t axis = 0; axis < port.rank; ++axis) add_axis(sizes, port, port.dims[axis], most.d[axis], given.d[axis] >= 0);
  }
  std::vector<Shape> shapes;
  for (int32_t i = 0; i < op.num_inputs; ++i) {
    Shape shape;
    for (int32_t axis = 0; axis < op.inputs[i].rank; ++axis) {
      shape.push_back(sizes[op.inputs[i].dims[axis].symbol].value * op.inputs[i].dims[axis].factor);
    }
    shapes.push_back(shape);
  }
  return shapes;
}

std::vector<Shape> split_dims(const Op& op, const std::vector<int64_t>& flat) {
  std::vector<Shape> shapes;
  auto next = flat.begin();
  for (int32_t i = 0; i < op.num_inputs; next += op.inputs[i++].rank) shapes.emplace_back(next, next + op.inputs[i].rank);
  return shapes;
}

std::vector<int64_t> join_dims(const std::vector<Shape>& shapes) {
  std::vector<int64_t> flat;
  for (const Shape& shape : shapes) flat.insert(flat.end(), shape.begin(), shape.end());
  return flat;
}

Call::Call(const Node& node, const std::vector<Shape>& inputs) : shapes_(inputs) {
  const Op& op = *node.op;
  for (int32_t i = 0; i < op.num_outputs; ++i) {
    Shape shape;
    for (int32_t axis = 0; axis < op.outputs[i].rank; ++axis) {
      const Place place = place_of(op, op.outputs[i].dims[axis]);
      const bool is_attribute = place.attribute >= 0;
      shape.push_back(is_attribute ? static_cast<int64_t>(node.values[place.attribute].number)
                                   : inputs[place.input][place.axis]);
    }
    shapes_.push_back(shape);
  }
  for (int32_t i = 0; i < op.num_inputs + op.num_outputs; ++i) {
    const Port& port = i < op.num_inputs ? op.inputs[i] : op.outputs[i - op.num_inputs];
    tensors_.push_back({nullptr, shapes_[i].data(), port.rank, port_dtype(port, node.dtype)});
  }
  finish(node);
}

Call::Call(const Node& node, const nvinfer1::PluginTensorDesc* inputs, const void* const* input_data,
           const nvinfer1::PluginTensorDesc* outputs, void* const* output_data) {
  const int32_t num_inputs = node.op->num_inputs, count = num_inputs + node.op->num_outputs;
  shapes_.reserve(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    const nvinfer1::PluginTensorDesc& desc = i < num_inputs ? inputs[i] : outputs[i - num_inputs];
    const int32_t rank = std::max(0, std::min<int32_t>(desc.dims.nbDims, nvinfer1::Dims::MAX_DIMS));
    shapes_.emplace_back(desc.dims.d, desc.dims.d + rank);
    // The C interface takes one type for inputs and outputs; it writes to outputs only.
    void* data = i < num_inputs ? const_cast<void*>(input_data[i]) : output_data[i - num_inputs];
    tensors_.push_back({data, shapes_.back().data(), rank, dtype_of(desc.type)});
  }
  finish(node);
}

void Call::finish(const Node& node) {
  const Op& op = *node.op;
  for (int32_t i = 0; i < op.num_attributes; ++i) {
    const bool is_text = op.attributes[i].kind == AttributeKind::kString;
    attributes_.push_back({op.attributes[i].name, node.values[i].number, is_text ? node.values[i].text.c_str() : nullptr});
  }
  call_ = {sizeof(bilevel_call), op.name, op.num_inputs, tensors_.data(), op.num_outputs, tensors_.data() + op.num_inputs,
           op.num_attributes, attributes_.data()};
}

size_t Call::workspace_size() const {
  size_t bytes = 0;
  if (bilevel_workspace_size(&call_, 0, &bytes) != BILEVEL_OK) throw Refusal{bilevel_last_error()};
  return bytes;
}

}  // namespace bilevel
