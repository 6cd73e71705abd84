#include "kernel_calls.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bilevel {
namespace {

constexpr int64_t kAlignment = 256;  // of buffers in the workspace: launches.ALIGNMENT
constexpr uintptr_t kTensorAlignment = 16;
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int32_t kMostNamed = 64;  // characters of a caller's text that an error repeats

struct Symbol {
  const char* name;
  int64_t size;
};

[[noreturn]] void refuse(const std::string& sentence) { throw Failure{BILEVEL_BAD_ARGUMENT, sentence}; }

bool same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

std::string quoted(const char* text) { return "\"" + std::string(text, strnlen(text, kMostNamed)) + "\""; }

const char* dtype_name(int32_t dtype) {
  constexpr const char* names[] = {"?", "float16", "bfloat16", "float32", "int32"};
  return dtype >= BILEVEL_FLOAT16 && dtype <= BILEVEL_INT32 ? names[dtype] : "unknown";
}

int64_t* runtime_size(Sizes& sizes, const char* symbol) {
  if (symbol[1] != '\0') return nullptr;
  switch (symbol[0]) {
    case 'B': return &sizes.B;
    case 'L': return &sizes.L;
    case 'U': return &sizes.U;
    case 'M': return &sizes.M;
    case 'T': return &sizes.T;
    default: return nullptr;
  }
}

const Op& find_op(const char* name) {
  for (const Op& op : kOps) {
    if (same(op.name, name)) return op;
  }
  std::string known;
  for (const Op& op : kOps) known += (known.empty() ? "" : ", ") + std::string(op.name);
  refuse("there is no operator " + quoted(name) + "; the operators are " + known);
}

void check_text(const Op& op, const Attribute& attribute, const char* text) {
  if (text == nullptr) refuse(std::string(op.name) + ": the attribute " + attribute.name + " takes a text, not NULL");
  std::string allowed;
  for (const char* choice : attribute.choices) {
    if (choice == nullptr) break;
    if (same(choice, text)) return;
    allowed += (allowed.empty() ? "" : ", ") + std::string(choice);
  }
  refuse(std::string(op.name) + ": the attribute " + attribute.name + "=" + quoted(text) + " must be one of " + allowed);
}

void check_int(const Op& op, const Attribute& attribute, double number) {
  // A NaN fails every comparison.
  const auto low = static_cast<double>(attribute.minimum), high = static_cast<double>(attribute.maximum);
  if (number >= low && number <= high && std::floor(number) == number) return;
  refuse(std::string(op.name) + ": the attribute " + attribute.name + "=" + std::to_string(number) +
         " must be a whole number from " + std::to_string(attribute.minimum) + " to " + std::to_string(attribute.maximum));
}

const bilevel_attribute& find_attribute(const bilevel_call& call, const Op& op, const Attribute& attribute) {
  const bilevel_attribute* found = nullptr;
  for (int32_t i = 0; i < call.num_attributes; ++i) {
    if (call.attributes[i].name == nullptr) refuse(std::string(op.name) + ": the name of an attribute is NULL");
    if (!same(call.attributes[i].name, attribute.name)) continue;
    if (found != nullptr) refuse(std::string(op.name) + ": the attribute " + attribute.name + " is given twice");
    found = &call.attributes[i];
  }
  if (found == nullptr) refuse(std::string(op.name) + " needs the attribute " + attribute.name);
  return *found;
}

// Fills geometry and floats.
void check_attributes(const bilevel_call& call, CheckedCall& checked) {
  const Op& op = *checked.op;
  if (call.num_attributes != op.num_attributes) {
    refuse(std::string(op.name) + " takes " + std::to_string(op.num_attributes) + " attributes, not " +
           std::to_string(call.num_attributes));
  }
  if (call.num_attributes > 0 && call.attributes == nullptr) refuse(std::string(op.name) + ": the attributes are NULL");
  checked.floats.assign(op.num_attributes, 0.0f);
  for (int32_t i = 0; i < op.num_attributes; ++i) {
    const Attribute& attribute = op.attributes[i];
    const bilevel_attribute& given = find_attribute(call, op, attribute);
    switch (attribute.kind) {
      case AttributeKind::kString:
        check_text(op, attribute, given.text);
        checked.geometry.push_back({attribute.name, 0, given.text});
        break;
      case AttributeKind::kInt:
        check_int(op, attribute, given.number);
        checked.geometry.push_back({attribute.name, static_cast<int64_t>(given.number), nullptr});
        break;
      case AttributeKind::kFloat:
        if (!std::isfinite(given.number)) {
          refuse(std::string(op.name) + ": the attribute " + attribute.name + " must be finite");
        }
        checked.floats[i] = static_cast<float>(given.number);
        break;
    }
  }
}

int64_t attribute_value(const CheckedCall& checked, const char* name) {
  for (const Fixed& fixed : checked.geometry) {
    if (same(fixed.name, name)) return fixed.number;
  }
  return 0;  // sized_by names an attribute of kind int: a test of the contract sees to it
}

void check_size(const Op& op, const Port& port, const Dim& dim, int64_t size, std::vector<Symbol>& symbols) {
  const std::string where = std::string(op.name) + ": " + port.name + " has " + dim.symbol + "=";
  if (size < 0 || size > kInt32Max) refuse(where + std::to_string(size) + ", sizes are from 0 to 2147483647");
  if (size % dim.factor != 0) {
    refuse(where + std::to_string(size) + "/" + std::to_string(dim.factor) + ", which is no whole number");
  }
  size /= dim.factor;
  for (const Symbol& symbol : symbols) {
    if (!same(symbol.name, dim.symbol)) continue;
    if (symbol.size == size) return;
    refuse(where + std::to_string(size) + ", elsewhere it is " + std::to_string(symbol.size));
  }
  symbols.push_back({dim.symbol, size});
}

void check_dtype(const Op& op, const Port& port, int32_t given, CheckedCall& checked) {
  const bool is_float = given == BILEVEL_FLOAT16 || given == BILEVEL_BFLOAT16 || given == BILEVEL_FLOAT32;
  const std::string where = std::string(op.name) + ": " + port.name + " is " + dtype_name(given);
  if (port.type == PortType::kModelFloat) {
    if (!is_float) refuse(where + ", it must be float16, bfloat16 or float32");
    if (checked.dtype != 0 && checked.dtype != given) refuse(where + ", an earlier tensor is " + dtype_name(checked.dtype));
    checked.dtype = given;
  } else if (given != (port.type == PortType::kInt32 ? BILEVEL_INT32 : BILEVEL_FLOAT32)) {
    refuse(where + ", it must be " + (port.type == PortType::kInt32 ? "int32" : "float32"));
  }
}

void check_address(const Op& op, const Port& port, const bilevel_tensor& tensor) {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.rank; ++d) count = (Number(count) * Number(tensor.dims[d])).value;
  if (count == 0) return;
  const std::string where = std::string(op.name) + ": the address of " + port.name;
  if (count > kMost / 4) refuse(where + " cannot be right, no memory holds so many elements");
  if (tensor.data == nullptr) refuse(where + " is NULL");
  if (reinterpret_cast<uintptr_t>(tensor.data) % kTensorAlignment != 0) refuse(where + " must be a multiple of 16");
}

