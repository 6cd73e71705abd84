#include "fields.h"

#include <cmath>
#include <cstring>

#include "../gpu/bilevel_kernels.h"
#include "log.h"

namespace bilevel {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kFormatVersion = 2;  // of plugins/tensorrt/fields.py
constexpr char kRemedy[] = "; build the engine anew: bilevel build BUNDLE";

[[noreturn]] void refuse(const std::string& sentence) { throw Refusal{sentence}; }

const char* type_name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kINT32: return "INT32";
    case PluginFieldType::kINT64: return "INT64";
    case PluginFieldType::kFLOAT32: return "FLOAT32";
    case PluginFieldType::kCHAR: return "CHAR";
    default: return "another type";
  }
}

// The only value of a field. TensorRT promises no alignment.
template <typename Number>
Number single(const PluginField& field) {
  Number value;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

void check_range(const Attribute& attribute, double value) {
  const std::string name = std::string("attribute ") + attribute.name + "=";
  if (attribute.kind == AttributeKind::kFloat) {
    if (!std::isfinite(value)) refuse(name + std::to_string(value) + " must be finite");
    if (attribute.has_minimum && value < static_cast<double>(attribute.minimum)) {
      refuse(name + std::to_string(value) + " must be a finite number of at least " + std::to_string(attribute.minimum));
    }
  } else if (value < static_cast<double>(attribute.minimum) || value > static_cast<double>(attribute.maximum)) {
    refuse(name + std::to_string(static_cast<int64_t>(value)) + " must lie between " + std::to_string(attribute.minimum) +
           " and " + std::to_string(attribute.maximum));
  }
}

void check_choice(const Attribute& attribute, const std::string& text) {
  std::string choices;
  for (const char* const* choice = attribute.choices; *choice != nullptr; ++choice) {
    if (text == *choice) return;
    choices += choices.empty() ? *choice : std::string(", ") + *choice;
  }
  if (!choices.empty()) refuse(std::string("attribute ") + attribute.name + "='" + text + "' must be one of " + choices);
}

Value read_value(const Attribute& attribute, const PluginField& field) {
  const PluginFieldType wanted = field_type(attribute.kind);
  const std::string name = std::string("attribute ") + attribute.name;
  if (field.type != wanted) refuse(name + " is of type " + type_name(field.type) + ", not " + type_name(wanted));
  Value value;
  if (attribute.kind == AttributeKind::kString) {
    const char* text = static_cast<const char*>(field.data);
    if (text != nullptr && field.length > 0) value.text.assign(text, strnlen(text, static_cast<size_t>(field.length)));
    check_choice(attribute, value.text);
    return value;
  }
  if (field.length != 1 || field.data == nullptr) refuse(name + " has " + std::to_string(field.length) + " values, not 1");
  value.number = attribute.kind == AttributeKind::kInt ? single<int32_t>(field) : static_cast<double>(single<float>(field));
  check_range(attribute, value.number);
  return value;
}

const PluginField* find(const nvinfer1::PluginFieldCollection& fields, const char* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
  }
  return nullptr;
}

const PluginField& need(const nvinfer1::PluginFieldCollection& fields, const char* name, PluginFieldType type) {
  const PluginField* field = find(fields, name);
  if (field == nullptr || field->type != type || field->length < 0 || (field->length > 0 && field->data == nullptr)) {
    refuse(std::string("the plan's field ") + name + " is missing or damaged" + kRemedy);
  }
  return *field;
}

