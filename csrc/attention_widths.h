// What attention kernels are compiled for: the one list of head widths and context lengths.
#pragma once

#include <cstdint>

namespace perfusion {

constexpr int attention_widths[] = {32, 40, 64, 80, 96, 128, 160};
constexpr int attention_groups[] = {5, 10, 16};  // of 16 keys
constexpr int longest_context = 16 * attention_groups[2];

#define PERFUSION_ATTENTION_WIDTHS(CASE) \
  CASE(32)                               \
  CASE(40)                               \
  CASE(64)                               \
  CASE(80)                               \
  CASE(96)                               \
  CASE(128)                              \
  CASE(160)                              \
  /* the end */

// Blocks of 128 threads that a multiprocessor holds by its registers: what ptxas manages without a spill, and the plan counts on.
constexpr int attention_beside(int d, int groups, int m) {
  if (groups > 5) return 2;
  return m == 2 ? (d <= 64 ? 3 : 2) : d <= 64 ? 4 : d <= 128 ? 3 : 2;
}

// Rows of a warp's tile, at most: 32 where their scores leave room in registers.
inline int most_tile_rows(int64_t T) { return T <= 80 ? 32 : 16; }

// The smallest that holds T keys; 0 if none does.
inline int attention_groups_for(int64_t T) {
  for (int groups : attention_groups) {
    if (T <= 16 * groups) return groups;
  }
  return 0;
}

}  // namespace perfusion
