// What attention kernels are compiled for: the one list of head widths and context lengths.
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
  /* the end */

// Of a thread that has the scores of all keys, at most or nearly: what ptxas takes, in docs/kernels-cuda.md.
inline int attention_registers(int64_t T) { return T <= 80 ? 168 : 255; }

// The smallest that holds T keys; 0 if none does.
inline int attention_groups_for(int64_t T) {
  for (int groups : attention_groups) {
    if (T <= 16 * groups) return groups;
  }
  return 0;
}

}  // namespace perfusion
