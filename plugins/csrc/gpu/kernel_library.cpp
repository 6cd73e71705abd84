// The C interface over the tables: checks a call, loads the machine code for the GPU at hand, launches it.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>

#include "cuda_driver.h"
#include "kernel_calls.h"

namespace bilevel {
namespace {

constexpr int64_t kMostGrid[3] = {2147483647, 65535, 65535};  // launches.MAX_GRID
constexpr int32_t kDefaultShared = 48 * 1024;                 // more has to be asked for, kernel by kernel
constexpr int32_t kMostDevices = 64;
constexpr uintptr_t kWorkspaceAlignment = 256;
constexpr int kMostArguments = 32;  // of a kernel, scratch pointers included: a test of the plans sees to it

thread_local std::string last_error;

[[noreturn]] void fail(bilevel_status status, const std::string& sentence) { throw Failure{status, sentence}; }

void check(const CudaDriver& driver, CuResult result, const std::string& what) {
  if (result != 0) fail(BILEVEL_CUDA_ERROR, what + ": " + cuda_error_text(driver, result));
}

const CudaDriver& need_driver() {
  std::string problem;
  const CudaDriver* driver = cuda_driver(problem);
  if (driver == nullptr) fail(BILEVEL_NO_DRIVER, problem);
  return *driver;
}

struct Device {
  CuDevice number;
  int32_t capability;  // as in 87
};

Device current_device(const CudaDriver& driver) {
  Device device{};
  int major = 0, minor = 0;
  check(driver, driver.cuCtxGetDevice(&device.number), "this thread has no current CUDA context; make one current first");
  check(driver, driver.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device.number), "the GPU does not name itself");
  check(driver, driver.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device.number), "the GPU does not name itself");
  device.capability = 10 * major + minor;
  return device;
}

// Code for sm_80 runs on 86 and 89, code for 86 on 89; every other GPU, those of Jetsons (87, 88) among them, runs its own only
// (bilevel/machine.py has the same rule).
bool runs_on(int32_t arch, int32_t capability) {
  if (arch == capability) return true;
  const bool is_family = (arch == 80 || arch == 86) && (capability == 86 || capability == 89);
  return is_family && arch < capability;
}

const ArchitecturePlans& plans_for(const Variant& variant, int32_t capability) {
  const ArchitecturePlans* best = nullptr;
  std::string held;
  for (int32_t i = 0; i < variant.num_architectures; ++i) {
    const ArchitecturePlans& plans = variant.architectures[i];
    if (!plans.is_built) continue;
    held += (held.empty() ? "sm_" : ", sm_") + std::to_string(plans.arch);
    if (runs_on(plans.arch, capability) && (best == nullptr || best->arch < plans.arch)) best = &plans;
  }
  if (best != nullptr) return *best;
  const std::string wanted = "sm_" + std::to_string(capability);
  fail(BILEVEL_NO_ARCHITECTURE, "this library holds kernels for " + held + ", none runs on " + wanted +
                                    "; build one: bilevel kernels build --geometry BUNDLE --arch " + wanted);
}

// ---- modules: loaded once in a process, whatever the context ------------------------------------------------------------

struct Loaded {
  std::atomic<CuKernel> kernel{nullptr};
  std::atomic<uint64_t> devices{0};  // where its shared memory has been asked for
};

Loaded* loaded_kernels() {
  static Loaded* const all = new Loaded[kNumKernels];  // never freed: other threads may launch until the process ends
  return all;
}

void load(const CudaDriver& driver, const Kernel& kernel, const Device& device, Loaded& loaded) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string name = std::string("the kernel ") + kernel.symbol + " for sm_" + std::to_string(kernel.arch);
  if (kernel.cuda / 1000 > driver.version / 1000) {
    fail(BILEVEL_NO_DRIVER, name + " was made for CUDA " + std::to_string(kernel.cuda / 1000) + ", the driver is for CUDA " +
                                std::to_string(driver.version / 1000) +
                                "; install a newer driver, or build with bilevel kernels build --cuda 12");
  }
  if (loaded.kernel.load(std::memory_order_relaxed) == nullptr) {
    CuLibrary library = nullptr;
    CuKernel found = nullptr;
    check(driver, driver.cuLibraryLoadData(&library, kernel.image, nullptr, nullptr, 0, nullptr, nullptr, 0),
          name + " cannot be loaded");
    check(driver, driver.cuLibraryGetKernel(&found, library, kernel.symbol), name + " is not in its module");
    loaded.kernel.store(found, std::memory_order_release);
  }
  int most = 0;
  if (kernel.shared > kDefaultShared && driver.cuDeviceGetAttribute(&most, kMostSharedBytes, device.number) == 0 &&
      kernel.shared > most) {
    const std::string arch = std::to_string(device.capability);
    fail(BILEVEL_NO_ARCHITECTURE, name + " takes " + std::to_string(kernel.shared) + " bytes of shared memory, sm_" + arch +
                                      " has " + std::to_string(most) + "; build it for that GPU: bilevel kernels build " +
                                      "--geometry BUNDLE --arch sm_" + arch);
  }
  if (kernel.shared > kDefaultShared) {
    check(driver,
          driver.cuKernelSetAttribute(kMaxDynamicSharedBytes, kernel.shared, loaded.kernel.load(std::memory_order_relaxed),
                                      device.number),
          name + " does not get " + std::to_string(kernel.shared) + " bytes of shared memory");
  }
  // Lazy loading would bring the code to the GPU with the first launch, which a capture refuses.
  CuFunction function = nullptr;
  check(driver, driver.cuKernelGetFunction(&function, loaded.kernel.load(std::memory_order_relaxed)), name + " cannot be loaded");
  if (driver.cuFuncLoad != nullptr) check(driver, driver.cuFuncLoad(function), name + " cannot be loaded");
  loaded.devices.fetch_or(uint64_t{1} << device.number, std::memory_order_release);
}

