// The host side of the device layer on a GPU: device attributes, queried once per device, and kernel launches. Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "../status.h"
#include "element.h"
#include "once.h"

namespace perfusion {

// Allows CUDA runtime calls that stream capture forbids by default but that are not captured themselves (a one-time allocation, the first
// load of a kernel), for the lifetime of the object and this thread.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }

 private:
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

// Programmatic dependent launch: from compute capability 9.0 on, and from driver 12.3 on, which can capture it into graphs.
// PERFUSION_DEPENDENT_LAUNCH=0 disables it, so that its gain can be measured.
inline cudaError_t query_dependent_launch(int ordinal, bool* result) {
  int major = 0, driver = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  const char* setting = std::getenv("PERFUSION_DEPENDENT_LAUNCH");
  *result = major >= 9 && driver >= 12030 && !(setting != nullptr && std::strcmp(setting, "0") == 0);
  return error;
}

// PERFUSION_MULTIPROCESSORS=N makes launch plans assume N multiprocessors, 0 to 65536; any other value is ignored. Plans only divide the
// work and are correct for every N, so a GPU can run the plans that csrc/host/ runs with PERFUSION_HOST_MULTIPROCESSORS.
inline int planned_multiprocessors(int present) {
  const char* setting = std::getenv("PERFUSION_MULTIPROCESSORS");
  if (setting == nullptr || *setting < '0' || *setting > '9') return present;
  char* end = nullptr;
  const long count = std::strtol(setting, &end, 10);
  return *end == '\0' && count <= 65536 ? static_cast<int>(count) : present;
}

inline cudaError_t query_device(int ordinal, Device* result) {
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrMultiProcessorCount, &result->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &result->shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &result->shared_per_multiprocessor},
      {cudaDevAttrL2CacheSize, &result->cache},
  };
  for (const auto& each : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(each.value, each.attribute, ordinal);
    if (error != cudaSuccess) return error;
  }
  result->multiprocessors = planned_multiprocessors(result->multiprocessors);
  cudaError_t error = query_dependent_launch(ordinal, &result->dependent_launch);
  if (error != cudaSuccess) return error;
  const RelaxedCapture relaxed;
  void* errors = nullptr;  // never freed: kernels in flight may still write to it
  error = cudaHostAlloc(&errors, PERFUSION_DEVICE_ERRORS * sizeof(int32_t), cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) return error;
  result->errors = static_cast<int32_t*>(errors);
  for (int i = 0; i < PERFUSION_DEVICE_ERRORS; ++i) result->errors[i] = 0;
  return cudaSuccess;
}

// The current device's attributes, queried once.
inline perfusion_status device(const char* operation, Device* result) {
  static OncePerDevice once;
  static std::mutex mutex;
  static std::map<int, Device> known;
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) {
    error = static_cast<cudaError_t>(once(nullptr, ordinal, [&] {
      Device queried{};
      const cudaError_t failed = query_device(ordinal, &queried);
      const std::lock_guard<std::mutex> guard(mutex);
      if (failed == cudaSuccess) known[ordinal] = queried;
      return failed;
    }));
  }
  if (error != cudaSuccess) {
    return fail(PERFUSION_DEVICE_ERROR, "%s: querying the device failed: %s", operation, cudaGetErrorString(error));
  }
  const std::lock_guard<std::mutex> guard(mutex);
  *result = known[ordinal];
  return PERFUSION_OK;
}

// Raises a kernel's dynamic shared memory limit to the device's maximum, once per kernel and device. Setting each launch's own size would
// race: of two host threads that launch one kernel with different sizes, one could lower the limit of the other. If a kernel's first launch
// is captured, the limit is raised during the capture, in relaxed mode; it takes effect at once and is not part of the graph.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static OncePerDevice once;
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  return static_cast<cudaError_t>(once(kernel, ordinal, [&] {
    const RelaxedCapture relaxed;
    int most = 0;
    cudaFuncAttributes attributes{};
    cudaError_t failed = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    if (failed == cudaSuccess) failed = cudaFuncGetAttributes(&attributes, kernel);
    if (failed != cudaSuccess) return failed;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(attributes.sharedSizeBytes));
  }));
}

template <class Arguments>
perfusion_status launch(const char* operation, void (*kernel)(Arguments), int64_t blocks, int threads, int bytes,
                        perfusion_stream stream, const Arguments& arguments) {
  Device here;
  const perfusion_status status = device(operation, &here);
  if (status != PERFUSION_OK) return status;
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = bytes > 48 * 1024 ? allow_shared_memory(function) : cudaSuccess;
  if (error == cudaSuccess) {
    cudaLaunchAttribute early{};  // kernels call wait_for_previous_kernel first
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(threads));
    configuration.dynamicSmemBytes = static_cast<size_t>(bytes);
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &early;
    configuration.numAttrs = here.dependent_launch ? 1 : 0;
    // not <<<>>> with cudaGetLastError, which would also return an earlier error of another library
    void* values[] = {const_cast<Arguments*>(&arguments)};
    error = cudaLaunchKernelExC(&configuration, function, values);
  }
  if (error == cudaSuccess) return PERFUSION_OK;
  return fail(PERFUSION_DEVICE_ERROR, "%s: the launch failed: %s", operation, cudaGetErrorString(error));
}

}  // namespace perfusion
