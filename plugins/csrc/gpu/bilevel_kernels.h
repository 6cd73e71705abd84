/* The routing operators as GPU kernels: the C interface of the library that `bilevel kernels build` makes.
 *
 * The library holds machine code for the geometries, data types and architectures that it was built for. It opens the CUDA
 * driver (libcuda.so.1, or the file that BILEVEL_CUDA_DRIVER names) when the first function asks for a GPU, so it loads on a
 * machine without one. It needs no CUDA runtime, allocates no device memory, never synchronises, and keeps no state but the
 * loaded modules. Every function may be called from any thread.
 *
 *   bilevel_tensor inputs[] = {{q, q_dims, 4, BILEVEL_FLOAT16}, ...};            (the order of bilevel/contract.py)
 *   bilevel_call call = {sizeof(call), "RoutedAttention", 6, inputs, 1, &output, 3, attributes};
 *   size_t bytes;
 *   if (bilevel_workspace_size(&call, 0, &bytes)) puts(bilevel_last_error());    (then allocate them on the device)
 *   if (bilevel_launch(&call, workspace, bytes, stream)) puts(bilevel_last_error());
 *
 * A function that returns int32_t returns a bilevel_status. When that is not BILEVEL_OK nothing was launched, except after
 * BILEVEL_CUDA_ERROR, and bilevel_last_error() says in one sentence what is wrong and what mends it.
 */
#ifndef BILEVEL_KERNELS_H
#define BILEVEL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BILEVEL_KERNELS_ABI 1
#define BILEVEL_EXPORT __attribute__((visibility("default")))

typedef enum {
  BILEVEL_OK = 0,
  BILEVEL_BAD_ARGUMENT = 1,        /* a pointer, shape, data type or attribute breaks the contract */
  BILEVEL_NOT_BUILT = 2,           /* the library holds no kernels for this geometry and data type */
  BILEVEL_NO_DRIVER = 3,           /* the CUDA driver is absent, too old, or lacks a symbol */
  BILEVEL_NO_ARCHITECTURE = 4,     /* the library holds no kernels for this GPU */
  BILEVEL_WORKSPACE_TOO_SMALL = 5, /* or it is not aligned */
  BILEVEL_CUDA_ERROR = 6,          /* the driver refused a call */
  BILEVEL_OUT_OF_MEMORY = 7        /* of the host */
} bilevel_status;

typedef enum { BILEVEL_FLOAT16 = 1, BILEVEL_BFLOAT16 = 2, BILEVEL_FLOAT32 = 3, BILEVEL_INT32 = 4 } bilevel_dtype;

/* A contiguous tensor. data: a device address, a multiple of 16 (NULL where only shapes are asked for, or where it has no
 * elements). dims: `rank` sizes, outermost first. dtype: a bilevel_dtype. */
typedef struct {
  void* data;
  const int64_t* dims;
  int32_t rank;
  int32_t dtype;
} bilevel_tensor;

/* An attribute of an operator: `number` for those of kind int and float, `text` for those of kind string (else NULL). */
typedef struct {
  const char* name;
  double number;
  const char* text;
} bilevel_attribute;

/* One call of an operator of the contract: its inputs, its outputs, and every one of its attributes, these in any order.
 * size: sizeof(bilevel_call). */
typedef struct {
  size_t size;
  const char* op;
  int32_t num_inputs;
  const bilevel_tensor* inputs;
  int32_t num_outputs;
  const bilevel_tensor* outputs;
  int32_t num_attributes;
  const bilevel_attribute* attributes;
} bilevel_call;

/* BILEVEL_KERNELS_ABI of the library. */
BILEVEL_EXPORT int32_t bilevel_abi_version(void);

/* What the library was built for: JSON text that lives as long as the library (plugins/library/gpu.py documents it). */
BILEVEL_EXPORT const char* bilevel_library_info(void);

/* What a status means, in a few words. */
BILEVEL_EXPORT const char* bilevel_status_text(int32_t status);

/* One sentence on the last failure in this thread, "" before the first; valid until the thread's next failure. */
BILEVEL_EXPORT const char* bilevel_last_error(void);

/* How many calls of an operator in place (WriteCache) had their output elsewhere and began by copying the whole of their input,
 * since the library was loaded. Right results, but each costs the cache's size: a runtime that shares the address has none. */
BILEVEL_EXPORT uint64_t bilevel_num_copies(void);

/* *bytes: the workspace, aligned to 256 bytes, that suffices for this call and for every call whose sizes B, L, U, M, T are not
 * larger. arch: a compute capability as in 87; 0: the most that any architecture needs, whichever the library was built for, so
 * that an engine built with one library has room for another's kernels. Asks no GPU. */
BILEVEL_EXPORT int32_t bilevel_workspace_size(const bilevel_call* call, int32_t arch, size_t* bytes);

/* Load the modules that calls of this geometry need, for the GPU of the calling thread's current context, so that a later
 * bilevel_launch may be captured into a CUDA graph. Sizes B, L, U, M, T do not matter. */
BILEVEL_EXPORT int32_t bilevel_prepare(const bilevel_call* call);

/* Enqueue the operator on `stream`, a CUstream or cudaStream_t of the calling thread's current context. */
BILEVEL_EXPORT int32_t bilevel_launch(const bilevel_call* call, void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
