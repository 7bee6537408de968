// Reads a buffer several times: from the L2 cache if it fits there, else from device memory. Every word goes into a sum, which is checked.
#include <cstdint>

#include <cuda_runtime.h>

namespace {

constexpr int THREADS = 512, IN_FLIGHT = 8;  // vectors of 16 bytes that a thread asks for before it uses the first

__global__ void __launch_bounds__(THREADS) read_kernel(const uint4* data, int64_t vectors, int repeats, unsigned* sum) {
  const int64_t step = int64_t{gridDim.x} * THREADS;
  unsigned total = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    // every repeat reads another block's part; ld.global.cg caches in L2 alone
    const int64_t first = int64_t{(blockIdx.x + 7 * repeat) % gridDim.x} * THREADS + threadIdx.x;
    for (int64_t i = first; i < vectors; i += step * IN_FLIGHT) {
      uint4 x[IN_FLIGHT];
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) x[k] = i + k * step < vectors ? __ldcg(data + i + k * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) total += x[k].x + x[k].y + x[k].z + x[k].w;
    }
  }
  total = __reduce_add_sync(0xffffffffu, total);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, total);
}

}  // namespace

// Adds the 32-bit words of `bytes` (a multiple of 16), `repeats` times, to *sum, modulo 2^32. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int read_repeatedly(const void* data, int64_t bytes, int repeats, unsigned* sum,
                                                                      int multiprocessors, void* stream) {
  read_kernel<<<4 * multiprocessors, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data), bytes / 16,
                                                                                      repeats, sum);
  return cudaGetLastError();
}