void read_extra(Node& node, const nvinfer1::PluginFieldCollection& fields) {
  const PluginField& version = need(fields, "format_version", PluginFieldType::kINT32);
  if (version.length != 1 || single<int32_t>(version) < 1) {
    refuse(std::string("the plan's field format_version is damaged") + kRemedy);
  }
  // An engine's workspace was sized by the library that built it: that of another version may need more.
  if (single<int32_t>(version) != kFormatVersion) {
    refuse("the plan's fields have format version " + std::to_string(single<int32_t>(version)) + ", this library reads " +
           std::to_string(kFormatVersion) + "; build the engine anew with this bilevel: bilevel build BUNDLE");
  }
  const PluginField& dtype = need(fields, "dtype", PluginFieldType::kINT32);
  if (dtype.length == 1) node.dtype = single<int32_t>(dtype);
  if (dtype.length != 1 || node.dtype < 0 || node.dtype > BILEVEL_FLOAT32) {
    refuse(std::string("the plan's field dtype is damaged") + kRemedy);
  }
  const PluginField& dims = need(fields, "dims", PluginFieldType::kINT64);
  int32_t axes = 0;
  for (int32_t i = 0; i < node.op->num_inputs; ++i) axes += node.op->inputs[i].rank;
  node.dims.resize(static_cast<size_t>(dims.length));
  if (dims.length > 0) std::memcpy(node.dims.data(), dims.data, node.dims.size() * sizeof(int64_t));
  bool is_whole = dims.length == 0 || dims.length == axes;
  for (const int64_t size : node.dims) is_whole = is_whole && size >= 0;
  if (!is_whole) refuse(std::string("the plan's field dims is damaged") + kRemedy);
}

bool is_extra(const char* name) {
  return std::strcmp(name, "format_version") == 0 || std::strcmp(name, "dtype") == 0 || std::strcmp(name, "dims") == 0;
}

}  // namespace

PluginFieldType field_type(AttributeKind kind) {
  switch (kind) {
    case AttributeKind::kInt: return PluginFieldType::kINT32;
    case AttributeKind::kFloat: return PluginFieldType::kFLOAT32;
    default: return PluginFieldType::kCHAR;
  }
}

Node read_fields(const Op& op, const nvinfer1::PluginFieldCollection* fields, bool from_plan) {
  if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) refuse("there are no attributes");
  Node node;
  node.op = &op;
  if (from_plan) read_extra(node, *fields);
  for (int32_t i = 0; i < op.num_attributes; ++i) {
    const PluginField* field = find(*fields, op.attributes[i].name);
    const Attribute& attribute = op.attributes[i];
    if (field == nullptr && !attribute.has_standard) {
      refuse(std::string("the attribute ") + attribute.name + " is missing; export the model anew");
    }
    if (field != nullptr) {
      node.values.push_back(read_value(attribute, *field));
    } else {
      node.values.emplace_back();
      node.values.back().number = attribute.standard;
    }
  }
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const char* name = fields->fields[i].name == nullptr ? "" : fields->fields[i].name;
    bool is_known = from_plan && is_extra(name);
    for (int32_t j = 0; j < op.num_attributes; ++j) is_known = is_known || std::strcmp(op.attributes[j].name, name) == 0;
    if (!is_known) refuse(std::string("there is no attribute '") + name + "'");
  }
  return node;
}

PlanFields::PlanFields(const Node& node) : node_(node) {
  const Op& op = *node_.op;
  // Fields point into these, which must not move: no more room is ever needed.
  ints_.reserve(static_cast<size_t>(op.num_attributes) + 2);
  floats_.reserve(static_cast<size_t>(op.num_attributes));
  const auto add_int = [this](const char* name, int32_t value) {
    ints_.push_back(value);
    fields_.emplace_back(name, &ints_.back(), PluginFieldType::kINT32, 1);
  };
  add_int("format_version", kFormatVersion);
  for (int32_t i = 0; i < op.num_attributes; ++i) {
    const Value& value = node_.values[i];
    const char* name = op.attributes[i].name;
    switch (op.attributes[i].kind) {
      case AttributeKind::kInt: add_int(name, static_cast<int32_t>(value.number)); break;
      case AttributeKind::kFloat:
        floats_.push_back(static_cast<float>(value.number));
        fields_.emplace_back(name, &floats_.back(), PluginFieldType::kFLOAT32, 1);
        break;
      case AttributeKind::kString:
        fields_.emplace_back(name, value.text.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.text.size() + 1));
        break;
    }
  }
  add_int("dtype", node_.dtype);
  fields_.emplace_back("dims", node_.dims.data(), PluginFieldType::kINT64, static_cast<int32_t>(node_.dims.size()));
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

}  // namespace bilevel
