// Storage types shared by both implementations of the device layer.
#pragma once

#include <cstdint>

namespace perfusion {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// 16 bytes that one instruction moves.
struct alignas(16) Words {
  uint32_t word[4];
};

// What a launch plan needs to know of the device.
struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes, with opt-in
  int shared_per_multiprocessor;  // bytes
  int cache;                      // bytes, of the second level
  bool dependent_launch;          // whether a kernel may begin before the one before it has ended
  int32_t* errors;                // PERFUSION_DEVICE_ERRORS words of host memory that kernels write and the host reads
};

// Blocks that a multiprocessor holds at once: at most `by_registers`, and as many as shared memory has room for, of which the system
// reserves 1 KB a block. At least 1.
inline int resident_blocks(const Device& device, int bytes, int by_registers) {
  const int by_memory = device.shared_per_multiprocessor / (bytes + 1024), each = by_memory < by_registers ? by_memory : by_registers;
  return each > 1 ? each : 1;
}

}  // namespace perfusion
