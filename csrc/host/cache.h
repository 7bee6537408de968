// A model of the L2 cache, to count the DRAM bytes of a launch: lines of 128 bytes in sectors of 32, 16- to 31-way set associative,
// LRU replacement within a set, write-back without fetch on a store. L1 is not modelled: every request of a thread goes to L2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace perfusion::host {

class Cache {
 public:
  explicit Cache(int64_t bytes);  // cold: no line of it is of this launch
  void access(const void* address, int bytes, bool written);
  void flush();  // writes dirty sectors back

  uint64_t requested = 0;                    // bytes, by accesses
  uint64_t dram_read = 0, dram_written = 0;  // bytes, in whole sectors

 private:
  static constexpr int line_bytes = 128, sector_bytes = 32, least_ways = 16;
  struct Line {
    uint64_t number = ~uint64_t{0};
    uint8_t valid = 0, dirty = 0;  // a bit for each sector
  };

  Line& use(uint64_t number);
  void evict(Line& line);

  size_t sets = 1, ways;
  std::vector<Line> lines;  // [sets, ways], most recently used first in each set
};

}  // namespace perfusion::host
