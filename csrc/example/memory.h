// Device memory for the programs here: of a GPU, or ordinary memory where the library is built for the CPU.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(PERFUSION_HOST)

// Allocated by operator new, because AddressSanitizer checks its exact end; it aligns to 16 bytes.
inline void *allocate(size_t bytes) { return ::operator new[](bytes); }
inline void free_device(void *device) { ::operator delete[](device); }
inline void copy_to_device(void *device, const void *host, size_t bytes) {
  if (bytes > 0) std::memcpy(device, host, bytes);
}
inline void copy_to_host(void *host, const void *device, size_t bytes) {
  if (bytes > 0) std::memcpy(host, device, bytes);
}

#else

#include <cuda_runtime.h>

inline void check(cudaError_t error) {
  if (error != cudaSuccess) std::printf("CUDA: %s\n", cudaGetErrorString(error)), std::exit(2);
}
inline void *allocate(size_t bytes) {
  void *memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}
inline void free_device(void *device) { check(cudaFree(device)); }
inline void copy_to_device(void *device, const void *host, size_t bytes) { check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice)); }
// Waits for the default stream, on which the kernels here run.
inline void copy_to_host(void *host, const void *device, size_t bytes) { check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost)); }

#endif