void check_tensor(const Op& op, const Port& port, const bilevel_tensor& tensor, bool with_data, CheckedCall& checked,
                  std::vector<Symbol>& symbols) {
  if (tensor.rank != port.rank || tensor.dims == nullptr) {
    refuse(std::string(op.name) + ": " + port.name + " must have " + std::to_string(port.rank) + " dimensions, not " +
           std::to_string(tensor.dims == nullptr ? 0 : tensor.rank));
  }
  check_dtype(op, port, tensor.dtype, checked);
  for (int32_t d = 0; d < port.rank; ++d) check_size(op, port, port.dims[d], tensor.dims[d], symbols);
  if (with_data) check_address(op, port, tensor);
  checked.tensors.push_back(tensor.data);
}

void check_count(const Op& op, const char* what, int32_t given, int32_t expected, const bilevel_tensor* tensors) {
  if (given != expected || tensors == nullptr) {
    refuse(std::string(op.name) + " takes " + std::to_string(expected) + " " + what + ", not " +
           std::to_string(tensors == nullptr ? 0 : given));
  }
}

std::string describe(const CheckedCall& call) {
  std::string text = std::string(call.op->name) + " in " + dtype_name(call.dtype) + " with";
  for (const Fixed& fixed : call.geometry) {
    text += std::string(" ") + fixed.name + "=" + (fixed.text == nullptr ? std::to_string(fixed.number) : fixed.text);
  }
  return text;
}

bool matches(const Variant& variant, const CheckedCall& call) {
  if (variant.op != call.op_index || variant.dtype != call.dtype) return false;
  for (int32_t i = 0; i < variant.num_fixed; ++i) {
    const Fixed& wanted = variant.fixed[i];
    const bool found = std::any_of(call.geometry.begin(), call.geometry.end(), [&](const Fixed& fixed) {
      if (!same(fixed.name, wanted.name)) return false;
      return wanted.text == nullptr ? fixed.number == wanted.number : fixed.text != nullptr && same(fixed.text, wanted.text);
    });
    if (!found) return false;
  }
  return true;
}

}  // namespace

