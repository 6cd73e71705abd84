/* A CUDA driver that has no GPU: it answers as a test tells it to and hands every launch to a callback. */
#include <stdlib.h>
#include <string.h>

typedef int (*launch_t)(const void* image, const char* symbol, const unsigned* grid, unsigned threads, unsigned shared,
                        void* stream, void** parameters);

static int version = 13000, capability = 80, context = 1, refused_load = 0;
static int loads = 0, shared_requests = 0, launches = 0, copies = 0;
static int capturing = 0, most_shared = 1 << 20;
static launch_t on_launch = 0;
static const int refused_in_capture = 900; /* CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED */

typedef struct {
  const void* image;
  char symbol[128];
  int is_loaded;
} kernel_t;

void fake_configure(int v, int c, int has_context, int load_result, launch_t callback) {
  version = v, capability = c, context = has_context, refused_load = load_result, on_launch = callback;
  loads = shared_requests = launches = copies = capturing = 0, most_shared = 1 << 20;
}
/* Code that is not loaded yet cannot be while a stream is captured. */
void fake_capture(int is_on) { capturing = is_on; }
void fake_most_shared(int bytes) { most_shared = bytes; }
int fake_loads(void) { return loads; }
int fake_shared_requests(void) { return shared_requests; }
int fake_launches(void) { return launches; }
int fake_copies(void) { return copies; }

int cuInit(unsigned flags) { return flags ? 1 : refused_load; }
int cuDeviceGetCount(int* count) { return *count = context, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  strncpy(name, "Fake Orin", (size_t)size);
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  (void)device;
  *bytes = (size_t)8 << 30;
  return 0;
}
int cuDriverGetVersion(int* out) { return *out = version, 0; }
int cuGetErrorString(int result, const char** text) { return *text = result == 2 ? "out of memory" : "some error", 0; }
int cuCtxGetDevice(int* device) { return *device = 0, context ? 0 : 201; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  if (attribute == 97) return *value = most_shared, 0;
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : capability == 87; /* 18: integrated */
  return attribute == 75 || attribute == 76 || attribute == 18 ? 0 : 1;
}
int cuLibraryLoadData(void** library, const void* image, int* o, void** v, unsigned n, int* lo, void** lv, unsigned ln) {
  (void)o, (void)v, (void)n, (void)lo, (void)lv, (void)ln;
  if (refused_load || capturing) return refused_load ? refused_load : refused_in_capture;
  ++loads;
  *library = (void*)image;
  return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  kernel_t* made = calloc(1, sizeof *made);
  made->image = library;
  strncpy(made->symbol, name, sizeof made->symbol - 1);
  *kernel = made;
  return 0;
}
/* Lazy: code comes to the GPU with cuFuncLoad or with the first launch. */
static int bring(kernel_t* kernel) {
  if (!kernel->is_loaded && capturing) return refused_in_capture;
  return kernel->is_loaded = 1, 0;
}
int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, 0; }
int cuFuncLoad(void* function) { return bring(function); }
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  (void)value, (void)kernel, (void)device;
  ++shared_requests;
  return attribute == 8 ? 0 : 1;
}
int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  (void)by, (void)bz, (void)extra;
  const unsigned grid[3] = {gx, gy, gz};
  kernel_t* made = kernel;
  const int refusal = bring(made);
  if (refusal) return refusal;
  ++launches;
  return on_launch ? on_launch(made->image, made->symbol, grid, bx, shared, stream, parameters) : 0;
}
int cuMemcpyDtoDAsync_v2(size_t target, size_t source, size_t bytes, void* stream) {
  (void)stream;
  ++copies;
  memcpy((void*)target, (const void*)source, bytes);
  return 0;
}
