// What the loader in perfusion_kernels/cuda asks of the library before it trusts it.
#include "support.h"

#ifndef PERFUSION_HOST
#include <cuda_runtime_api.h>
#endif

namespace perfusion::border {

std::string& signatures() {
  static std::string lines;
  return lines;
}

}  // namespace perfusion::border

// A line for every operator: its name and the types that the kernel takes and gives.
extern "C" PERFUSION_API const char* perfusion_torch_signatures(void) { return perfusion::border::signatures().c_str(); }

// The major versions of CUDA: of the runtime in here, and the newest that the driver can run, 0 if there is no driver.
extern "C" PERFUSION_API void perfusion_torch_cuda_versions(int* runtime, int* driver) {
  *runtime = *driver = 0;
#ifndef PERFUSION_HOST
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
#endif
  *runtime /= 1000, *driver /= 1000;
}
