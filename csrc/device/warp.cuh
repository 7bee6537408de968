// Warp reductions.
#pragma once

#include "layer.cuh"

namespace perfusion {

// The sum over all 32 lanes, in every lane.
PERFUSION_DEVICE float sum_of_warp(float x) {
  PERFUSION_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Reduce-scatter of x[8] over 8 or 4 neighbouring lanes: lane m of them returns the sum of x[8 / lanes m + i] in x[i], i < 8 / lanes.
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
