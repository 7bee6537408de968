#include "cache.h"

#include <algorithm>

namespace perfusion::host {

Cache::Cache(int64_t bytes) {
  const size_t all = std::max<int64_t>(bytes / line_bytes, 1);
  while (2 * least_ways * sets <= all) sets *= 2;
  ways = all / sets;
  lines.resize(sets * ways);
}

void Cache::access(const void* address, int bytes, bool write) {
  const auto first = reinterpret_cast<uint64_t>(address);
  requested += bytes;
  for (uint64_t sector = first / sector_bytes; sector <= (first + bytes - 1) / sector_bytes; ++sector) {
    Line& line = use(sector * sector_bytes / line_bytes);
    const uint8_t bit = 1 << sector % (line_bytes / sector_bytes);
    if (!(line.valid & bit) && !write) dram_read += sector_bytes;  // a store fetches nothing: bytes are tracked by a mask
    line.valid |= bit;
    if (write) line.dirty |= bit;
  }
}

Cache::Line& Cache::use(uint64_t number) {
  // hashed, so that consecutive lines map to different sets, and rows a power of two apart do too
  const uint64_t mixed = number ^ (number / sets * 0x9e3779b97f4a7c15 >> 32);
  const auto set = lines.begin() + mixed % sets * ways, end = set + ways;
  auto line = std::find_if(set, end, [&](const Line& each) { return each.number == number; });
  if (line == end) {
    line = end - 1;
    evict(*line);
    *line = {number};
  }
  std::rotate(set, line, line + 1);
  return *set;
}

void Cache::evict(Line& line) {
  for (int bits = line.dirty; bits; bits &= bits - 1) dram_written += sector_bytes;
  line = {};
}

void Cache::flush() {
  for (Line& line : lines) evict(line);
}

}  // namespace perfusion::host
