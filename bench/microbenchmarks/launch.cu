// A kernel that adds one to a number: what a launch costs, and what it costs if it may begin before the kernel in front of it has ended.
#include <cuda_runtime.h>

namespace {

__global__ void count_kernel(int* number) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  if (threadIdx.x == 0) *number += 1;
}

}  // namespace

// *number += 1. programmatic: with programmatic dependent launch, from compute capability 9.0 on. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int launch_once(int* number, int programmatic, void* stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 32;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, count_kernel, number);
}
