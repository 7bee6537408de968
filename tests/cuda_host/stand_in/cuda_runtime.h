// As much of CUDA's runtime as csrc/device/launch.h calls, for a test on a machine without a GPU. A launch is refused as the runtime
// refuses it: when it asks for more shared memory than its kernel has been allowed on the current device.
#pragma once

#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
struct dim3 { unsigned x, y = 1, z = 1; dim3(unsigned x = 1) : x(x) {} };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; struct { int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; unsigned numAttrs; };
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

inline thread_local int current_device = 0;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline std::mutex runtime_mutex;
inline std::map<std::pair<const void*, int>, int> allowed;
inline int attributes_set = 0, in_capture = 0, launches = 0, early_on_old_chips = 0, early = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {4, 101376, 102400, 1 << 20, current_device == 0 ? 8 : 9};
  *value = values[which];
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { std::swap(*mode, capture_mode); return cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const std::lock_guard<std::mutex> guard(runtime_mutex);
  if (capture_mode != cudaStreamCaptureModeRelaxed) ++in_capture;
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) { attributes->sharedSizeBytes = 1024; return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> guard(runtime_mutex);
  if (capture_mode != cudaStreamCaptureModeRelaxed) ++in_capture;
  ++attributes_set;
  allowed[{kernel, current_device}] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const std::lock_guard<std::mutex> guard(runtime_mutex);
  ++launches;
  early += config->numAttrs, early_on_old_chips += current_device == 0 ? config->numAttrs : 0;
  const auto found = allowed.find({kernel, current_device});
  const size_t most = found == allowed.end() ? 48 * 1024 : found->second;
  return config->dynamicSmemBytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}
