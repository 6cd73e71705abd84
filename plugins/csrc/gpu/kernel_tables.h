// What a kernel library holds: tables that plugins/library/source.py writes (in C++) and kernel_library.cpp reads.
//
// They say in C++ what plugins/launch/launches.py says in Python: a variant (an operator in one geometry and data type) has,
// for each architecture, plans; a plan has buffers in the workspace and launches; sizes are functions of a call's sizes.
#ifndef BILEVEL_KERNEL_TABLES_H
#define BILEVEL_KERNEL_TABLES_H

#include <cstdint>
#include <limits>

namespace bilevel {

// A whole number that stops at the ends of int64 instead of overflowing.
struct Number {
  int64_t value;
  constexpr Number(int64_t n) : value(n) {}
};

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();

inline Number operator+(Number a, Number b) {
  int64_t sum;
  return __builtin_add_overflow(a.value, b.value, &sum) ? Number(a.value > 0 ? kMost : kLeast) : Number(sum);
}
inline Number operator-(Number a, Number b) {
  int64_t difference;
  return __builtin_sub_overflow(a.value, b.value, &difference) ? Number(a.value > 0 ? kMost : kLeast) : Number(difference);
}
inline Number operator*(Number a, Number b) {
  int64_t product;
  const bool overflow = __builtin_mul_overflow(a.value, b.value, &product);
  return overflow ? Number((a.value > 0) == (b.value > 0) ? kMost : kLeast) : Number(product);
}
inline Number operator<=(Number a, Number b) { return a.value <= b.value; }
inline Number min(Number a, Number b) { return a.value < b.value ? a : b; }
inline Number max(Number a, Number b) { return a.value > b.value ? a : b; }
// b is positive in every expression.
inline Number floor_div(Number a, Number b) { return a.value / b.value - (a.value % b.value < 0); }
inline Number ceil_div(Number a, Number b) { return a.value / b.value + (a.value % b.value > 0); }

// The sizes that belong to a call (plans.RUNTIME_SIZES).
struct Sizes {
  int64_t B = 0, L = 0, U = 0, M = 0, T = 0;
};

using Expression = Number (*)(const Sizes&);

// One kernel's machine code. arch: as in 87. cuda: the version of the assembler, as in 12060; a driver of that or a later major
// version loads it. scratch: null pointers that follow the arguments.
struct Kernel {
  const char* symbol;
  const unsigned char* image;
  int32_t arch, cuda, threads, shared, scratch;
};

enum class ArgumentKind { kPointer, kInt32, kFloat32 };

// index, of a pointer: into the call's inputs, then its outputs, then the plan's buffers; of a float32: into the attributes of
// the operator in contract.h. expression: the value of an int32.
struct Argument {
  ArgumentKind kind;
  int32_t index;
  Expression expression;
};

struct Launch {
  int32_t kernel;  // into kKernels
  int32_t num_arguments;
  const Argument* arguments;
  Expression grid[3];
};

// when: null where the plan serves any call that the plans before it do not. buffers: bytes of each.
struct Plan {
  const char* name;
  Expression when;
  int32_t num_buffers;
  const Expression* buffers;
  int32_t num_launches;
  const Launch* launches;
};

// Every architecture that there are plans for. is_built: the library holds its kernels; else the plans only say what workspace
// they would take, so that an engine's workspace does not depend on which architectures a library was built for.
struct ArchitecturePlans {
  int32_t arch;
  bool is_built;
  int32_t num_plans;
  const Plan* plans;
};

// A size or an attribute that was fixed when the kernels were compiled; text: of an attribute of kind string, else null.
struct Fixed {
  const char* name;
  int64_t number;
  const char* text;
};

// op: into kOps of contract.h. dtype: a bilevel_dtype.
struct Variant {
  int32_t op, dtype;
  int32_t num_fixed;
  const Fixed* fixed;
  int32_t num_architectures;
  const ArchitecturePlans* architectures;
};

extern const Kernel kKernels[];
extern const Variant kVariants[];
extern const int32_t kNumKernels, kNumVariants;
extern const char kInfo[];

}  // namespace bilevel
#endif
