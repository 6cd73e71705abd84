#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

namespace bilevel {
namespace {

constexpr int kOldest = 12000;  // CUDA 12.0 brought context-independent modules (cuLibraryLoadData)

template <typename Function>
bool find(void* library, const char* name, Function*& function, std::string& problem) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    problem = std::string("the CUDA driver has no function ") + name + "; install a driver for CUDA 12.0 or newer";
  }
  return function != nullptr;
}

bool open(CudaDriver& driver, std::string& problem) {
  const char* named = std::getenv("BILEVEL_CUDA_DRIVER");
  const std::string file = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    problem = "the CUDA driver " + file + " cannot be opened; install NVIDIA's driver, or run on a machine that has one";
    return false;
  }
  if (!find(library, "cuDriverGetVersion", driver.cuDriverGetVersion, problem)) return false;
  if (driver.cuDriverGetVersion(&driver.version) != 0) driver.version = 0;
  if (driver.version < kOldest) {
    problem = "the CUDA driver is for CUDA " + std::to_string(driver.version / 1000) + "." +
              std::to_string(driver.version % 1000 / 10) + ", the kernels need 12.0; install a newer driver";
    return false;
  }
  driver.cuFuncLoad = reinterpret_cast<decltype(driver.cuFuncLoad)>(dlsym(library, "cuFuncLoad"));
  return find(library, "cuGetErrorString", driver.cuGetErrorString, problem) &&
         find(library, "cuCtxGetDevice", driver.cuCtxGetDevice, problem) &&
         find(library, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute, problem) &&
         find(library, "cuLibraryLoadData", driver.cuLibraryLoadData, problem) &&
         find(library, "cuLibraryGetKernel", driver.cuLibraryGetKernel, problem) &&
         find(library, "cuKernelGetFunction", driver.cuKernelGetFunction, problem) &&
         find(library, "cuKernelSetAttribute", driver.cuKernelSetAttribute, problem) &&
         find(library, "cuLaunchKernel", driver.cuLaunchKernel, problem) &&
         find(library, "cuMemcpyDtoDAsync_v2", driver.cuMemcpyDtoDAsync, problem);
}

}  // namespace

const CudaDriver* cuda_driver(std::string& problem) {
  static std::mutex mutex;
  static CudaDriver driver;
  static bool opened = false;
  const std::lock_guard<std::mutex> lock(mutex);
  opened = opened || open(driver, problem);
  return opened ? &driver : nullptr;
}

std::string cuda_error_text(const CudaDriver& driver, CuResult result) {
  const char* text = nullptr;
  if (driver.cuGetErrorString(result, &text) != 0 || text == nullptr) text = "unknown error";
  return std::string(text) + " (CUDA error " + std::to_string(result) + ")";
}

}  // namespace bilevel
