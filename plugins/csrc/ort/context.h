// What the kernels of library.cpp need of ONNX Runtime: tensors, threads, and errors as exceptions.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "abi.h"

namespace ort {

struct Failure : std::exception {
  explicit Failure(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

inline void require(bool condition, const char* sentence) {
  if (!condition) throw Failure(sentence);
}

inline void check(const Api& api, Status* status) {
  if (!status) return;
  const std::string message = api.call<const char*>(kGetErrorMessage, const_cast<const Status*>(status));
  api.call<void>(kReleaseStatus, status);
  throw Failure("ONNX Runtime refused a call of the bilevel library: " + message);
}

// A function run by ONNX Runtime's threads, through which no exception may pass: the first one is kept for the caller.
struct Guarded {
  void (*function)(void*, size_t);
  void* data;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error = nullptr;

  static void run(void* self, size_t i) {
    auto* guarded = static_cast<Guarded*>(self);
    try {
      guarded->function(guarded->data, i);
    } catch (...) {
      if (!guarded->failed.test_and_set()) guarded->error = std::current_exception();
    }
  }
};

// One call's tensors and threads.
class Context {
 public:
  Context(const Api& api, KernelContext* context) : api_(api), context_(context) {}

  template <typename Element>
  const Element* input(size_t index, std::vector<int64_t>& shape) const {
    const Value* value = nullptr;
    check(api_, api_.call(kKernelContextGetInput, const_cast<const KernelContext*>(context_), index, &value));
    shape = shape_of(value);
    void* data = nullptr;
    check(api_, api_.call(kGetTensorMutableData, const_cast<Value*>(value), &data));
    return static_cast<const Element*>(data);
  }

  template <typename Element>
  Element* output(size_t index, const std::vector<int64_t>& shape) const {
    Value* value = nullptr;
    check(api_, api_.call(kKernelContextGetOutput, context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api_, api_.call(kGetTensorMutableData, value, &data));
    return static_cast<Element*>(data);
  }

  // ONNX Runtime's own threads.
  bilevel::Parallel parallel() {
    return {[](void* self, void (*function)(void*, size_t), size_t total, void* data) {
              auto* context = static_cast<Context*>(self);
              if (total == 0) return;
              if (total == 1) return function(data, 0);
              Guarded guarded{function, data};
              check(context->api_, context->api_.call(kKernelContextParallelFor, const_cast<const KernelContext*>(context->context_),
                                                      &Guarded::run, total, size_t{0}, static_cast<void*>(&guarded)));
              if (guarded.error) std::rethrow_exception(guarded.error);
            },
            this};
  }

 private:
  std::vector<int64_t> shape_of(const Value* value) const {
    TensorInfo* owned = nullptr;
    check(api_, api_.call(kGetTensorTypeAndShape, value, &owned));
    const auto release = [this](TensorInfo* info) { api_.call<void>(kReleaseTensorInfo, info); };
    const std::unique_ptr<TensorInfo, decltype(release)> info(owned, release);
    size_t rank = 0;
    check(api_, api_.call(kGetDimensionsCount, const_cast<const TensorInfo*>(info.get()), &rank));
    std::vector<int64_t> shape(rank);
    check(api_, api_.call(kGetDimensions, const_cast<const TensorInfo*>(info.get()), shape.data(), rank));
    return shape;
  }

  const Api& api_;
  KernelContext* context_;
};

}  // namespace ort
