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
};

// Blocks that the device runs at once: as many as shared memory has room for, a KB of which each block takes beside its own, and
// registers, 65,536 a multiprocessor.
inline int64_t seats(const Device& device, int threads, int bytes, int registers = 168) {
  const int by_memory = device.shared_per_multiprocessor / (bytes + 1024), by_registers = 65536 / (registers * threads);
  const int each = by_memory < by_registers ? by_memory : by_registers;
  return int64_t{device.multiprocessors} * (each > 1 ? each : 1);
}

}  // namespace perfusion
