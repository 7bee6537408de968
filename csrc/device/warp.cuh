// What the lanes of a warp do together.
#pragma once

#include "layer.cuh"

namespace perfusion {

// Of all 32 lanes, in every one of them.
PERFUSION_DEVICE float sum_of_warp(float x) {
  PERFUSION_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// x[i] of eight neighbouring lanes, for each of them the i that is its number among the eight.
PERFUSION_DEVICE float sum_of_eight_lanes(float (&x)[8]) {
  PERFUSION_UNROLL
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane() & half;
    PERFUSION_UNROLL
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half];
      x[i] = (upper ? x[i + half] : x[i]) + shuffle_xor(given, half);
    }
  }
  return x[0];
}

}  // namespace perfusion