CheckedCall check_call(const bilevel_call* call, bool with_data) {
  if (call == nullptr) refuse("the call is NULL");
  if (call->size != sizeof(bilevel_call)) {
    refuse("the call says size=" + std::to_string(call->size) + ", this library's bilevel_call has " +
           std::to_string(sizeof(bilevel_call)) + " bytes; compile with the bilevel_kernels.h of the library");
  }
  if (call->op == nullptr) refuse("the operator's name is NULL");
  CheckedCall checked;
  checked.op = &find_op(call->op);
  checked.op_index = static_cast<int32_t>(checked.op - kOps);
  const Op& op = *checked.op;
  check_count(op, "inputs", call->num_inputs, op.num_inputs, call->inputs);
  check_count(op, "outputs", call->num_outputs, op.num_outputs, call->outputs);
  check_attributes(*call, checked);
  std::vector<Symbol> symbols;
  for (int32_t i = 0; i < op.num_inputs; ++i) {
    check_tensor(op, op.inputs[i], call->inputs[i], with_data, checked, symbols);
  }
  for (int32_t i = 0; i < op.num_outputs; ++i) {
    for (int32_t d = 0; d < op.outputs[i].rank; ++d) {
      const Dim& dim = op.outputs[i].dims[d];
      if (i == 0 && dim.sized_by != nullptr) symbols.push_back({dim.symbol, attribute_value(checked, dim.sized_by)});
    }
    check_tensor(op, op.outputs[i], call->outputs[i], with_data, checked, symbols);
  }
  if (checked.dtype == 0) checked.dtype = BILEVEL_FLOAT32;  // an operator without a tensor of the model's float type
  for (const Symbol& symbol : symbols) {
    if (int64_t* size = runtime_size(checked.sizes, symbol.name)) {
      *size = symbol.size;
    } else {
      checked.geometry.push_back({symbol.name, symbol.size, nullptr});
    }
  }
  const bilevel_tensor& first = call->outputs[0];
  checked.is_empty = std::any_of(first.dims, first.dims + first.rank, [](int64_t size) { return size == 0; });
  Number bytes = first.dtype == BILEVEL_FLOAT32 || first.dtype == BILEVEL_INT32 ? 4 : 2;
  for (int32_t d = 0; d < first.rank; ++d) bytes = bytes * Number(first.dims[d]);
  checked.output_bytes = static_cast<size_t>(bytes.value);
  return checked;
}

const Variant& find_variant(const CheckedCall& call) {
  for (int32_t i = 0; i < kNumVariants; ++i) {
    if (matches(kVariants[i], call)) return kVariants[i];
  }
  throw Failure{BILEVEL_NOT_BUILT, "this library holds no kernels for " + describe(call) +
                                       "; build one for the bundle: bilevel kernels build --geometry BUNDLE --arch sm_NN"};
}

const Plan& choose_plan(const ArchitecturePlans& plans, const Sizes& sizes) {
  for (int32_t i = 0; i + 1 < plans.num_plans; ++i) {
    if (plans.plans[i].when == nullptr || plans.plans[i].when(sizes).value != 0) return plans.plans[i];
  }
  return plans.plans[plans.num_plans - 1];
}

std::vector<int64_t> place_buffers(const Plan& plan, const Sizes& sizes) {
  std::vector<int64_t> places;
  Number end = 0;
  for (int32_t i = 0; i < plan.num_buffers; ++i) {
    places.push_back(end.value);
    end = end + ceil_div(plan.buffers[i](sizes), kAlignment) * kAlignment;
  }
  places.push_back(end.value);
  return places;
}

int64_t workspace_limit(const ArchitecturePlans& plans, const Sizes& most) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < plans.num_plans; ++i) {
    const Plan& plan = plans.plans[i];
    Sizes sizes = most;
    // Conditions are of the form "L, or T, is at most so much", and buffers grow with every size: the largest size counts.
    int64_t& size = most.T > 0 ? sizes.T : sizes.L;
    int64_t low = 0, high = size;
    while (plan.when != nullptr && low < high) {
      size = low + (high - low + 1) / 2;
      (plan.when(sizes).value != 0 ? low : high) = plan.when(sizes).value != 0 ? size : size - 1;
    }
    size = high;
    bytes = std::max(bytes, place_buffers(plan, sizes).back());
  }
  return bytes;
}

}  // namespace bilevel
