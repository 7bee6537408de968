// The host's side of the device layer on a GPU: what is asked of a device, once, and launches. Any number of host threads may call it.
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

// Allows runtime calls that are not captured themselves (memory allocated once, a kernel's first load) while this thread is capturing a
// stream, which would forbid them by default.
class BesideCapture {
 public:
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }

 private:
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

// Programmatic dependent launch: chips from 9.0 on have it, and graphs from CUDA 12.3 on can hold it. PERFUSION_DEPENDENT_LAUNCH=0
// leaves it out, to measure what it gains.
inline cudaError_t ask_dependent_launch(int ordinal, bool* result) {
  int major = 0, driver = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  const char* wish = std::getenv("PERFUSION_DEPENDENT_LAUNCH");
  *result = major >= 9 && driver >= 12030 && !(wish != nullptr && std::strcmp(wish, "0") == 0);
  return error;
}

// PERFUSION_MULTIPROCESSORS=N has launch plans count N multiprocessors, 0 to 65536; anything else is not read. A plan shares work out and
// is right for any number, so one device can run the plans of others: those that csrc/host/ runs with PERFUSION_HOST_MULTIPROCESSORS.
inline int planned_multiprocessors(int there) {
  const char* wish = std::getenv("PERFUSION_MULTIPROCESSORS");
  if (wish == nullptr || *wish < '0' || *wish > '9') return there;
  char* end = nullptr;
  const long count = std::strtol(wish, &end, 10);
  return *end == '\0' && count <= 65536 ? static_cast<int>(count) : there;
}

inline cudaError_t ask_device(int ordinal, Device* result) {
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
  cudaError_t error = ask_dependent_launch(ordinal, &result->dependent_launch);
  if (error != cudaSuccess) return error;
  const BesideCapture beside;
  void* errors = nullptr;  // kept as long as the process lives: kernels in flight may write them
  error = cudaHostAlloc(&errors, PERFUSION_DEVICE_ERRORS * sizeof(int32_t), cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) return error;
  result->errors = static_cast<int32_t*>(errors);
  for (int i = 0; i < PERFUSION_DEVICE_ERRORS; ++i) result->errors[i] = 0;
  return cudaSuccess;
}

// The current device, asked once.
inline perfusion_status device(const char* operation, Device* result) {
  static OncePerDevice once;
  static std::mutex mutex;
  static std::map<int, Device> known;
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) {
    error = static_cast<cudaError_t>(once(nullptr, ordinal, [&] {
      Device asked{};
      const cudaError_t refused = ask_device(ordinal, &asked);
      const std::lock_guard<std::mutex> guard(mutex);
      if (refused == cudaSuccess) known[ordinal] = asked;
      return refused;
    }));
  }
  if (error != cudaSuccess) {
    return fail(PERFUSION_DEVICE_ERROR, "%s: the device cannot be asked: %s", operation, cudaGetErrorString(error));
  }
  const std::lock_guard<std::mutex> guard(mutex);
  *result = known[ordinal];
  return PERFUSION_OK;
}

// Lets a kernel have all of the shared memory that a block may have on the current device. Once for each: launches of one kernel with
// different needs, from several host threads, would otherwise take each other's limit away.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static OncePerDevice once;
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  return static_cast<cudaError_t>(once(kernel, ordinal, [&] {
    const BesideCapture beside;
    int most = 0;
    cudaFuncAttributes attributes{};
    cudaError_t refused = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    if (refused == cudaSuccess) refused = cudaFuncGetAttributes(&attributes, kernel);
    if (refused != cudaSuccess) return refused;
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
    cudaLaunchAttribute early{};  // the kernel itself waits: wait_for_previous_kernel
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(threads));
    configuration.dynamicSmemBytes = static_cast<size_t>(bytes);
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &early;
    configuration.numAttrs = here.dependent_launch ? 1 : 0;
    // not <<<>>> and cudaGetLastError, which would also return an error that another library's call has left there
    void* values[] = {const_cast<Arguments*>(&arguments)};
    error = cudaLaunchKernelExC(&configuration, function, values);
  }
  if (error == cudaSuccess) return PERFUSION_OK;
  return fail(PERFUSION_DEVICE_ERROR, "%s: the launch was refused: %s", operation, cudaGetErrorString(error));
}

}  // namespace perfusion
