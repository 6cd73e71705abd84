// The few functions of the CUDA driver that launch a kernel, looked up in libcuda.so.1 (or the file that
// BILEVEL_CUDA_DRIVER names) when the first of them is wanted.
#ifndef BILEVEL_CUDA_DRIVER_H
#define BILEVEL_CUDA_DRIVER_H

#include <cstddef>
#include <cstdint>
#include <string>

namespace bilevel {

using CuResult = int;  // 0: success
using CuDevice = int;
using CuLibrary = struct CuLibraryHandle*;
using CuKernel = struct CuKernelHandle*;  // also passed where the driver takes a CUfunction (CUDA 12.0)
using CuFunction = struct CuFunctionHandle*;
using CuStream = struct CuStreamHandle*;

// Attributes of the driver's API, with its numbers.
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CUdevice_attribute
constexpr int kMostSharedBytes = 97;                                       // of a block that asks for it
constexpr int kMaxDynamicSharedBytes = 8;                                  // CUfunction_attribute

struct CudaDriver {
  CuResult (*cuDriverGetVersion)(int* version);
  CuResult (*cuGetErrorString)(CuResult result, const char** text);
  CuResult (*cuCtxGetDevice)(CuDevice* device);
  CuResult (*cuDeviceGetAttribute)(int* value, int attribute, CuDevice device);
  CuResult (*cuLibraryLoadData)(CuLibrary* library, const void* image, int* jit_options, void** jit_values, unsigned num_jit,
                                int* library_options, void** library_values, unsigned num_library);
  CuResult (*cuLibraryGetKernel)(CuKernel* kernel, CuLibrary library, const char* name);
  CuResult (*cuKernelGetFunction)(CuFunction* function, CuKernel kernel);
  CuResult (*cuFuncLoad)(CuFunction function);  // CUDA 12.4; null before
  CuResult (*cuKernelSetAttribute)(int attribute, int value, CuKernel kernel, CuDevice device);
  CuResult (*cuLaunchKernel)(CuKernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, CuStream stream, void** parameters,
                             void** extra);
  CuResult (*cuMemcpyDtoDAsync)(uintptr_t target, uintptr_t source, size_t bytes, CuStream stream);
  int version;  // the newest CUDA that the driver knows, as in 12060
};

// The driver, or null and one sentence in `problem`. A driver that was not there is looked for again the next time.
const CudaDriver* cuda_driver(std::string& problem);

// "out of memory (CUDA error 2)".
std::string cuda_error_text(const CudaDriver& driver, CuResult result);

}  // namespace bilevel
#endif
