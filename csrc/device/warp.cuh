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

// The sums of x over 8 or 4 neighbouring lanes, shared out among them: lane m of these has x[8 / lanes m + i] in x[i], i < 8 / lanes.
template <int lanes>
PERFUSION_DEVICE void sum_of_lanes(float (&x)[8]) {
  int half = 4;
  PERFUSION_UNROLL
  for (int mask = lanes / 2; mask > 0; mask /= 2, half /= 2) {
    const bool upper = lane() & mask;
    PERFUSION_UNROLL
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half];
      x[i] = (upper ? x[i + half] : x[i]) + shuffle_xor(given, mask);
    }
  }
}

}  // namespace perfusion
