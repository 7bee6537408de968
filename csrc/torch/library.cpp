// Functions with which the Python loader checks the library before it registers it.
#include "support.h"

#ifndef PERFUSION_HOST
#include <cuda_runtime_api.h>
#endif

namespace perfusion::torch_binding {

std::string& signatures() {
  static std::string lines;
  return lines;
}

}  // namespace perfusion::torch_binding

// One line per operator: its name, argument types and result types.
extern "C" PERFUSION_API const char* perfusion_torch_signatures(void) { return perfusion::torch_binding::signatures().c_str(); }

// Major versions of CUDA: that of the linked runtime, and the newest that the driver supports, 0 if there is no driver.
extern "C" PERFUSION_API void perfusion_torch_cuda_versions(int* runtime, int* driver) {
  *runtime = *driver = 0;
#ifndef PERFUSION_HOST
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
#endif
  *runtime /= 1000, *driver /= 1000;
}
