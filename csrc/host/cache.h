// A second-level cache, to count what of a launch's accesses reaches device memory: lines of 128 bytes in sectors of 32, as the GPUs
// here have them, in sets of 16 to 31. In its set, what was used longest ago makes room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace perfusion::host {

class Cache {
 public:
  explicit Cache(int64_t bytes);  // full of what nobody here asks for
  void access(const void* address, int bytes, bool written);
  void empty();  // what has been written goes to memory

  uint64_t asked = 0;              // bytes
  uint64_t read = 0, written = 0;  // the same, of device memory, in whole sectors

 private:
  static constexpr int line_bytes = 128, sector_bytes = 32, least_ways = 16;
  struct Line {
    uint64_t number = ~uint64_t{0};
    uint8_t held = 0, changed = 0;  // a bit for each sector
  };

  Line& use(uint64_t number);
  void drop(Line& line);

  size_t sets = 1, ways;
  std::vector<Line> lines;  // [sets, ways], of each set the one used last first
};

}  // namespace perfusion::host
