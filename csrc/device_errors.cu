// C API of errors found on the device. Kernels set flags in Device::errors, which this reads and clears.
#include "device/layer.cuh"

extern "C" perfusion_status perfusion_device_errors(int32_t* errors) {
  using namespace perfusion;
  if (errors == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "device_errors: errors must be given; got NULL");
  Device here;
  const perfusion_status status = device("device_errors", &here);
  if (status != PERFUSION_OK) return status;
  for (int i = 0; i < PERFUSION_DEVICE_ERRORS; ++i) {
    volatile int32_t* word = here.errors + i;
    errors[i] = *word;
    if (errors[i] != 0) *word = 0;
  }
  return PERFUSION_OK;
}
