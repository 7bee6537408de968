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
  asked += bytes;
  for (uint64_t sector = first / sector_bytes; sector <= (first + bytes - 1) / sector_bytes; ++sector) {
    Line& line = use(sector * sector_bytes / line_bytes);
    const uint8_t bit = 1 << sector % (line_bytes / sector_bytes);
    if (!(line.held & bit) && !write) read += sector_bytes;  // a store brings nothing: the cache knows which bytes it has
    line.held |= bit;
    if (write) line.changed |= bit;
  }
}

Cache::Line& Cache::use(uint64_t number) {
  // neighbours lie in different sets, and rows of a matrix are not crowded into a few
  const uint64_t mixed = number ^ (number / sets * 0x9e3779b97f4a7c15 >> 32);
  const auto set = lines.begin() + mixed % sets * ways, end = set + ways;
  auto line = std::find_if(set, end, [&](const Line& each) { return each.number == number; });
  if (line == end) {
    line = end - 1;
    drop(*line);
    *line = {number};
  }
  std::rotate(set, line, line + 1);
  return *set;
}

void Cache::drop(Line& line) {
  for (int bits = line.changed; bits; bits &= bits - 1) written += sector_bytes;
  line = {};
}

void Cache::empty() {
  for (Line& line : lines) drop(line);
}

}  // namespace perfusion::host
