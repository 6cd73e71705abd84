// What a TensorRT plugin says when something is wrong: to TensorRT's logger where it has given us one, else to stderr.
#ifndef BILEVEL_TENSORRT_LOG_H
#define BILEVEL_TENSORRT_LOG_H

#include <exception>
#include <string>
#include <utility>

#include "NvInferRuntime.h"

namespace bilevel {

// Why a plugin refuses what it was given; caught where TensorRT's interface ends.
struct Refusal {
  std::string sentence;
};

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// "bilevel.<op> <what>: <sentence>"
void write_log(nvinfer1::ILogger::Severity severity, const char* op, const char* what, const char* sentence) noexcept;

// `work()`, or `failed` and a line in the log: TensorRT's methods must not throw.
template <typename Result, typename Work>
Result guarded(const char* op, const char* what, Result failed, Work work) noexcept {
  try {
    return work();
  } catch (const Refusal& refusal) {
    write_log(nvinfer1::ILogger::Severity::kERROR, op, what, refusal.sentence.c_str());
  } catch (const std::exception& error) {
    write_log(nvinfer1::ILogger::Severity::kERROR, op, what, error.what());
  } catch (...) {
    write_log(nvinfer1::ILogger::Severity::kERROR, op, what, "an unknown exception");
  }
  return failed;
}

}  // namespace bilevel
#endif
