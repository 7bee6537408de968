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
};

}  // namespace perfusion
