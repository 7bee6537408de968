// Storage types, and the device's attributes, shared by both implementations of the device layer.
#pragma once

#include <cstdint>

namespace perfusion {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// A 16-byte vector, loaded or stored by one instruction.
struct alignas(16) Words {
  uint32_t word[4];
};

// The attributes of a device that launch plans use.
struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes, with opt-in
  int shared_per_multiprocessor;  // bytes
  int cache;                      // bytes of L2
  bool dependent_launch;          // whether launches use programmatic dependent launch
  int32_t* errors;                // PERFUSION_DEVICE_ERRORS words of host memory that kernels write and the host reads
};

// Resident blocks of a multiprocessor: limited by registers (`by_registers`) and by shared memory, of which the system reserves 1 KB a
// block. At least 1.
inline int resident_blocks(const Device& device, int bytes, int by_registers) {
  const int by_memory = device.shared_per_multiprocessor / (bytes + 1024), each = by_memory < by_registers ? by_memory : by_registers;
  return each > 1 ? each : 1;
}

}  // namespace perfusion
