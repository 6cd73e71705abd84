// A call of the C interface, checked against the contract, and the tables that serve it.
#ifndef BILEVEL_KERNEL_CALLS_H
#define BILEVEL_KERNEL_CALLS_H

#include <string>
#include <utility>
#include <vector>

#include "bilevel_kernels.h"
#include "contract.h"
#include "kernel_tables.h"

namespace bilevel {

// Why a function of the C interface fails; caught where the interface ends.
struct Failure {
  bilevel_status status;
  std::string sentence;
};

// A call that keeps the contract. geometry: its sizes and attributes but those of Sizes. scale and the like: attributes of kind
// float, by the operator's order. tensors: inputs, then outputs.
struct CheckedCall {
  const Op* op = nullptr;
  int32_t op_index = 0;
  int32_t dtype = 0;
  Sizes sizes;
  std::vector<Fixed> geometry;
  std::vector<float> floats;
  std::vector<void*> tensors;
  bool is_empty = false;    // no output has an element
  size_t output_bytes = 0;  // of the first output
};

// with_data: addresses are checked too. Throws Failure.
CheckedCall check_call(const bilevel_call* call, bool with_data);

// The library's kernels for the call. Throws Failure.
const Variant& find_variant(const CheckedCall& call);

// The first plan that serves calls of these sizes.
const Plan& choose_plan(const ArchitecturePlans& plans, const Sizes& sizes);

// Where each buffer begins in the workspace, and behind them the workspace's bytes; saturated, not overflowed.
std::vector<int64_t> place_buffers(const Plan& plan, const Sizes& sizes);

// Bytes that suffice for every call of `plans` whose sizes are not larger.
int64_t workspace_limit(const ArchitecturePlans& plans, const Sizes& most);

}  // namespace bilevel
#endif
