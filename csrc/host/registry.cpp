// The host library's registry: empty, because ptxas compiles nothing for it. csrc/registry.py generates that of the CUDA library.
#include "../include/perfusion_kernels.h"

extern "C" int64_t perfusion_compiled_kernels(const perfusion_compiled_kernel** kernels) {
  *kernels = nullptr;
  return 0;
}