CuKernel kernel_on(const CudaDriver& driver, int32_t index, const Device& device) {
  Loaded& loaded = loaded_kernels()[index];
  if (device.number < 0 || device.number >= kMostDevices) fail(BILEVEL_CUDA_ERROR, "the driver numbers more than 64 GPUs");
  if ((loaded.devices.load(std::memory_order_acquire) >> device.number & 1) == 0) load(driver, kKernels[index], device, loaded);
  return loaded.kernel.load(std::memory_order_acquire);
}

// ---- launches -----------------------------------------------------------------------------------------------------------

// What a kernel's parameters point to.
struct Parameters {
  union Value {
    void* pointer;
    int32_t whole;
    float real;
  } values[kMostArguments];
  void* addresses[kMostArguments];
};

void fill(const CheckedCall& call, const Launch& launch, const std::vector<void*>& arrays, Parameters& parameters) {
  const Kernel& kernel = kKernels[launch.kernel];
  int32_t count = 0;
  for (; count < launch.num_arguments; ++count) {
    const Argument& argument = launch.arguments[count];
    Parameters::Value& value = parameters.values[count];
    switch (argument.kind) {
      case ArgumentKind::kPointer: value.pointer = arrays[argument.index]; break;
      case ArgumentKind::kFloat32: value.real = call.floats[argument.index]; break;
      case ArgumentKind::kInt32: {
        const int64_t whole = argument.expression(call.sizes).value;
        if (whole < 0 || whole > std::numeric_limits<int32_t>::max()) {
          fail(BILEVEL_BAD_ARGUMENT, std::string(kernel.symbol) + " cannot count to " + std::to_string(whole) +
                                         "; split the call into smaller ones");
        }
        value.whole = static_cast<int32_t>(whole);
        break;
      }
    }
  }
  for (int32_t i = 0; i < kernel.scratch; ++i) parameters.values[count++].pointer = nullptr;
  for (int32_t i = 0; i < count; ++i) parameters.addresses[i] = &parameters.values[i];
}

// The launch's grid; false where it is empty.
bool grid_of(const CheckedCall& call, const Launch& launch, unsigned (&grid)[3]) {
  for (int d = 0; d < 3; ++d) {
    const int64_t size = launch.grid[d](call.sizes).value;
    if (size <= 0) return false;
    if (size > kMostGrid[d]) {
      fail(BILEVEL_BAD_ARGUMENT, std::string(kKernels[launch.kernel].symbol) + " would need a grid of " +
                                     std::to_string(size) + ", the most is " + std::to_string(kMostGrid[d]) +
                                     "; split the call into smaller ones");
    }
    grid[d] = static_cast<unsigned>(size);
  }
  return true;
}

std::atomic<uint64_t> num_copies{0};

// The kernels of an operator in place write what changes: at another address the output begins as a copy.
void copy_first(const CudaDriver& driver, const CheckedCall& call, void* stream) {
  if (!call.op->in_place || call.tensors[0] == call.tensors[call.op->num_inputs]) return;
  const auto source = reinterpret_cast<uintptr_t>(call.tensors[0]);
  const auto target = reinterpret_cast<uintptr_t>(call.tensors[call.op->num_inputs]);
  num_copies.fetch_add(1, std::memory_order_relaxed);
  check(driver, driver.cuMemcpyDtoDAsync(target, source, call.output_bytes, static_cast<CuStream>(stream)),
        std::string(call.op->name) + " cannot copy " + std::to_string(call.output_bytes) + " bytes");
}

struct Prepared {
  CuKernel kernel;
  unsigned grid[3];
  Parameters parameters;
  int32_t index;
};

