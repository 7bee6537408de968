// A second-level cache, to count what of a launch's accesses reaches device memory: lines of 128 bytes in sectors of 32, as the GPUs
// here have them. What was used longest ago makes room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>

namespace perfusion::host {

class Cache {
 public:
  explicit Cache(int64_t bytes) : capacity(bytes / line_bytes) {}
  void access(const void* address, int bytes, bool written);
  void empty();  // what has been written goes to memory

  uint64_t asked = 0;              // bytes
  uint64_t read = 0, written = 0;  // the same, of device memory, in whole sectors

 private:
  static constexpr int line_bytes = 128, sector_bytes = 32;
  struct Line {
    uint64_t number;
    uint8_t held = 0, changed = 0;  // a bit for each sector
  };
  Line& use(uint64_t number);
  void drop_oldest();

  const size_t capacity;
  std::list<Line> lines;  // the one used last is the first
  std::unordered_map<uint64_t, std::list<Line>::iterator> places;
};

}  // namespace perfusion::host
