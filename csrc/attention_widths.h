// The head widths and context lengths that attention kernels are compiled for.
#pragma once

#include <cstdint>

namespace perfusion {

constexpr int attention_widths[] = {32, 40, 64, 80, 96, 128, 160};
constexpr int attention_groups[] = {5, 10, 16};  // of 16 keys

#define PERFUSION_ATTENTION_WIDTHS(CASE) \
  CASE(32)                               \
  CASE(40)                               \
  CASE(64)                               \
  CASE(80)                               \
  CASE(96)                               \
  CASE(128)                              \
  CASE(160)                              \
  /* end of the list */

// Resident blocks of 128 threads on a multiprocessor, as limited by registers: the launch bound of the kernels, which ptxas meets without
// spills, and the occupancy that the launch plan assumes.
constexpr int attention_resident_blocks(int d, int groups, int m) {
  if (groups > 5) return 2;
  return m == 2 ? (d <= 64 ? 3 : 2) : d <= 64 ? 4 : d <= 128 ? 3 : 2;
}

// The largest number of rows in a warp's tile: 32 where the scores of 32 rows fit in registers, else 16.
inline int most_tile_rows(int64_t T) { return T <= 80 ? 32 : 16; }

// The smallest compiled number of groups that holds T keys; 0 if there is none.
inline int attention_groups_for(int64_t T) {
  for (int groups : attention_groups) {
    if (T <= 16 * groups) return groups;
  }
  return 0;
}

}  // namespace perfusion