void run(const CheckedCall& call, void* workspace, size_t workspace_bytes, void* stream) {
  const Variant& variant = find_variant(call);
  if (call.is_empty) return;
  const CudaDriver& driver = need_driver();
  const Device device = current_device(driver);
  const Plan& plan = choose_plan(plans_for(variant, device.capability), call.sizes);
  const std::vector<int64_t> places = place_buffers(plan, call.sizes);
  if (places.back() > 0 && (workspace == nullptr || static_cast<uint64_t>(places.back()) > workspace_bytes)) {
    fail(BILEVEL_WORKSPACE_TOO_SMALL, std::string(call.op->name) + " needs a workspace of " + std::to_string(places.back()) +
                                          " bytes here, not " + std::to_string(workspace == nullptr ? 0 : workspace_bytes) +
                                          "; ask bilevel_workspace_size");
  }
  if (places.back() > 0 && reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
    fail(BILEVEL_WORKSPACE_TOO_SMALL, "the address of the workspace must be a multiple of 256");
  }
  std::vector<void*> arrays = call.tensors;
  for (int32_t i = 0; i < plan.num_buffers; ++i) arrays.push_back(static_cast<char*>(workspace) + places[i]);
  // Everything that can be refused is refused before the first launch.
  std::vector<Prepared> prepared(plan.num_launches);
  for (int32_t i = 0; i < plan.num_launches; ++i) {
    const Launch& launch = plan.launches[i];
    Prepared& next = prepared[i];
    next.index = launch.kernel;
    next.kernel = grid_of(call, launch, next.grid) ? kernel_on(driver, launch.kernel, device) : nullptr;
    if (next.kernel != nullptr) fill(call, launch, arrays, next.parameters);
  }
  copy_first(driver, call, stream);
  for (Prepared& next : prepared) {
    if (next.kernel == nullptr) continue;
    const Kernel& kernel = kKernels[next.index];
    check(driver,
          driver.cuLaunchKernel(next.kernel, next.grid[0], next.grid[1], next.grid[2], static_cast<unsigned>(kernel.threads), 1,
                                1, static_cast<unsigned>(kernel.shared), static_cast<CuStream>(stream),
                                next.parameters.addresses, nullptr),
          std::string(kernel.symbol) + " was not launched");
  }
}

void prepare(const CheckedCall& call) {
  const Variant& variant = find_variant(call);
  const CudaDriver& driver = need_driver();
  const Device device = current_device(driver);
  const ArchitecturePlans& plans = plans_for(variant, device.capability);
  for (int32_t p = 0; p < plans.num_plans; ++p) {
    for (int32_t i = 0; i < plans.plans[p].num_launches; ++i) kernel_on(driver, plans.plans[p].launches[i].kernel, device);
  }
}

size_t workspace_size(const CheckedCall& call, int32_t arch) {
  const Variant& variant = find_variant(call);
  int64_t bytes = 0;
  if (arch != 0) {
    bytes = workspace_limit(plans_for(variant, arch), call.sizes);
  } else {  // of the plans for every architecture, whichever were built
    for (int32_t i = 0; i < variant.num_architectures; ++i) {
      bytes = std::max(bytes, workspace_limit(variant.architectures[i], call.sizes));
    }
  }
  if (static_cast<uint64_t>(bytes) > std::numeric_limits<size_t>::max() / 2) {
    fail(BILEVEL_BAD_ARGUMENT, std::string(call.op->name) + " would need more workspace than there are addresses");
  }
  return static_cast<size_t>(bytes);
}

// Runs `function` and turns what it throws into a status and the thread's last error.
template <typename Function>
int32_t guarded(Function function) noexcept {
  try {
    try {
      function();
      return BILEVEL_OK;
    } catch (const Failure& failure) {
      last_error = failure.sentence;
      return failure.status;
    } catch (const std::bad_alloc&) {
      last_error = "the host is out of memory";
      return BILEVEL_OUT_OF_MEMORY;
    }
  } catch (...) {
    return BILEVEL_OUT_OF_MEMORY;  // not even the sentence fitted
  }
}

}  // namespace
}  // namespace bilevel

using namespace bilevel;

int32_t bilevel_abi_version(void) { return BILEVEL_KERNELS_ABI; }

const char* bilevel_library_info(void) { return kInfo; }

const char* bilevel_status_text(int32_t status) {
  switch (status) {
    case BILEVEL_OK: return "success";
    case BILEVEL_BAD_ARGUMENT: return "an argument breaks the contract";
    case BILEVEL_NOT_BUILT: return "no kernels for this geometry and data type";
    case BILEVEL_NO_DRIVER: return "no CUDA driver that serves";
    case BILEVEL_NO_ARCHITECTURE: return "no kernels for this GPU";
    case BILEVEL_WORKSPACE_TOO_SMALL: return "the workspace is too small or not aligned";
    case BILEVEL_CUDA_ERROR: return "the CUDA driver refused a call";
    case BILEVEL_OUT_OF_MEMORY: return "the host is out of memory";
    default: return "unknown status";
  }
}

uint64_t bilevel_num_copies(void) { return num_copies.load(std::memory_order_relaxed); }

const char* bilevel_last_error(void) { return last_error.c_str(); }

int32_t bilevel_workspace_size(const bilevel_call* call, int32_t arch, size_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail(BILEVEL_BAD_ARGUMENT, "the address for the number of bytes is NULL");
    *bytes = workspace_size(check_call(call, false), arch);
  });
}

int32_t bilevel_prepare(const bilevel_call* call) {
  return guarded([&] { prepare(check_call(call, false)); });
}

int32_t bilevel_launch(const bilevel_call* call, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded([&] { run(check_call(call, true), workspace, workspace_bytes, stream); });
}
