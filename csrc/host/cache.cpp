#include "cache.h"

namespace perfusion::host {

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
  const auto found = places.find(number);
  if (found != places.end()) {
    lines.splice(lines.begin(), lines, found->second);
  } else {
    if (lines.size() >= capacity) drop_oldest();
    lines.push_front({number});
    places[number] = lines.begin();
  }
  return lines.front();
}

void Cache::drop_oldest() {
  for (int bits = lines.back().changed; bits; bits &= bits - 1) written += sector_bytes;
  places.erase(lines.back().number);
  lines.pop_back();
}

void Cache::empty() {
  while (!lines.empty()) drop_oldest();
}

}  // namespace perfusion::host
